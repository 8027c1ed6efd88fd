"""Machine code of a kernel without a GPU: what triton compiles for a launch, and what is in it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import triton
import triton.backends.nvidia
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mora_ds.adapters.kernels.triton_ops import Launch

_TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32",
    torch.int8: "i8",
}  # fmt: skip

_CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Code:
    """PTX, and what the assembler says of the machine code."""

    ptx: str
    registers: int
    stack: int
    """Bytes of local memory of a thread: 0 unless registers were spilled."""
    local: int
    shared: int

    def loads(self, bits: int) -> int:
        """Loads from global memory of so many bits a thread, to registers or, of 128 bits, to shared memory."""
        sizes = {f".v{count}.b{width}": count * width for count in (1, 2, 4, 8) for width in (8, 16, 32, 64)}
        found = re.findall(r"ld\.global[\w.:]*?((?:\.v\d)?\.b\d+) ", self.ptx)
        to_shared = len(re.findall(r"cp\.async\.cg\.shared\.global", self.ptx)) if bits == 128 else 0
        return to_shared + sum(sizes.get(each if each.startswith(".v") else f".v1{each}") == bits for each in found)


def compile_launch(launch: Launch, capability: int) -> Code:
    """Compiles what `launch` would start on a GPU of compute capability 80 or 90, with triton's own specialisation:
    pointers and integers that 16 divides, and integers that are 1. `launch` may be made of meta tensors."""
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes = {}
    for number, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants.setdefault(name, value)
        else:
            signature[name] = f"*{_TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or value % 16 == 0:
                attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [_CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Code(compiled.asm["ptx"], numbers["REG"], numbers["STACK"], numbers["LOCAL"], compiled.metadata.shared)
