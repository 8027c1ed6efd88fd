"""tests/mutations.py: every fault can still be put into the code, so that the list does not
age unseen.
"""

import ast

from tests.mutations import MUTATIONS, ROOT, Edit


def test_every_mutation_fits_the_code():
    assert [
        problem for mutation in MUTATIONS if (problem := mutation.problem(ROOT))
    ] == []
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    for mutation in MUTATIONS:
        assert all((ROOT / "tests" / name).exists() for name in mutation.tests.split())


def test_a_pattern_fits_whatever_the_format_and_names():
    edit = Edit("any_x > f(any_x, 1)", "any_x")
    tree = edit.visit(ast.parse("if a.b >f(  # why\n  a.b, 1):\n  c > f(d, 1)"))
    assert ast.unparse(tree) == "if a.b:\n    c > f(d, 1)"
    assert edit.count == 1
