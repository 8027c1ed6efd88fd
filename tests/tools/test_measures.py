"""tools/measures.py on a small package: nodes, lines of code, packed assignments; and how
deep the forward of a layer is.
"""

from itertools import product
from pathlib import Path

import torch
from torch import nn

from mora_ds.adapters.layer import MoRALinear
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import OperatorKind
from tools.measures import count_flags, forward_calls, measure

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


def test_flags_are_the_fields_of_documented_classes(tmp_path):
    (tmp_path / "settings.py").write_text(SETTINGS)
    assert count_flags(tmp_path) == 2


def test_a_forward_is_at_most_so_deep():
    """Over activations for 1 token, over the weight for 8."""
    dtypes = (torch.float32, torch.bfloat16)
    for kind, dtype, tokens in product(OperatorKind, dtypes, (1, 8)):
        spec = OperatorSpec(kind, 32, 32, 8)
        layer = MoRALinear(nn.Linear(32, 32, dtype=dtype), spec)
        measures = forward_calls(layer, torch.ones(tokens, 32, dtype=dtype))
        calls, _, depth, files = measures.values()
        assert calls <= 20 and depth <= 7 and files <= 4, (measures, spec, tokens)


def test_tests_touch_private_attributes_in_few_places():
    tests = Path(__file__).parents[1]
    assert measure(tests)["private attributes of others"] <= 40
