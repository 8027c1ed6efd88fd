"""Compiled functions return what eager ones return; a missing compiler is reported before anything is compiled."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch

from mora_ds.adapters.ops import gather
from mora_ds.adapters.ops.gather import check_compiler, compile_with
from mora_ds.adapters.ops.linear import Compute
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from mora_ds.common.errors import UserError
from tests.helpers.operators import by_definition, by_path, outputs_and_gradients

SPECS = [
    OperatorSpec(OperatorKind.SHARE, 12, 12, 6, Grouping.PERMUTED, seed=3),
    OperatorSpec(OperatorKind.SHARE, 13, 20, 6, Grouping.PERMUTED, seed=3),
    OperatorSpec(OperatorKind.ROTATE, 20, 9, 6, Grouping.PERMUTED, seed=3),
]


@pytest.fixture(autouse=True)
def _eager_again() -> Iterator[None]:
    yield
    compile_with(None)


def compare(backend: str, specs: list[OperatorSpec]) -> None:
    """Both paths in both precisions against base + delta."""
    expected = [outputs_and_gradients(spec, torch.float64, by_definition(spec)) for spec in specs]
    compile_with(backend)
    for spec, right in zip(specs, expected, strict=True):
        for path in (Compute.ACTIVATION, Compute.WEIGHT):
            for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 8 * torch.finfo(torch.bfloat16).eps)):
                for one, other in zip(outputs_and_gradients(spec, dtype, by_path(spec, path)), right, strict=True):
                    assert (one - other).norm() <= tolerance * other.norm()


def test_compiled_functions_return_what_eager_ones_return() -> None:
    compare("aot_eager", SPECS)


@pytest.mark.heavy
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_returns_what_eager_functions_return() -> None:
    compare("inductor", SPECS[1:2])


def test_a_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"--compile needs .* install no-such-compiler"):
        check_compiler("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no-such-compiler"):
        check_compiler()
    monkeypatch.setenv("CXX", "true")
    check_compiler("cpu")
    monkeypatch.setattr(gather, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--compile needs triton on this device"):
        check_compiler("cuda")
