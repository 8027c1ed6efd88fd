"""Every tool on mutated files whose hashes fit: only the project's own errors, nothing written elsewhere, no long call.

The long run is made of slices: `pytest -m heavy tests/fuzz`, or `python -m tests.helpers.fuzz FIRST COUNT FOLDER`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.fuzz import Subject, fuzz, subjects

QUICK = 150
LONG, SLICES = 20_000, 10


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    return subjects(tmp_path_factory.mktemp("subjects"))


def check(made: list[Subject], seeds: range, scratch: Path) -> None:
    found, _ = fuzz(made, seeds, scratch)
    assert not found, json.dumps(found[:5], indent=1)


def test_a_few_mutations(made: list[Subject], tmp_path: Path) -> None:
    check(made, range(QUICK), tmp_path)


@pytest.mark.heavy
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("number", range(SLICES))
def test_many_mutations(made: list[Subject], tmp_path: Path, number: int) -> None:
    each = LONG // SLICES
    check(made, range(1000 + number * each, 1000 + (number + 1) * each), tmp_path)
