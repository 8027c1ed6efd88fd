"""tools/measures.py on a small package: nodes, lines of code, packed assignments."""

from pathlib import Path

from tools.measures import count_flags, measure

SOURCE = '''"""A module."""


def add(own, others):
    """The sum."""
    # Both are numbers.
    total, part = own + others, 0

    return total + part + others._size


print(add(1, 2))
'''
SETTINGS = '''@documented
@dataclass
class Settings:
    first: int = 1
    """The first one."""
    second: int = 2


class Other:
    third: int = 3
'''


def test_measures_of_a_module(tmp_path):
    (tmp_path / "module.py").write_text(SOURCE)
    measures = measure(tmp_path)
    # Module; def, its arguments and two arg; the assignment with a tuple of two names, and
    # a tuple of a sum (4) and a constant; return with a sum (4) and an attribute of a name
    # in another one; print with its name, and add with its name and two constants.
    assert measures["nodes of the syntax tree"] == 1 + 4 + 1 + 3 + 6 + 5 + 4 + 7
    assert measures["private attributes of others"] == 1
    assert measures["lines of code"] == 4
    assert measures["functions"] == 1
    assert measures["names that say nothing, in 1,000 lines"] == 3 / 4 * 1000
    assert measures["assignments of several packed values, %"] == 100.0
    assert measures["comment lines in 1,000 lines"] == 1 / 4 * 1000


def test_flags_are_the_fields_of_documented_classes(tmp_path):
    (tmp_path / "settings.py").write_text(SETTINGS)
    assert count_flags(tmp_path) == 2


def test_tests_touch_private_attributes_in_few_places():
    tests = Path(__file__).parents[1]
    assert measure(tests)["private attributes of others"] <= 40
