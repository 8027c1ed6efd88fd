"""The heavy tests dealt out into slices, of which `.ci/run` takes one for each commit."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

LONG_TESTS_S = {
    "tests/train/test_long_haul.py::test_long_haul": 600,
    "tests/runtime/test_restart.py::test_a_job_that_is_killed_and_stopped_finishes_as_if_nothing_had_been": 120,
    "tests/commands/test_wheel.py::test_the_demo": 180,
    "tests/deploy/test_vllm.py": 150,
    "tests/train/test_two_nodes.py": 60,
    "tests/tools/test_bench_memorization.py": 60,
    "tests/tools/test_bench_node_base.py": 60,
    "tests/parallel/test_tensor_parallel.py": 60,
}
"""Seconds on two cores of tests that take about a minute or more, by the beginning of their names."""


def deal(tests: Iterable[str], slices: int) -> dict[str, int]:
    """Test -> its slice, from 0 to `slices` - 1.

    Long tests go to the slice with the least long ones so far, the others where a hash of their name puts them: a test
    that is added moves no other one, so that as many commits in a row as there are slices run them all.
    """
    dealt, load = {}, [0] * slices
    for test in sorted(tests):
        dealt[test] = zlib.crc32(test.encode()) % slices
    long = [(seconds, test) for test in dealt for name, seconds in LONG_TESTS_S.items() if test.startswith(name)]
    for seconds, test in sorted(long, reverse=True):
        dealt[test] = min(range(slices), key=load.__getitem__)
        load[dealt[test]] += seconds
    return dealt


def slice_of(text: str) -> tuple[int, int]:
    """(number, number of slices) of "K/N". Raises `ValueError` for anything else."""
    number, slices = map(int, text.split("/"))
    if not 0 <= number < slices:
        raise ValueError(f"--heavy-slice {text}: K/N with 0 <= K < N")
    return number, slices
