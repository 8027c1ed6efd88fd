"""What one rank of 8 to 4,096 does on its own: start, step, save, resume, merge. The other
ranks are not there.

    python tools/bench/scale.py --folder DIR [--ranks 8 64 1024 4096 --models 7B-r8 70B-r256
    --json FILE]

Every shipped configs/*.json is run, as `initialize` completes it for so many ranks; the
ranks of a tensor-parallel group share the work of one, so that ZeRO has as many fewer.

The real code of rank 1 runs in a process, and for ZeRO-3 that of rank 0, on states of the
shapes of Llama 7B at rank 8 and 70B at rank 256; collectives reach nobody (`one_rank`).
Save and resume take an engine whose parameters are the MoRA matrices alone, as ZeRO sees
them (of 70B those of 8 decoder layers); step one of as many small matrices, sharded or kept
as the real ones are, so that it is bookkeeping alone; start and merge one real decoder
layer on a base of 16 bits.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

# A bare checkout, not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import mora_ds
from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import mora_layers
from mora_ds.checkpoint.layout import ENGINE_TAG, RNG_FILE
from mora_ds.checkpoint.state import TrainerState
from mora_ds.checkpoint.writer import CheckpointWriter, _Share, load_checkpoint
from mora_ds.common.tensor_files import write_safetensors_atomic
from mora_ds.engine.ds_config import avoid_slices, complete_ds_config, load_ds_config
from mora_ds.engine.initialize import initialize_full
from mora_ds.engine.module_hooks import drop_idle_hooks
from mora_ds.engine.shards import (
    NAME,
    NUMEL,
    OFFSET,
    RANK,
    START,
    EngineShards,
    RankShard,
    _layout,
)
from mora_ds.models.base import BaseCheckpoint, write_own_base
from mora_ds.planning.step import Work, planned_model
from mora_ds.runtime import cli
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.run import Run
from tools.bench.measuring import ROOT, llama_config, zero3_config
from tools.bench.one_rank import OneRank, Spent
from tools.bench.report import Report, bench_parser

MODELS: dict[str, tuple[LlamaConfig, int, int]] = {
    "7B-r8": (llama_config(4096, 32, 32000, 4096, mlp=11008, heads=32), 8, 32),
    "70B-r256": (
        llama_config(8192, 80, 32000, 4096, mlp=28672, heads=64, kv_heads=8),
        256,
        8,
    ),
}
"""Name -> (config, rank of the adapter, decoder layers whose matrices are saved)."""
CONFIGS = sorted((ROOT / "configs").glob("*.json"))
WITH_RANK_0 = "zero3.json"
TITLES = ("phase", "model", "ranks", "rank", "setting", "CPU s", "files")
PHASES = ("start", "step", "save", "resume", "merge")
BOOKKEEPING_SIDE = 32
"""Of the matrices in the phase `step`, which shows what DeepSpeed does in Python: the
arithmetic is the GPU's.
"""
WARM_UP = 2
STEPS = 3
"""DeepSpeed's trace of modules is complete from the third micro-batch on."""


def main() -> None:
    options = _options()
    options.folder.mkdir(parents=True, exist_ok=True)
    report = Report(options)
    rows: list[list[str]] = [list(TITLES)]
    for model in options.models:
        _write_base(options.folder / f"{model}-base", MODELS[model][0])
    for world, model in itertools.product(options.ranks, options.models):
        for rank in (0, 1):
            for setting in [path.name for path in CONFIGS] if rank else [WITH_RANK_0]:
                measured = _measured(options.folder, model, setting, world, rank)
                print("\n".join(" ".join(row) for row in measured), flush=True)
                rows += measured
    rows[1:] = sorted(rows[1:], key=lambda row: PHASES.index(row[0]))
    report.show("phases", rows)
    report.show("CPU seconds", by_world(rows))
    report.write()
    for model in options.models:
        shutil.rmtree(options.folder / f"{model}-base")


def by_world(rows: list[list[str]]) -> list[list[str]]:
    """The CPU seconds of the table `phases`, with a column for each model and number of
    ranks.
    """
    columns: list[str] = []
    lines: dict[str, dict[str, str]] = {}
    for phase, model, ranks, rank, setting, seconds, _ in rows[1:]:
        column = f"{model}, {ranks} ranks"
        columns.append(column)
        lines.setdefault(f"{phase}, {setting}, rank {rank}", {})[column] = seconds
    titles = list(dict.fromkeys(columns))
    body = [
        [name, *(line.get(title, "") for title in titles)] for name, line in lines.items()
    ]
    return [["phase", *titles], *body]


def _write_base(folder: Path, config: LlamaConfig) -> None:
    """One decoder layer, in 16 bits."""
    small = LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 1, "vocab_size": 512})
    write_own_base(AutoModelForCausalLM.from_config(small, dtype=torch.bfloat16), folder)


def _measured(
    folder: Path, model: str, setting: str, world: int, rank: int
) -> list[list[str]]:
    """The rows of one rank, from a fork of this process: there is one process group a
    process.
    """
    base = folder / f"{model}-base"
    with (
        tempfile.TemporaryDirectory(dir=folder) as scratch,
        ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as alone,
    ):
        return alone.submit(_one, Path(scratch), base, model, setting, world, rank).result()


# -- one rank ----------------------------------------------------------------------------------------------------------


def _one(
    folder: Path, base: Path, model: str, setting: str, world: int, rank: int
) -> list[list[str]]:
    torch.set_num_threads(1)
    config, lora_rank, saved_layers = MODELS[model]
    ds_config = load_ds_config(ROOT / "configs" / setting)
    one = OneRank(rank, world, folder)
    spent_in: dict[str, Spent] = {}
    sides = _sides(config, lora_rank)
    completed = _completed(
        ds_config,
        [side**2 for side in sides] * config.num_hidden_layers,
        one.world,
    )
    zero = completed["zero_optimization"]
    persists = zero["stage3_param_persistence_threshold"] >= max(sides) ** 2
    small = [BOOKKEEPING_SIDE] * len(sides)
    threshold = BOOKKEEPING_SIDE**2 if persists else 0
    as_the_real_ones = {
        **completed,
        "zero_optimization": {**zero, "stage3_param_persistence_threshold": threshold},
    }
    spent_in["step"] = _step(
        one, _engine(_Squares(config, small, config.num_hidden_layers), as_the_real_ones)
    )
    engine = _engine(_Squares(config, sides, saved_layers), completed)
    _step(one, engine, times=1)
    spent_in["save"], checkpoint = _save(one, engine, folder / "run", zero["stage"])
    with one.phase() as spent_in["resume"]:
        load_checkpoint(checkpoint, engine, TrainerState.read(checkpoint))
    if rank == 0:
        spent_in |= _start_and_merge(one, folder, base, lora_rank)
    return [
        [
            phase,
            model,
            f"{world:,}",
            str(rank),
            setting,
            f"{spent.cpu_s:.3f}",
            str(spent.files),
        ]
        for phase, spent in spent_in.items()
    ]


class _Square(nn.Module):
    def __init__(self, side: int) -> None:
        super().__init__()
        self.square = nn.Parameter(torch.zeros(side, side))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.square.view(-1)[:1]


def _sides(config: LlamaConfig, rank: int) -> list[int]:
    """Of the MoRA matrices of one decoder layer."""
    one = planned_model(
        Work(
            LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 1}),
            MoRAConfig(rank=rank),
            8,
        )
    )
    return [layer.spec.value_shape[0] for layer in mora_layers(one).values()]


def _completed(ds_config: dict[str, Any], numels: list[int], ranks: int) -> dict[str, Any]:
    """What a shipped config says of ZeRO, as `initialize` completes it for matrices of
    these sizes, in bf16.
    """
    settings = zero3_config(
        1, zero_optimization=ds_config["zero_optimization"], bf16={"enabled": True}
    )
    completed = complete_ds_config(settings, numels)
    avoid_slices(completed, numels, ranks)
    return completed


class _Squares(nn.Module):
    """MoRA matrices in decoder layers, as ZeRO sees those of a model, without
    arithmetic.
    """

    def __init__(self, config: LlamaConfig, sides: list[int], layers: int) -> None:
        """`sides`: of the matrices of a layer."""
        super().__init__()
        self.config = LlamaConfig(**{**config.to_dict(), "num_hidden_layers": layers})
        self.blocks = nn.ModuleList(
            nn.Sequential(*map(_Square, sides)) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.float().sum()


def _engine(model: nn.Module, completed: dict[str, Any]) -> Any:
    engine = initialize_full(model=model, config=completed)[0]
    if completed["zero_optimization"]["stage"] == 3:
        drop_idle_hooks(engine)
    return engine


def _step(one: OneRank, engine: Any, times: int = WARM_UP + STEPS) -> Spent:
    """The median of some steps."""
    steps = []
    for _ in range(times):
        with one.phase() as spent:
            engine.backward(engine(torch.zeros(1, dtype=torch.bfloat16)))
            engine.step()
        steps.append(spent)
    steps[-1].cpu_s = median(spent.cpu_s for spent in steps[WARM_UP:] or steps)
    return steps[-1]


def _save(one: OneRank, engine: Any, root: Path, stage: int) -> tuple[Spent, Path]:
    """(what it took, the checkpoint, to which the other ranks' files and the table of all
    have been added)
    """
    beside = root / ".step-000001.writing"
    shares: list[_Share] = []
    sizes = np.array(
        [
            parameter.ds_numel if stage == 3 else parameter.numel()
            for parameter in engine.module.parameters()
        ]
    )

    def other(value: Any, rank: int) -> Any:
        if not isinstance(value, _Share):
            return value
        files = {
            _renamed(name, one.rank, rank): facts for name, facts in value.files.items()
        }
        for name, source in zip(files, value.files, strict=True):
            if name != source:
                os.link(beside / source, beside / name)
        return value._replace(
            files=files, shard=_shard_of(value.shard, one, rank, sizes, stage)
        )

    one.relabel = other
    make = _Share.of

    def kept(*arguments: Any) -> _Share:
        shares.append(make(*arguments))
        return shares[-1]

    _Share.of = kept  # type: ignore[method-assign, assignment]
    if one.rank:
        beside.mkdir(parents=True)
    writer = CheckpointWriter(root, engine, lambda step: lambda folder: None)
    with one.phase() as spent:
        final = writer.save(TrainerState(step=1, world_size=one.world))
    if one.rank:  # what rank 0 would have added
        everyone = [other(shares[0], rank) for rank in range(one.world)]
        beside.rename(final)
        shards = [share.shard for share in everyone]
        EngineShards.of(final / ENGINE_TAG, _layout(engine), shards).write_table()
        rng = torch.from_numpy(np.stack([share.rng["cpu"] for share in everyone]))
        write_safetensors_atomic(final / RNG_FILE, {"cpu": rng}, {})
        (final / "trainer_state.json").write_text(
            json.dumps(vars(TrainerState(step=1, world_size=one.world)))
        )
    return spent, final


def _renamed(name: str, own_rank: int, rank: int) -> str:
    return name.replace(f"rank-{own_rank:05d}", f"rank-{rank:05d}")


def _shard_of(
    template: RankShard, one: OneRank, rank: int, sizes: np.ndarray, stage: int
) -> RankShard:
    """The shard of another rank: under ZeRO-3 its part of each matrix, else its part of all
    in a row.
    """
    share_size = -(-sizes // one.world)
    rows = np.zeros((len(sizes), 6), np.int64)
    rows[:, NAME] = np.arange(len(sizes))
    rows[:, RANK] = rank
    if stage == 3:
        start = np.minimum(rank * share_size, sizes)
        rows[:, START] = start
        rows[:, NUMEL] = np.minimum(share_size, sizes - start)
        rows[:, OFFSET] = np.cumsum(share_size) - share_size
    else:
        begins = np.cumsum(sizes) - sizes
        share = -(-int(sizes.sum()) // one.world)
        start = np.maximum(begins, rank * share)
        rows[:, START] = start - begins
        rows[:, NUMEL] = np.minimum(begins + sizes, (rank + 1) * share) - start
        rows[:, OFFSET] = start - rank * share
    rows = rows[rows[:, NUMEL] > 0]
    return template._replace(
        rank=rank, file=_renamed(template.file, one.rank, rank), extents=rows
    )


def _start_and_merge(
    one: OneRank, folder: Path, base_folder: Path, rank: int
) -> dict[str, Spent]:
    """Rank 0 of one decoder layer of the model on a base of its own: it merges as the
    others do, and records it.
    """

    def other(value: Any, rank: int) -> Any:
        """Of the tensors that the ranks check together, each rank has its own numbers."""
        if not isinstance(value, dict):
            return value
        return {number - one.rank + rank: result for number, result in value.items()}

    one.relabel = other
    base = BaseCheckpoint.open(base_folder)
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
    keys = {name: name for name, _ in model.named_parameters()}
    adapter = MoRAConfig(rank=rank)
    spent_in = {"start": Spent(), "merge": Spent()}
    with one.phase() as spent_in["start"]:
        ranks = Ranks.current()
        ranks.same("settings", {f"--flag_{number}": number for number in range(150)})
        mora_ds.inject(model, adapter)
        settings = zero3_config(1, bf16={"enabled": True}, gradient_accumulation_steps=1)
        engine, *_ = mora_ds.initialize(model=model, config=settings)
        run = Run(engine, base=base, folder=folder / "out", keys=keys)
    with one.phase() as spent_in["merge"]:
        run.merge(1)
    return spent_in


def _options() -> argparse.Namespace:
    parser = bench_parser(__doc__)
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="for checkpoints; left as it was",
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024, 4096])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
