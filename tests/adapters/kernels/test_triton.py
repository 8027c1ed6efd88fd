"""The Triton kernels without a GPU: results in triton's interpreter, and machine code from its compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mora_ds.adapters.kernels import triton_ops
from mora_ds.adapters.kernels.tables import KernelTables
from mora_ds.adapters.kernels.triton_ops import Launch
from mora_ds.adapters.ops.index_tables import OPERATORS
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from tests.helpers.operators import specs
from tests.helpers.triton_code import compile_launch

ROOT = Path(__file__).resolve().parents[3]
META = torch.device("meta")

SLICES = 4
SHORT = 40
"""Of so many operators the default tests try one."""

TOKENS = 4096
PARTS = 8

REGISTERS = 65536
"""Of a multiprocessor, sm_80 and sm_90."""


# -- results ----------------------------------------------------------------------------------------------------------


def interpret(start: int, step: int, interpreted: str = "1") -> int:
    """Runs a slice of the operators in the interpreter, with "0" on a GPU; how many they were."""
    environment = {**os.environ, "TRITON_INTERPRET": interpreted, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.helpers.interpreted", str(start), str(step)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return len(done.stdout.splitlines())


def test_kernels_return_what_plain_torch_returns() -> None:
    assert interpret(SHORT // 2, SHORT) == len(list(specs())[SHORT // 2 :: SHORT])


@pytest.mark.heavy
@pytest.mark.parametrize("start", range(SLICES))
def test_every_operator_grouping_and_shape(start: int) -> None:
    assert interpret(start, SLICES) == len(list(specs())[start::SLICES])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_return_on_a_gpu_what_plain_torch_returns_on_a_cpu() -> None:
    assert interpret(0, 1, interpreted="0") == len(list(specs()))


# -- machine code -----------------------------------------------------------------------------------------------------


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def launches(spec: OperatorSpec, dtype: torch.dtype, int8: bool = False) -> dict[str, Launch]:
    """What one layer starts, by name."""
    tables = KernelTables(spec, META)
    rotation = tables.rotation
    side = spec.r_hat
    x = meta(TOKENS, spec.d_in, dtype=dtype)
    g = meta(TOKENS, spec.d_out, dtype=dtype)
    square = meta(side, side)
    square = meta(side, side, dtype=dtype)
    z = meta(TOKENS, tables.fold.shape[1], dtype=dtype)
    c = meta(TOKENS, tables.collect.shape[1], dtype=dtype)
    weight = meta(spec.d_out, spec.d_in, dtype=torch.int8 if int8 else dtype)
    scales = meta(spec.d_out, dtype=torch.float32) if int8 else None
    formed = meta(spec.d_out, spec.d_in, dtype=dtype)
    base = (formed, weight, scales, square, tables.unfold)
    plan = triton_ops.plan_gather_sum
    if tables.members is not None:
        form = triton_ops.plan_form_groups(*base, tables.members)
    else:
        form = triton_ops.plan_form_blocks(*base, tables.slots, *rotation, tables.blocks_out)
    partial_sums = meta(PARTS, side, side, dtype=torch.float32)
    return {
        "fold": plan(z, x, tables.fold, *rotation, False, add=False),
        "collect": plan(c, g, tables.collect, None, None, False, add=False),
        "spread": plan(g, z, tables.spread, None, None, False, add=False),
        "unfold": plan(x, z if spec.rotates else c, tables.unfold, *rotation, True, add=False),
        "add spread": plan(g, z, tables.spread, None, None, False, add=True),
        "form": form,
        "product": triton_ops.plan_product(partial_sums, c.view(TOKENS, -1, side), z.view(TOKENS, -1, side)),
        "sum_parts": triton_ops.plan_sum_parts(square, partial_sums),
    }


def check_code(name: str, launch: Launch, capability: int) -> None:
    code = compile_launch(launch, capability)
    threads = 32 * launch.options["num_warps"]
    assert code.stack == code.local == 0, f"{name} spills registers: {code.stack} bytes"
    assert threads * code.registers <= REGISTERS, f"{name}: {code.registers} registers of {threads} threads"
    assert code.shared <= 99 * 1024, f"{name}: {code.shared} bytes of shared memory"
    assert code.loads(128) > 0, f"{name} reads no 128 bits at once"
    if name == "product":
        instruction = "wgmma.mma_async" if capability == 90 else "mma.sync"
        assert instruction in code.ptx, f"{name} does not use the tensor cores"
    elif name != "form" or launch.kernel is not triton_ops._form_blocks:
        assert code.loads(8) == code.loads(16) == 0, f"{name} reads single numbers from global memory"


@pytest.fixture(scope="module", autouse=True)
def _no_cache_at_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


SHARE = OperatorSpec(OperatorKind.SHARE, 4096, 11008, 1936, Grouping.PERMUTED, seed=1)
ROTATE = OperatorSpec(OperatorKind.ROTATE, 11008, 4096, 336, Grouping.PERMUTED, seed=1)
"""Of a 7B Llama's MLP at ranks 256 and 8."""


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "spec, name", [(ROTATE, "fold"), (ROTATE, "unfold"), (ROTATE, "form"), (SHARE, "form"), (SHARE, "product")],
    ids=["rotate-fold", "rotate-unfold", "rotate-form", "share-form", "product"],
)  # fmt: skip
def test_machine_code(spec: OperatorSpec, name: str, capability: int) -> None:
    check_code(name, launches(spec, torch.bfloat16)[name], capability)


@pytest.mark.heavy
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11008), (11008, 4096), (8192, 28672)])
@pytest.mark.parametrize("kind", list(OperatorKind))
def test_machine_code_of_every_operator(kind: OperatorKind, shape: tuple[int, int], capability: int) -> None:
    side = 272 if OPERATORS[kind].in_blocks else 1440
    spec = OperatorSpec(kind, *shape, side, Grouping.PERMUTED, seed=1)
    for name, launch in launches(spec, torch.bfloat16).items():
        check_code(name, launch, capability)
    check_code("form", launches(spec, torch.bfloat16, int8=True)["form"], capability)


def test_a_spill_and_scattered_loads_are_noticed() -> None:
    """The checks above fail for a kernel that holds too much, and for one that gathers from global memory."""
    fold = launches(ROTATE, torch.bfloat16)["fold"]
    with pytest.raises(AssertionError, match="single numbers"):
        check_code("fold", replace(fold, constants={**fold.constants, "SHARED": False}), 90)
    unfold = launches(ROTATE, torch.bfloat16)["unfold"]
    with pytest.raises(AssertionError, match="spills"):
        check_code("unfold", replace(unfold, constants={**unfold.constants, "UNIT": 1}), 90)
