"""What a step costs the host under ZeRO 1 and ZeRO-3: CPU time of one thread, without the collectives.

    python tools/bench/host.py [--layers 16] [--operator rotate] [--steps 25] [--json FILE]

One process is rank 0 of two (`one_rank`), so that only this rank's own work is on the clock. ZeRO 1, ZeRO-3 with
matrices that persist and ZeRO-3 with matrices that are gathered take a step in turn: medians, and ratios to ZeRO 1. A
GPU computes while its host works: what ZeRO-3 takes longer is lost only where the host is the slower one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a bare checkout, not installed

import torch
from transformers import AutoModelForCausalLM

from mora_ds import MoRAConfig, initialize, inject
from mora_ds.engine import module_hooks
from mora_ds.runtime import cli
from tools.bench.measuring import llama_config
from tools.bench.one_rank import OneRank
from tools.bench.report import Report, json_flag

WIDTH, VOCABULARY, TOKENS, FIRST = 64, 64, 32, 4
"""Sizes of the model and of a batch, and steps that are not counted: DeepSpeed traces the model in the first ones."""
BY_MODULE = "ZeRO-3, gathered by module"
ENGINES = {
    "ZeRO 1": {"stage": 1},
    "ZeRO-3, persistent": {"stage": 3, "stage3_param_persistence_threshold": 10**9},
    "ZeRO-3, gathered by decoder layer": {"stage": 3, "stage3_param_persistence_threshold": 0},
    BY_MODULE: {"stage": 3, "stage3_param_persistence_threshold": 0},
}
"""The last is what models without decoder layers have, and what all had up to 0.2."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--layers", type=int, default=16, help="decoder layers")
    parser.add_argument("--operator", default="rotate", help="of the MoRA matrices")
    parser.add_argument("--steps", type=int, default=25, help="of each engine")
    json_flag(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(options)
    with tempfile.TemporaryDirectory() as folder:
        rank = OneRank(0, 2, Path(folder))
        engines = {name: _engine(options, name) for name in ENGINES}
        taken: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(FIRST + options.steps):
            for name, engine in engines.items():
                taken[name].append(_step(rank, engine))
    times = {name: median(seconds[FIRST:]) for name, seconds in taken.items()}
    least = times["ZeRO 1"]
    rows = [[name, f"{1e3 * seconds:.2f}", f"{seconds / least:.2f}"] for name, seconds in times.items()]
    report.show("host", [["engine", "ms a step", "to ZeRO 1"], *rows])
    report.write()


def _engine(options: argparse.Namespace, name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama_config(WIDTH, options.layers, VOCABULARY, TOKENS))
    inject(model, MoRAConfig(rank=4, operator=options.operator, compute="activation"))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": dict(ENGINES[name]),
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    }
    without: Any = patch.object(module_hooks, "find_decoder_layers", lambda model: {})
    with without if name == BY_MODULE else nullcontext():
        return initialize(model=model, config=config, check_base=False, node_base="private")[0]


def _step(rank: OneRank, engine: Any) -> float:
    """CPU seconds of this process, which has one thread."""
    ids = torch.arange(TOKENS)[None] % VOCABULARY
    with rank.phase() as spent:
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()
    return spent.cpu_s


if __name__ == "__main__":
    cli.run(main)
