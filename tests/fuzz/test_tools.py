"""Every tool on mutated files whose hashes fit: only the project's own errors, nothing
written elsewhere, no long call.

Each commit tries other mutations.
"""

import json

import pytest

from tests.helpers.fuzz import fuzz, seed_of_commit, subjects

FEW = 40
MANY = 400


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """A function that fails where a tool does not behave on one of these mutations."""
    mutated = subjects(tmp_path_factory.mktemp("subjects"))

    def check(seeds, scratch):
        failures = fuzz(mutated, seeds, scratch)
        assert not failures, json.dumps(failures[:5], indent=1)

    return check


def test_tools_survive_a_few_mutations(check, tmp_path):
    check(range(FEW), tmp_path)


@pytest.mark.heavy(seconds=30)
def test_tools_survive_many_mutations(check, tmp_path):
    first = seed_of_commit()
    check(range(first, first + MANY), tmp_path)
