"""The slices of the heavy tests: together they are all of them, and none is much longer than another."""

from __future__ import annotations

import pytest

from tests.helpers.slices import LONG_TESTS_S, deal, slice_of

LONG = list(LONG_TESTS_S)
TESTS = [f"tests/train/test_kill.py::test_killed[{number}]" for number in range(400)]


def test_long_tests_are_spread_and_the_others_stay_where_they_are() -> None:
    dealt = deal([*TESTS, *LONG], 10)
    assert set(dealt) == {*TESTS, *LONG} and set(dealt.values()) == set(range(10))
    assert len({dealt[name] for name in LONG}) == len(LONG)
    counts = [list(dealt.values()).count(number) for number in range(10)]
    assert max(counts) < 60 and min(counts) > 20
    more = deal([*TESTS, *LONG, "tests/new.py::test_new"], 10)
    assert {name: more[name] for name in dealt} == dealt


@pytest.mark.parametrize("text", ["10/10", "-1/10", "1", "a/b", "1/2/3"])
def test_what_is_no_slice_is_refused(text: str) -> None:
    assert slice_of("3/10") == (3, 10)
    with pytest.raises(ValueError):
        slice_of(text)
