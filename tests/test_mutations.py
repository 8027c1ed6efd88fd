"""tests/mutations.py: every fault can still be put into the code, so that the list does not
age unseen.
"""

from tests.mutations import MUTATIONS, ROOT


def test_every_mutation_fits_the_code():
    assert [
        problem for mutation in MUTATIONS if (problem := mutation.problem(ROOT))
    ] == []
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    for mutation in MUTATIONS:
        assert all((ROOT / "tests" / tests).exists() for tests in mutation.tests), (
            mutation.name
        )
