"""Every tool on mutated files whose hashes fit: only the project's own errors, nothing
written elsewhere, no long call.

Each commit tries other mutations.
"""

import json

import pytest

from tests.helpers.fuzz import fuzz, seed_of_commit, subjects

FEW = 40
MANY = 600


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return subjects(tmp_path_factory.mktemp("subjects"))


def check(made, seeds, scratch):
    failures = fuzz(made, seeds, scratch)
    assert not failures, json.dumps(failures[:5], indent=1)


def test_a_few_mutations(made, tmp_path):
    check(made, range(FEW), tmp_path)


@pytest.mark.heavy(seconds=40)
def test_many_mutations(made, tmp_path):
    first = seed_of_commit()
    check(made, range(first, first + MANY), tmp_path)
