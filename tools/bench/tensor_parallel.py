"""What a rank of a tensor-parallel group saves: activations kept for backward, matrix products, time of a step.

    python tools/bench/tensor_parallel.py [--degrees 2 4] [--operators share:64 rotate:8] [--hidden 1024] [--layers 2]
        [--tokens 2048] [--repeats 5]

Every figure is divided by that of one rank with the same rows of the batch. Ranks are processes over gloo, with one
thread each; their time is CPU time, of which other processes take none, and the busiest rank's. Activations are those
that autograd keeps within attention and MLP (the blocks that are split), each storage once, without weights and
matrices M; products are those of the whole model but the head. A step is forward, backward and AdamW under ZeRO-3.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a bare checkout, not installed

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import frozen_buffers, inject
from mora_ds.adapters.tp_plan import plan_of
from mora_ds.config.adapter import SEGMENTS
from mora_ds.engine.initialize import initialize
from mora_ds.runtime import cli
from tools.bench.measuring import SavedActivations, llama_config, on_processes, zero3_config
from tools.bench.report import Report, json_flag

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
    """Of CPU time."""


def new_model(work: Work) -> Any:
    torch.manual_seed(0)
    config = llama_config(work.hidden, work.layers, VOCABULARY, SEQ_LEN, heads=work.hidden // HEAD_DIM)
    model = AutoModelForCausalLM.from_config(config)
    inject(model, MoRAConfig(rank=work.rank, operator=work.operator, segments=work.segments, compute=work.compute))
    return model.train()


def measure(work: Work) -> Found:
    """On this rank of `work.degree`."""
    model = new_model(work)
    blocks = [model.get_submodule(name) for name in plan_of(model, 1).blocks]
    rows = work.tokens // SEQ_LEN
    config = zero3_config(rows)
    engine, *_ = initialize(model=model, config=config, tensor_parallel_size=work.degree)
    ids = torch.randint(VOCABULARY, (rows, SEQ_LEN), generator=torch.Generator().manual_seed(1))

    def loss() -> Tensor:
        logits = engine(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def step() -> None:
        engine.backward(loss())
        engine.step()

    step()
    times = [cpu_seconds(step) for _ in range(work.repeats)]
    saved = SavedActivations([*frozen_buffers(model).values(), *model.parameters()])
    saved.counts = False
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: setattr(saved, "counts", True))
        block.register_forward_hook(lambda *_: setattr(saved, "counts", False))
    with FlopCounterMode(display=False) as counter, saved.counting():
        engine.backward(loss())
    head = 3 * 2 * work.tokens * work.hidden * VOCABULARY * 2 // 3  # forward, and the gradient of its input
    return Found(saved.nbytes, counter.get_total_flops() - head, min(times))


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of this process."""
    started = time.process_time()
    work()
    return time.process_time() - started


def on_ranks(work: Work) -> Found:
    """`measure` on every rank of a group; rank 0's findings, and the busiest one's time."""
    results = on_processes(work.degree, measure, work)
    return Found(results[0].saved_bytes, results[0].flops, max(found.step_s for found in results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--degrees", type=int, nargs="+", default=[2, 4], help="ranks of a group")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--operators", nargs="+", default=["share:64", "rotate:8"], metavar="OPERATOR:RANK")
    json_flag(parser)
    given = parser.parse_args()
    report = Report(given)
    report.say(f"Llama of {given.layers} layers, hidden {given.hidden}, {given.tokens} tokens; against one process")
    rows = [["operator, matrices", "t", "saved activations", "matrix products", "CPU time of a step"]]
    for operator, rank in (each.split(":") for each in given.operators):
        for name, segments in (("aligned", SEGMENTS), ("gathered", 0)):
            if segments and operator != "share":
                continue
            shape = (given.hidden, given.layers, given.tokens, given.repeats, operator, int(rank), segments)
            alone = on_ranks(Work(1, *shape))
            for degree in given.degrees:
                rows.append(
                    [f"{operator} r={rank}, {name}", str(degree), *ratios(on_ranks(Work(degree, *shape)), alone)]
                )
    report.show("tensor parallelism", rows)
    report.write()


def ratios(split: Found, alone: Found) -> list[str]:
    """Of saved activations, products and a step's time to those of one rank."""
    pairs = (split.saved_bytes, alone.saved_bytes), (split.flops, alone.flops), (split.step_s, alone.step_s)
    return [f"{mine / theirs:.3f}" for mine, theirs in pairs]


if __name__ == "__main__":
    cli.run(main)
