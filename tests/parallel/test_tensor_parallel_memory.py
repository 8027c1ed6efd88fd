"""What a process saves and multiplies falls as 1/t, where the plan splits: measured by the benchmark's own counters."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.gloo import run_ranks

pytestmark = pytest.mark.gloo

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench" / "tensor_parallel.py"
SHAPES: dict[str, dict[str, Any]] = {
    "gathered": {"operator": "share", "rank": 8, "segments": 0},  # folded inputs are the smaller
    "aligned": {"operator": "share", "rank": 64, "segments": 8},  # the shared input is
    "rotate": {"operator": "rotate", "rank": 8, "segments": 0, "compute": "weight"},
    "rotate, activations": {"operator": "rotate", "rank": 8, "segments": 0, "compute": "activation"},
}


def measured(degree: int) -> dict[str, tuple[int, int]]:
    """(bytes saved for backward, operations) of this process, by the way its updates are computed."""
    import sys

    spec = spec_from_file_location("bench_tensor_parallel", TOOL)
    assert spec is not None and spec.loader is not None
    tool = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(tool)
    size = {"degree": degree, "hidden": 256, "layers": 1, "tokens": 512, "repeats": 1}
    found = {name: tool.measure(tool.Work(**size, **shape)) for name, shape in SHAPES.items()}
    return {name: (one.saved_bytes, one.flops) for name, one in found.items()}


def test_kept_activations_and_products_fall_with_the_degree() -> None:
    (alone,), ranks = run_ranks(1, measured, 1), run_ranks(2, measured, 2)
    for found in ranks:
        for name, (kept, flops) in found.items():
            assert kept <= 0.53 * alone[name][0], (name, kept / alone[name][0])
            # gathered matrices over activations: each process multiplies by all rows of M, for its part of the outputs
            most = 0.505 if name in ("aligned", "rotate") else 0.80
            assert flops <= most * alone[name][1], (name, flops / alone[name][1])
