"""What a rank of a tensor-parallel group saves: activations kept for backward, matrix products, time of a step.

    python tools/bench/tensor_parallel.py [--degree 2] [--hidden 1024] [--layers 2] [--tokens 2048] [--repeats 5]

Every figure is divided by that of one rank with the same rows of the batch. Ranks are processes over gloo, with one
thread and, where there are enough, one core each. Activations are those that autograd keeps within attention and MLP
(the blocks that are split), each storage once, without weights and squares; products are those of the whole model but
the head. A step is forward, backward and AdamW under ZeRO-3.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a bare checkout, not installed

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import frozen_buffers, inject
from mora_ds.adapters.tp_plan import plan_of
from mora_ds.engine.initialize import initialize, start_distributed
from mora_ds.errors import RunError
from mora_ds.runtime import cli

SEQ_LEN, HEAD_DIM, VOCABULARY = 512, 64, 512


@dataclass(frozen=True)
class Work:
    """One configuration. The group computes `tokens` together, whatever its size."""

    degree: int
    hidden: int
    layers: int
    tokens: int
    repeats: int
    operator: str
    rank: int
    segments: int
    compute: str = "auto"


@dataclass(frozen=True)
class Found:
    """Of one rank."""

    saved_bytes: int
    flops: int
    step_s: float


class KeptWithin:
    """Bytes that autograd keeps while one of `blocks` computes, each storage once, without those of `leave_out`."""

    def __init__(self, blocks: list[nn.Module], leave_out: list[Tensor]) -> None:
        self._left_out = {tensor.untyped_storage().data_ptr() for tensor in leave_out}
        self._sizes: dict[int, int] = {}
        self._kept: list[Tensor] = []
        self._inside = 0
        for block in blocks:
            block.register_forward_pre_hook(lambda *anything: self._step(1))
            block.register_forward_hook(lambda *anything: self._step(-1))

    def _step(self, change: int) -> None:
        self._inside += change

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if self._inside and storage.data_ptr() not in self._left_out:
            self._sizes[storage.data_ptr()] = storage.nbytes()
            self._kept.append(tensor)  # alive, so that no address comes twice
        return tensor

    @property
    def nbytes(self) -> int:
        return sum(self._sizes.values())


def new_model(work: Work) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=work.hidden, intermediate_size=11 * work.hidden // 4, num_hidden_layers=work.layers,
        num_attention_heads=work.hidden // HEAD_DIM, vocab_size=VOCABULARY, max_position_embeddings=SEQ_LEN,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    inject(model, MoRAConfig(rank=work.rank, operator=work.operator, segments=work.segments, compute=work.compute))
    return model.train()


def measure(work: Work) -> Found:
    """On this rank of `work.degree`."""
    start_distributed()
    model = new_model(work)
    blocks = [model.get_submodule(name) for name in plan_of(model, 1).blocks]
    rows = work.tokens // SEQ_LEN
    config = {
        "train_micro_batch_size_per_gpu": rows,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    }
    engine, *_ = initialize(model=model, config=config, tensor_parallel_size=work.degree)
    ids = torch.randint(VOCABULARY, (rows, SEQ_LEN), generator=torch.Generator().manual_seed(1))

    def loss() -> Tensor:
        logits = engine(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def step() -> None:
        engine.backward(loss())
        engine.step()

    step()
    times = [_timed(step) for _ in range(work.repeats)]
    kept = KeptWithin(blocks, [*frozen_buffers(model).values(), *model.parameters()])
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x):
        engine.backward(loss())
    head = 3 * 2 * work.tokens * work.hidden * VOCABULARY * 2 // 3  # forward, and the gradient of its input
    return Found(kept.nbytes, counter.get_total_flops() - head, min(times))


def _timed(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


# -- ranks -----------------------------------------------------------------------------------------------------------


def on_ranks(work: Work) -> Found:
    """`measure` on every rank of a group; rank 0's findings, and the slowest one's time."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_rank, args=(rank, port, work, queue)) for rank in range(work.degree)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=1800) for _ in processes)
    for process in processes:
        process.join(10)
        process.kill()
    if failed := [text for text in results.values() if isinstance(text, str)]:
        raise RunError(failed[0])
    first = results[0]
    return Found(first.saved_bytes, first.flops, max(found.step_s for found in results.values()))


def _rank(rank: int, port: int, work: Work, queue: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(work.degree), LOCAL_SIZE=str(work.degree),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= work.degree:
        os.sched_setaffinity(0, {cores[rank]})
    try:
        queue.put((rank, measure(work)))
    except Exception as error:
        queue.put((rank, f"rank {rank}: {error!r}"))
    queue.close()
    queue.join_thread()
    os._exit(0)  # gloo's threads may abort at interpreter exit, after right results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--degree", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--operator", default="share")
    parser.add_argument("--mora_rank", type=int, default=64)
    parser.add_argument("--tp_segments", type=int, default=8)
    given = parser.parse_args()
    shape = (given.hidden, given.layers, given.tokens, given.repeats, given.operator, given.mora_rank)
    ways = {"squares gathered": 0}
    if given.operator == "share":
        ways["squares aligned"] = given.tp_segments
    print(
        f"Llama of {given.layers} layers, hidden {given.hidden}, {given.tokens} tokens, {given.operator}, rank "
        f"{given.mora_rank}; t = {given.degree} against t = 1"
    )
    print(f"{'':<20} {'kept activations':>24} {'matrix products':>24} {'step':>24}")
    for name, segments in ways.items():
        alone, split = (on_ranks(Work(degree, *shape, segments)) for degree in (1, given.degree))
        columns = [
            (split.saved_bytes / 2**20, alone.saved_bytes / 2**20, "MiB"),
            (split.flops / 1e9, alone.flops / 1e9, "GFLOP"),
            (split.step_s, alone.step_s, "s"),
        ]
        cells = [f"{mine:,.2f} / {theirs:,.2f} {unit} = {mine / theirs:.3f}" for mine, theirs, unit in columns]
        print(f"{name:<20} " + " ".join(f"{cell:>28}" for cell in cells), flush=True)


if __name__ == "__main__":
    cli.run(main)
