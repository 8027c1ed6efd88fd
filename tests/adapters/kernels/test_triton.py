"""The Triton kernels without a GPU: results in triton's interpreter, and machine code from
its compiler.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mora_ds.adapters.kernels import triton_ops
from mora_ds.adapters.ops.index_tables import OPERATORS
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from tests.helpers.operators import specs
from tests.helpers.pairwise import pairwise
from tests.helpers.tools import called
from tests.helpers.traffic import SHAPES, launches
from tests.helpers.triton_code import compile_launch

ROOT = Path(__file__).resolve().parents[3]

SLICES = 4
SHORT = 40
"""The default tests try one of this many operators."""

REGISTERS = 65536
"""Registers of a multiprocessor, sm_80 and sm_90."""


# -- results ---------------------------------------------------------------------------


def interpret(start, step, interpreted="1"):
    """Runs a slice of the operators in the interpreter, with "0" on a GPU; how many they
    were.
    """
    environment = {
        **os.environ,
        "TRITON_INTERPRET": interpreted,
        "OMP_NUM_THREADS": "1",
    }
    module = [sys.executable, "-W", "ignore", "-m", "tests.helpers.interpreted"]
    done = called([*module, str(start), str(step)], cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return len(done.stdout.splitlines())


def test_kernels_return_what_plain_torch_returns():
    assert interpret(SHORT // 2, SHORT) == len(list(specs())[SHORT // 2 :: SHORT])


@pytest.mark.heavy
@pytest.mark.parametrize("start", range(SLICES))
def test_every_operator_grouping_and_shape(start):
    assert interpret(start, SLICES) == len(list(specs())[start::SLICES])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_return_on_a_gpu_what_plain_torch_returns_on_a_cpu():
    assert interpret(0, 1, interpreted="0") == len(list(specs()))


# -- machine code ----------------------------------------------------------------------


def check_code(name, launch, capability):
    code = compile_launch(launch, capability)
    threads = 32 * launch.options["num_warps"]
    assert code.stack == code.local == 0, f"{name} spills registers: {code.stack} bytes"
    assert threads * code.registers <= REGISTERS, (
        f"{name}: {code.registers} registers of {threads} threads"
    )
    assert code.shared <= 99 * 1024, f"{name}: {code.shared} bytes of shared memory"
    assert code.loads(128) > 0, f"{name} reads no 128 bits at once"
    if name == "product":
        instruction = "wgmma.mma_async" if capability == 90 else "mma.sync"
        assert instruction in code.ptx, f"{name} does not use the tensor cores"
    elif name != "effective_weight" or launch.kernel is not triton_ops._form_blocks:
        assert code.loads(8) == code.loads(16) == 0, (
            f"{name} reads single numbers from global memory"
        )


@pytest.fixture(scope="module", autouse=True)
def _no_cache_at_home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


SHARE = OperatorSpec(OperatorKind.SHARE, 4096, 11008, 1936, Grouping.PERMUTED, seed=1)
ROTATE = OperatorSpec(OperatorKind.ROTATE, 11008, 4096, 336, Grouping.PERMUTED, seed=1)
"""Layers of a 7B Llama's MLP at ranks 256 and 8."""


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "spec, name",
    [
        (ROTATE, "fold"),
        (ROTATE, "unfold"),
        (ROTATE, "effective_weight"),
        (SHARE, "effective_weight"),
        (SHARE, "product"),
    ],
    ids=["rotate-fold", "rotate-unfold", "rotate-form", "share-form", "product"],
)
def test_machine_code(spec, name, capability):
    check_code(name, launches(spec, torch.bfloat16)[name], capability)


@pytest.mark.heavy
@pairwise({"kind": list(OperatorKind), "shape": SHAPES[:5], "capability": [80, 90]})
def test_machine_code_of_every_operator(kind, shape, capability):
    side = 272 if OPERATORS[kind].in_blocks else 1440
    spec = OperatorSpec(kind, *shape, side, Grouping.PERMUTED, seed=1)
    for name, launch in launches(spec, torch.bfloat16).items():
        check_code(name, launch, capability)
    check_code(
        "effective_weight",
        launches(spec, torch.bfloat16, int8=True)["effective_weight"],
        capability,
    )


def test_a_spill_and_scattered_loads_are_noticed():
    """The checks above fail for a kernel that holds too much, and for one that gathers from
    global memory.
    """
    fold = launches(ROTATE, torch.bfloat16)["fold"]
    with pytest.raises(AssertionError, match="single numbers"):
        check_code(
            "fold", replace(fold, constants={**fold.constants, "SHARED": False}), 90
        )
    unfold = launches(ROTATE, torch.bfloat16)["unfold"]
    with pytest.raises(AssertionError, match="spills"):
        check_code(
            "unfold", replace(unfold, constants={**unfold.constants, "UNIT": 1}), 90
        )
