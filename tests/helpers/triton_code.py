"""Machine code of a kernel without a GPU: what triton compiles for a launch, and what is in
it.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


@dataclass(frozen=True)
class _Device:
    """The driver that triton queries before it compiles, for a GPU that is not there
    (triton/runtime/jit.py, `JITFunction.run`)."""

    capability: int

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # compiled kernels are kept by device

    def get_current_stream(self, device):
        return 0


_CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin/cuobjdump"


@dataclass(frozen=True)
class Code:
    """PTX, and what the assembler says of the machine code."""

    ptx: str
    registers: int
    stack: int
    """Bytes of local memory of a thread: 0 unless registers were spilled."""
    local: int
    shared: int

    def loads(self, bits):
        """Loads of `bits` bits per thread from global memory, to registers or, for 128 bits,
        to shared memory.
        """
        sizes = {
            f".v{count}.b{width}": count * width
            for count in (1, 2, 4, 8)
            for width in (8, 16, 32, 64)
        }
        kinds = re.findall(r"ld\.global[\w.:]*?((?:\.v\d)?\.b\d+) ", self.ptx)
        to_shared = (
            len(re.findall(r"cp\.async\.cg\.shared\.global", self.ptx))
            if bits == 128
            else 0
        )
        return to_shared + sum(
            sizes.get(kind if kind.startswith(".v") else f".v1{kind}") == bits
            for kind in kinds
        )


def compile_launch(launch, capability):
    """Compiles what `launch` would start on a GPU of compute capability 80 or 90, by the
    code that would start it, with its checks of arguments and its specializations. `launch`
    may be made of meta tensors."""
    # `reset_active` would look for a GPU
    with patch.object(driver, "_active", _Device(capability)):
        compiled = launch.kernel.warmup(
            **launch.arguments, **launch.constants, **launch.options, grid=launch.grid
        )
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [_CUOBJDUMP, "--dump-resource-usage", cubin],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    numbers = {
        key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)
    }
    return Code(
        compiled.asm["ptx"],
        numbers["REG"],
        numbers["STACK"],
        numbers["LOCAL"],
        compiled.metadata.shared,
    )
