"""The device of this process, from DeepSpeed's accelerator."""

import logging
import os
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import psutil
import torch
from deepspeed.accelerator import get_accelerator

from mora_ds.common.errors import UserError

logger = logging.getLogger(__name__)

DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NCCL_PROTO": "Simple",
}
"""Environment of a deterministic run, read when CUDA and NCCL start: one cuBLAS
workspace per stream (torch's notes on reproducibility), and an order of NCCL's sums that
does not depend on the size of a tensor."""


BUFFERS = 2
"""Decoder layers on the device: one computes while another one is copied."""


def take_device(local_rank: int) -> None:
    """Set the device of this process. Call before anything is placed on a device.
    Raises `UserError` if the process does not see the GPU of its rank."""
    accelerator = get_accelerator()
    if not is_cpu():
        count = accelerator.device_count()
        if local_rank >= count:
            raise UserError(
                f"LOCAL_RANK is {local_rank}, and this process sees {count} GPUs: every process of a node must see all "
                "of its GPUs (Slurm: --gpus-per-node, without --gpus-per-task and --gpu-bind)"
            )
    accelerator.set_device(local_rank)


def check_kernels() -> None:
    """Raise `UserError` if this process uses a GPU and triton finds no C compiler or
    Python header, which it needs to compile the launcher of its first kernel."""
    if not is_cpu() and find_spec("triton") is not None:
        check_compiler()


def check_compiler() -> None:
    """Raise `UserError` if triton cannot compile."""
    scheme = sysconfig.get_default_scheme()
    if scheme == "posix_local":
        # Debian's scheme for pip; triton uses the headers of the system
        # (triton/runtime/build.py)
        scheme = "posix_prefix"
    header = Path(sysconfig.get_paths(scheme)["include"]) / "Python.h"
    if not (os.environ.get("CC") or which("gcc") or which("clang")):
        raise UserError(
            "the GPU's kernels (triton) need a C compiler: install gcc, or set the environment variable CC"
        )
    if not header.is_file():
        raise UserError(
            f"the GPU's kernels (triton) need {header}: install python3-dev, or the package that has this file"
        )


def make_deterministic() -> None:
    """Make torch, cuBLAS and NCCL deterministic. Call before anything runs on a device.
    Does not override variables that are already set."""
    for name, value in DETERMINISTIC.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # never read before written


def warn_of_slow_precision(dtype: torch.dtype) -> None:
    """Log a warning if a GPU computes in fp32 without TF32."""
    has_tf32 = torch.get_float32_matmul_precision() != "highest"
    if dtype == torch.float32 and not has_tf32 and not is_cpu():
        logger.warning(
            "the run computes in fp32, which is about ten times slower on a GPU than --bf16; "
            "--bf16 also keeps fp32 master weights"
        )


def current_device() -> torch.device:
    """The device of this process, after `start_distributed`."""
    return torch.device(get_accelerator().current_device_name())


def is_cpu() -> bool:
    """Whether DeepSpeed's accelerator is the CPU."""
    return get_accelerator().device_name() == "cpu"


def card_name() -> str:
    """The name of this process's GPU; "" on a CPU."""
    return "" if is_cpu() else torch.cuda.get_device_name()


def memory_bytes() -> float:
    """Total memory of this process's device, in bytes; on a CPU, of the machine."""
    if is_cpu():
        return psutil.virtual_memory().total
    return get_accelerator().total_memory()
