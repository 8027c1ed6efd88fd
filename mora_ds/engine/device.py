"""The device of this process, from DeepSpeed's accelerator, and where the base of a run is (--base_device)."""

from __future__ import annotations

import logging
import os
from enum import Enum

import torch
from deepspeed.accelerator import get_accelerator

logger = logging.getLogger(__name__)

DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple"}
"""Environment of a deterministic run, read when CUDA and NCCL start: one cuBLAS workspace for each stream (torch's
notes on reproducibility), and one order in which NCCL adds numbers up, whatever the size of a tensor."""


BUFFERS = 2
"""Decoder layers whose weights are on the device: one computes while another one is copied."""


class BaseDevice(str, Enum):
    """Where the frozen weights of the decoder layers are."""

    AUTO = "auto"
    DEVICE = "device"
    HOST = "host"


def make_deterministic() -> None:
    """Let torch, cuBLAS and NCCL give the same bits each time. To be called before anything runs on a device; values
    that the environment has already stay."""
    for name, value in DETERMINISTIC.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all of it is written first


def warn_of_slow_precision(dtype: str) -> None:
    """Log a warning where a GPU is to compute in fp32 without TF32, about ten times slower than in bf16."""
    if dtype == "float32" and not is_cpu() and torch.get_float32_matmul_precision() == "highest":
        logger.warning(
            "the run computes in fp32, on a GPU about ten times slower than with --bf16, "
            "which keeps the master copies in fp32, too"
        )


def current_device() -> torch.device:
    """The device of this process, once `start_distributed` has chosen it."""
    return torch.device(get_accelerator().current_device_name())


def is_cpu() -> bool:
    """Whether the processes compute on the CPU."""
    return bool(get_accelerator().device_name() == "cpu")


def memory_bytes() -> float:
    """The total memory of this process's device; on a CPU, of the machine."""
    if is_cpu():
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return float(get_accelerator().total_memory())
