"""The exceptions' messages: each once, the nearest word, another library's reason in a
line; and bounds of settings.
"""

import math
from enum import Enum
from types import SimpleNamespace

import numpy as np
import pytest

from mora_ds.common import errors
from mora_ds.common.errors import (
    COUNT,
    SECONDS,
    Stopped,
    UserError,
    named_as_flags,
    nearest,
    out_of_bounds,
    raise_validation_errors,
    reason,
    unknown,
    validation_errors_of,
    whole_number,
    wrong_values,
)
from tests.helpers.errors import user_error
from tests.helpers.tables import each_row, parsed


class Kind(str, Enum):
    ONE = "one"
    TWO = "two"


def test_each_problem_is_named_once():
    raise_validation_errors([])
    with pytest.raises(UserError) as caught:
        raise_validation_errors(["--a", "--b", "--a"])
    assert str(caught.value) == "--a\n--b"
    assert validation_errors_of(raise_validation_errors, ["--a", "--b"]) == [
        "--a",
        "--b",
    ]
    assert validation_errors_of(raise_validation_errors, []) == []


def test_a_word_is_not_its_own_nearest():
    assert (
        nearest("merge_every", ["merge_every", "merge_very"])
        == " Did you mean 'merge_very'?"
    )
    assert nearest("merge_every", ["merge_every", "seed"]) == ""


def test_an_unknown_name_is_named_with_the_known_ones():
    assert (
        unknown("--kind", "tow", ["one", "two"])
        == "unknown --kind 'tow'; known: one, two. Did you mean 'two'?"
    )


def test_settings_that_are_not_allowed_are_named_as_flags():
    settings = SimpleNamespace(a=0, b=2, kind="two", other="tow")
    wrong = wrong_values(
        settings, {"a": COUNT, "b": COUNT, "kind": Kind, "other": Kind}
    )
    assert list(wrong) == [
        "--a must be at least 1, got 0",
        unknown("--other", "tow", ["one", "two"]),
    ]


def test_a_stop_passes_what_handles_errors():
    assert not issubclass(Stopped, Exception)


@pytest.mark.parametrize(
    "error, words",
    [
        (ValueError("first line\nsecond line"), "first line"),
        (ValueError("\n  what is wrong:\n  a detail\nmore"), "what is wrong: a detail"),
        (ValueError("all:\nof:\nthem:"), "all: of: them:"),
        (KeyError("name"), "KeyError 'name'"),
        (ValueError(), "ValueError"),
    ],
)
def test_another_librarys_message_in_a_line(error, words):
    assert reason(error) == words


BOUNDS = """
COUNT             | [1, 2]       | [0, -1]
POSITIVE          | [1.0e-9, 1]  | [0, -1]
BELOW_1           | [0, 0.999]   | [1, -0.1]
ABOVE_0_AT_MOST_1 | [1.0e-9, 1]  | [0, 1.001]
SECONDS           | [0, 1.0e+9]  | [-1, 1.001e+9]
"""


@each_row("name, allowed, refused", BOUNDS)
def test_bounds(name, allowed, refused):
    bounds = getattr(errors, name)
    assert all(map(bounds.allow, parsed(allowed)))
    never = [math.nan, math.inf, -math.inf]
    assert not any(map(bounds.allow, [*parsed(refused), *never]))


def test_a_value_out_of_bounds_is_named_with_its_flag():
    large = 2**63
    values = [
        ("a", None, COUNT),
        ("b", 0, COUNT),
        ("c", large - 1, COUNT),
        ("d", large, COUNT),
        ("e", 2e9, SECONDS),
    ]
    assert [line for value in values for line in out_of_bounds(*value)] == [
        "--b must be at least 1, got 0",
        f"--d must be below {large}, got {large}",
        "--e must be at least 0 and at most 1,000,000,000, got 2000000000.0",
    ]


@pytest.mark.parametrize(
    "value", ["2", 2.0, True, None, 0, 2**63, np.int64(0), np.bool_(True)]
)
def test_what_is_no_whole_number(value):
    with user_error(r"^f: `x` must be a whole number from 1 on, or None, got "):
        whole_number(value, 1, "f: `x`", ", or None")


def test_whole_numbers_of_numpy_become_ints():
    assert type(whole_number(np.int64(2), 2, "f: `x`")) is int


def test_a_program_names_flags_where_a_function_names_arguments():
    error = user_error(r"^--mora_rank 0 and --verify: `hidden_size` of others$")
    with error, named_as_flags("verify", rank="--mora_rank"):
        raise UserError("`rank` 0 and `verify`: `hidden_size` of others")
