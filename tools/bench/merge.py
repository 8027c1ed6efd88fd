"""How much of many small updates does a bf16 model keep? Exact merging against incremental merging, in one run.

    python tools/bench/merge.py [--merges 20] [--steps 5] [--rates 1e-6 3e-6 1e-5 3e-5]

A Llama of random bf16 weights (configs/models/tiny_llama.json, two blocks), taught one batch of random tokens, takes
`merges` cycles of `steps` AdamW steps, once with each --merge_precision: exact forms the original plus the fp32 sum of
all updates and rounds once, incremental rounds after every merge. With U the sum of the updates in the ledger and D
what the live weights have moved by, a run has kept <D, U> / <U, U> of its update: 1.00 is all of it. bf16 cannot hold
changes below 1/512 of a weight, so the smaller the merges, the less incremental merging keeps.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import AutoConfig, AutoModelForCausalLM

from mora_ds import MoRAConfig, Run, initialize, inject, mora_layers
from mora_ds.models.base import BaseCheckpoint, write_own_base
from mora_ds.remora.merge import EXACT, INCREMENTAL
from mora_ds.runtime import cli
from mora_ds.runtime.cli import table
from mora_ds.runtime.processes import only_rank
from mora_ds.train.run import RunDetails

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "models"
VOCABULARY, ROWS, LENGTH = 512, 4, 64


def main() -> None:
    options = _options()
    os.environ.update(only_rank())
    lines = [["rate", "mean |M|", "kept exact", "kept incremental", "ratio"]]
    for rate in options.rates:
        kept, size = {}, 0.0
        for precision in (EXACT, INCREMENTAL):
            kept[precision], size = share_kept(precision, rate, options.merges, options.steps)
        ratio = kept[EXACT] / kept[INCREMENTAL] if kept[INCREMENTAL] > 0 else float("inf")
        lines.append([f"{rate:g}", f"{size:.1e}", f"{kept[EXACT]:.3f}", f"{kept[INCREMENTAL]:.3f}", f"{ratio:.1f}"])
    print(
        f"share of the accumulated update that bf16 weights hold after {options.merges} merges of {options.steps} steps"
    )
    print("\n".join(table(lines)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--merges", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps before each merge")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-6, 3e-6, 1e-5, 3e-5], help="learning rates")
    return parser.parse_args()


def share_kept(precision: str, rate: float, merges: int, steps: int) -> tuple[float, float]:
    """(<D, U> / <U, U> over all layers, mean absolute entry of the merged squares)."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(CONFIG / "tiny_llama.json", vocab_size=VOCABULARY, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    adapter = MoRAConfig(rank=8)
    with tempfile.TemporaryDirectory() as folder:
        base = write_own_base(model, Path(folder) / "base")
        inject(model, adapter)
        engine, *_ = initialize(model=model, config=_ds_config(rate))
        run = Run(engine, adapter, base, Path(folder) / "out", details=RunDetails(precision=precision))
        ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1)).to(engine.device)
        for merge in range(1, merges + 1):
            for _ in range(steps):
                engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
                engine.step()
            run.merge(merge)
        return _measure(run, base)


def _ds_config(rate: float) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": rate, "weight_decay": 0.0}},
    }


def _measure(run: Run, base: BaseCheckpoint) -> tuple[float, float]:
    along, energy, sizes = 0.0, 0.0, []
    for name, layer in mora_layers(run.engine.module).items():
        updates = list(run.remora.ledger.squares_of(name))
        total = sum(spec.delta_weight(square).double() for spec, square in updates)
        assert isinstance(total, torch.Tensor)
        moved = layer.weight.cpu().double() - base.read(f"{name}.weight").double()
        along += (moved * total).sum().item()
        energy += total.square().sum().item()
        sizes += [square.abs().mean().item() for _, square in updates]
    return along / energy, sum(sizes) / len(sizes)


if __name__ == "__main__":
    cli.run(main)
