"""How long a checkpoint stops training: written at once, and in the background (`--async_save`).

    python tools/bench_save.py --width 1024 --layers 16 --folder /tmp/bench

One process, one engine under ZeRO-3 on a CPU (two ranks of a node share its disk, and add up). For each way: seconds
that `save` took, of the write after it, and of a training step with and without a write beside it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout, not installed

import torch

import mora_ds
from mora_ds import cli


class Stack(torch.nn.Module):
    """Linear layers, one behind the other, called as Hugging Face's models are."""

    base_model_prefix = ""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.width = width
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        del use_cache
        x = torch.nn.functional.one_hot(input_ids, self.width).float()
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def main() -> None:
    options = _parser().parse_args()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
    os.environ.update({**alone, **os.environ})
    from mora_ds.checkpoint import CheckpointWriter
    from mora_ds.checkpoint_folder import TrainerState

    model = Stack(options.width, options.layers)
    report = mora_ds.inject(model, mora_ds.MoRAConfig(rank=options.rank))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    }
    engine, *_ = mora_ds.initialize(model=model, config=config)
    ids = torch.arange(64).unsqueeze(0)

    def step() -> float:
        started = time.perf_counter()
        engine.backward(engine(ids).square().mean())
        engine.step()
        return time.perf_counter() - started

    step()
    usual = median(step() for _ in range(5))
    print(f"{report.trainable_params:,} trained parameters, {options.repeat} saves each, a step takes {usual:.3f} s")
    blocked = {}
    for background in (False, True):
        folder = options.folder / ("background" if background else "at_once")
        shutil.rmtree(folder, ignore_errors=True)
        writer = CheckpointWriter(folder, engine, lambda number: lambda target: None, background)
        saves, beside, waits = [], [], []
        for number in range(1, options.repeat + 1):
            started = time.perf_counter()
            writer.save(TrainerState(step=number), keep=1)
            saves.append(time.perf_counter() - started)
            beside.append(step())
            started = time.perf_counter()
            writer.wait()
            waits.append(time.perf_counter() - started)
        blocked[background] = median(saves)
        name = "in the background" if background else "at once"
        print(
            f"{name:<18} training stops for {median(saves):.3f} s; the step after it takes {median(beside):.3f} s, "
            f"then {median(waits):.3f} s until it is on disk"
        )
        shutil.rmtree(folder)
    print(f"ratio              {blocked[False] / blocked[True]:.1f}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--width", type=int, default=1024, help="of each layer")
    parser.add_argument("--layers", type=int, default=16, help="how many")
    parser.add_argument("--rank", type=int, default=128, help="of MoRA")
    parser.add_argument("--repeat", type=int, default=5, help="saves; the median counts")
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure; emptied afterwards")
    return parser


if __name__ == "__main__":
    cli.run(main)
