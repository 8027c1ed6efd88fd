"""Every tool on mutated files whose hashes fit: only the project's own errors, nothing written elsewhere, no long call.

Each commit tries other mutations.
"""

import json
from pathlib import Path

import pytest

from tests.helpers.fuzz import Subject, fuzz, seed_of_commit, subjects

FEW = 40
MANY = 600


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    return subjects(tmp_path_factory.mktemp("subjects"))


def check(made: list[Subject], seeds: range, scratch: Path):
    failures = fuzz(made, seeds, scratch)
    assert not failures, json.dumps(failures[:5], indent=1)


def test_a_few_mutations(made: list[Subject], tmp_path: Path):
    check(made, range(FEW), tmp_path)


@pytest.mark.heavy(seconds=40)
def test_many_mutations(made: list[Subject], tmp_path: Path):
    first = seed_of_commit()
    check(made, range(first, first + MANY), tmp_path)
