"""The exceptions' messages: each once, the nearest word, another library's reason in a line; and bounds of settings."""

from __future__ import annotations

import math

import pytest

from mora_ds.common.errors import (
    ABOVE_0_AT_MOST_1,
    AT_MOST_1,
    BELOW_1,
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SECONDS,
    Bounds,
    UserError,
    nearest,
    out_of_bounds,
    reason,
    refusal,
    refuse,
)


def test_each_problem_is_told_once() -> None:
    refuse([])
    with pytest.raises(UserError) as caught:
        refuse(["--a", "--b", "--a"])
    assert str(caught.value) == "--a\n--b"
    assert refusal(refuse, ["--a", "--b"]) == ["--a", "--b"] and refusal(refuse, []) == []


def test_a_word_is_not_its_own_nearest() -> None:
    assert nearest("merge_every", ["merge_every", "merge_very"]) == " Did you mean 'merge_very'?"
    assert nearest("merge_every", ["merge_every", "seed"]) == ""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("first line\nsecond line"), "first line"),
        (ValueError("\n  what is wrong:\n  a detail\nmore"), "what is wrong: a detail"),
        (ValueError("all:\nof:\nthem:"), "all: of: them:"),
        (KeyError("name"), "KeyError 'name'"),
        (ValueError(), "ValueError"),
    ],
)
def test_another_librarys_message_in_a_line(error: Exception, words: str) -> None:
    assert reason(error) == words


@pytest.mark.parametrize(
    ("bounds", "allowed", "refused"),
    [
        (COUNT, [1, 2], [0, -1]),
        (NOT_NEGATIVE, [0, 0.0, 1], [-1e-9]),
        (POSITIVE, [1e-9, 1], [0, -1]),
        (BELOW_1, [0, 0.999], [1, -0.1]),
        (AT_MOST_1, [0, 1], [1.001, -0.1]),
        (ABOVE_0_AT_MOST_1, [1e-9, 1], [0, 1.001]),
        (SECONDS, [0, 1e9], [-1, 1.001e9]),
        (Bounds(), [-1e300, 0, 1e300], []),
    ],
    ids=str,
)
def test_bounds(bounds: Bounds, allowed: list[float], refused: list[float]) -> None:
    assert all(map(bounds.allow, allowed))
    assert not any(map(bounds.allow, [*refused, math.nan, math.inf, -math.inf]))


def test_a_value_out_of_bounds_is_told_with_its_flag() -> None:
    large = 2**63
    given = [("a", None, COUNT), ("b", 0, COUNT), ("c", large - 1, COUNT), ("d", large, COUNT), ("e", 2e9, SECONDS)]
    assert list(out_of_bounds(given)) == [
        "--b must be at least 1, got 0",
        f"--d must be below {large}, got {large}",
        "--e must be at least 0 and at most 1,000,000,000, got 2000000000.0",
    ]
