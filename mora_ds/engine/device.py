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
workspace for each stream (torch's notes on reproducibility), and one order in which
NCCL adds numbers up, whatever the size of a tensor."""


BUFFERS = 2
"""Decoder layers on the device: one computes while another one is copied."""


def take_device(local_rank: int) -> None:
    """Choose the device of this process, before anything is placed. Raises `UserError`
    where it does not see the GPU of its rank."""
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
    """Raise `UserError` where this process computes on a GPU and triton, in which the
    layers' kernels are written, would find no C compiler or no header: its first kernel
    compiles its launcher."""
    if not is_cpu() and find_spec("triton") is not None:
        check_compiler()


def check_compiler() -> None:
    """Raise `UserError` where triton could not compile."""
    scheme = sysconfig.get_default_scheme()
    if scheme == "posix_local":
        # Debian's scheme for what pip installs; triton takes the headers of the system
        # (triton/runtime/build.py)
        scheme = "posix_prefix"
    header = Path(sysconfig.get_paths(scheme)["include"]) / "Python.h"
    if not (os.environ.get("CC") or which("gcc") or which("clang")):
        raise UserError(
            "the GPU's kernels (triton) need a C compiler: install gcc, or name one by the variable CC"
        )
    if not header.is_file():
        raise UserError(
            f"the GPU's kernels (triton) need {header}: install python3-dev, or what brings it here"
        )


def make_deterministic() -> None:
    """Let torch, cuBLAS and NCCL give the same bits each time. To be called before
    anything runs on a device; values that the environment has already stay."""
    for name, value in DETERMINISTIC.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all of it is written first


def warn_of_slow_precision(dtype: str) -> None:
    """Log a warning where a GPU is to compute in fp32 without TF32."""
    has_tf32 = torch.get_float32_matmul_precision() != "highest"
    if dtype == "float32" and not has_tf32 and not is_cpu():
        logger.warning(
            "the run computes in fp32, on a GPU about ten times slower than with --bf16, "
            "which keeps the master copies in fp32, too"
        )


def current_device() -> torch.device:
    """The device of this process, once `start_distributed` has chosen it."""
    return torch.device(get_accelerator().current_device_name())


def is_cpu() -> bool:
    """Whether the processes compute on the CPU."""
    return get_accelerator().device_name() == "cpu"


def card_name() -> str:
    """The name of this process's GPU; "" on a CPU."""
    return "" if is_cpu() else torch.cuda.get_device_name()


def memory_bytes() -> float:
    """The total memory of this process's device; on a CPU, of the machine."""
    if is_cpu():
        return psutil.virtual_memory().total
    return get_accelerator().total_memory()
