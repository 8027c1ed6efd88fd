"""What the benchmarks share: a Llama of random weights, processes over gloo, clocks,
memory, saved activations.
"""

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from transformers import LlamaConfig

from mora_ds.engine.initialize import start_distributed

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""


def llama_config(
    width: int,
    layers: int,
    vocabulary: int,
    positions: int,
    mlp: int = 0,
    heads: int = 0,
    kv_heads: int = 0,
) -> LlamaConfig:
    """`mlp`: width of the MLP, 11/4 of `width` by default. `heads`: of 64 numbers each by
    default.
    """
    heads = heads or max(1, width // 64)
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp or 11 * width // 4, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads or heads, max_position_embeddings=positions,
    )  # fmt: skip


def zero3_config(rows: int, **changes: Any) -> dict[str, Any]:
    """DeepSpeed's settings: ZeRO-3 and AdamW, `rows` sequences per process and
    micro-batch.
    """
    config = {
        "train_micro_batch_size_per_gpu": rows,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    }
    return {**config, **changes}


# -- processes ---------------------------------------------------------------------------------------------------------


def only_rank() -> dict[str, str]:
    """The environment variables that a launcher sets for a job of one process; port 0 is
    any that is free.
    """
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }


def _free_port() -> str:
    """One below those that Linux gives to outgoing connections, one of which could take it
    before the store listens.
    """
    while True:
        with socket.socket() as server, contextlib.suppress(OSError):
            port = 10_000 + secrets.randbelow(20_000)
            server.bind(("", port))
            return str(port)


def on_processes(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` in `world` new processes that talk over gloo, with one thread
    each; results by rank.

    Each has a core of its own where there are enough. Raises `ProcessRaisedException` where
    one of them fails.
    """
    port = _free_port()
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_process, (world, port, function, arguments, results), nprocs=world)
    return [
        result
        for _, result in sorted(
            (results.get() for _ in range(world)), key=lambda pair: pair[0]
        )
    ]


def _process(
    rank: int,
    world: int,
    port: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    results: Any,
) -> None:
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world}
    os.environ.update(
        {name: str(value) for name, value in launched.items()},
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
    )
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= world:
        os.sched_setaffinity(0, {cores[rank]})
    start_distributed()
    results.put((rank, function(*arguments)))
    dist.barrier()
    os._exit(0)  # gloo's threads often abort at interpreter exit, after right results


# -- time and memory ---------------------------------------------------------------------------------------------------
def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds, after all work so far: for one thread of a CPU its own time, of which other
    processes take none.
    """
    if device.type != "cuda":
        return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized


def memory_of(key: str, process: int | str = "self") -> int:
    """Bytes by a key of /proc/PID/status, such as VmRSS or RssAnon (memory that no file
    backs), or Pss.

    0 where the process has ended.
    """
    file = "smaps_rollup" if key == "Pss" else "status"
    try:
        lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0
    )


@contextlib.contextmanager
def saved_activations(*left_out: Tensor) -> Iterator[dict[int, Tensor]]:
    """Within it autograd's saved tensors are collected, one of each storage, without those
    of `left_out`.
    """
    addresses = {tensor.untyped_storage().data_ptr() for tensor in left_out}
    saved: dict[int, Tensor] = {}

    def see(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in addresses:
            saved.setdefault(address, tensor)  # kept alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        yield saved
