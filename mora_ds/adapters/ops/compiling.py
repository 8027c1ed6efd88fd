"""`--compile`: the operators' moves by torch.compile, where this machine can."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

import torch

from mora_ds.adapters.ops.gather import compile_moves
from mora_ds.errors import UserError

FLAG = "--compile"


def compile_operators() -> None:
    """Gathers, sums of groups and W0 + delta of all layers of this process each become one compiled pass. The first
    steps compile."""
    compile_moves("inductor")


def check_compiler(device_type: str | None = None) -> None:
    """torch's inductor writes C++ for a CPU and Triton for a GPU. Raises `UserError` where what compiles it is missing.

    `device_type`: default, that of this machine.
    """
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if device_type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise UserError(f"{FLAG} needs a C++ compiler on a CPU: install {compiler}, or leave the flag out")
    elif find_spec("triton") is None:
        raise UserError(f"{FLAG} needs triton on this device: install it, or leave the flag out")
