"""What the benchmarks share: a Llama of random weights, settings, a clock."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig


def llama_config(
    width: int,
    layers: int,
    vocabulary: int,
    positions: int,
    mlp: int = 0,
    heads: int = 0,
    kv_heads: int = 0,
) -> LlamaConfig:
    """By default the MLP is 11/4 as wide, and heads have 64 numbers each."""
    heads = heads or max(1, width // 64)
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp or 11 * width // 4, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads or heads, max_position_embeddings=positions,
    )  # fmt: skip


def zero3_config(rows: int, **changes: Any) -> dict[str, Any]:
    """DeepSpeed's settings: ZeRO-3, AdamW, `rows` sequences a process and
    micro-batch."""
    config = {
        "train_micro_batch_size_per_gpu": rows,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    }
    return {**config, **changes}


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [value for value in model.parameters() if value.requires_grad]


def count_trained(model: nn.Module) -> int:
    """The number of trained parameters. To be asked before ZeRO-3 takes them apart."""
    return sum(value.numel() for value in trained_parameters(model))


def cpu_seconds(work: Callable[[], object]) -> float:
    """Those of all threads of this process while `work` runs."""
    began = time.process_time()
    work()
    return time.process_time() - began


def adamw_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A training step without DeepSpeed."""
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-4)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def only_rank() -> dict[str, str]:
    """The environment of a job of one process; port 0 is any that is free."""
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }


def clock(device: torch.device) -> Callable[[], float]:
    """A clock in seconds that waits for the GPU; one CPU thread's own time, if it is
    one."""
    if device.type != "cuda":
        return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized
