"""Machines on which one path of a layer is quicker, for tests of the timed choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mora_ds.adapters.ops.linear import Compute
from mora_ds.adapters.path_times import Case, paths_of


def always(quick: Compute) -> Callable[..., Any]:
    """`time_paths` of a machine on which one path is quicker."""

    def timed(case: Case, rounds: Callable[[float], int], paths: object = None) -> dict[Compute, list[float]]:
        return {path: [1.0 if path is quick else 2.0] * rounds(1.0) for path in paths_of(case.layer)}

    return timed
