"""The device of this process, from DeepSpeed's accelerator."""

from __future__ import annotations

import os

import torch
from deepspeed.accelerator import get_accelerator


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
