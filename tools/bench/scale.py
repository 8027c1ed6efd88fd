"""What one rank of 8 to 4,096 does on its own: start, step, save, resume, merge. The
other ranks are not there.

    python tools/bench/scale.py [--folder DIR --ranks 8 64 1024 4096 --json FILE]

Every configs/*.json is run, as `initialize` completes it for that number of ranks; the
ranks of a tensor-parallel group share the work of one, so that ZeRO has as many fewer.

The real code of rank 1 runs in a process, and for ZeRO-3 that of rank 0, on states of
the shapes of Llama 7B at rank 8 and 70B at rank 256; collectives reach nobody
(`one_rank`). Save and resume take an engine whose parameters are the MoRA matrices
alone, as ZeRO sees them (of 70B those of 8 decoder layers); step one of as many small
matrices, sharded or kept as the real ones are, so that it is bookkeeping alone; start
and merge one real decoder layer on a base of 16 bits.

Last, merges and replays by cycle, of narrow models: what they cost besides arithmetic must
not grow with the ledger.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

# A bare checkout, not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import mora_ds
from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import mora_layers
from mora_ds.checkpoint.layout import CHECKPOINTS, ENGINE_TAG, LATEST, STATE_FILE
from mora_ds.checkpoint.manager import CheckpointManager, resume_checkpoint
from mora_ds.checkpoint.sections import full_sections
from mora_ds.checkpoint.shard_table import (
    COLUMNS,
    COUNT,
    NAME,
    NUMEL,
    OFFSET,
    START,
    STRIDE,
    EngineShards,
    RankShard,
)
from mora_ds.checkpoint.state import TrainerState
from mora_ds.checkpoint.storage import storage_of
from mora_ds.common.fetched import fetch_into, fetched_once, local
from mora_ds.common.files import (
    MANIFEST,
    facts_of,
    manifest_of,
    sha256_file,
    write_compact_json,
)
from mora_ds.engine.ds_config import avoid_slices, complete_ds_config, load_ds_config
from mora_ds.engine.initialize import initialize_full
from mora_ds.engine.module_hooks import remove_unused_hooks
from mora_ds.engine.shards import layout_of
from mora_ds.models.base import BaseCheckpoint, write_own_base
from mora_ds.planning.step import Work, planned_model
from mora_ds.remora.ledger import Ledger
from mora_ds.runtime import cli
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.remote_folder import RemoteFolder
from mora_ds.train.run import Run, RunOptions
from tools.bench.measuring import cpu_seconds, llama_config, zero3_config
from tools.bench.one_rank import OneRank, Spent
from tools.bench.report import Report, bench_parser
from tools.plans import ROOT

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
STORED = "7B-r8"
"""The model whose checkpoints are put into a store."""
Table = dict[tuple[str, str, int], dict[str, Spent]]
"""Phase, setting and rank -> model with number of ranks -> what was spent."""
PHASES = ("start", "step", "save", "resume", "merge")
BOOKKEEPING_SIDE = 32
"""Side of the matrices in the phase `step`, which shows what DeepSpeed does in Python:
the arithmetic is the GPU's."""
WARM_UP = 2
CYCLES = (1, 10, 100, 400)
ADAPTED = (14, 224)
"""Numbers of adapted layers, 7 in a decoder layer."""
SHARING = (1, 2)
"""Numbers of ranks that share a base."""
STEPS = 3
"""DeepSpeed's trace of modules is complete from the third micro-batch on."""


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        _measure(options, Path(folder))


def _measure(options: argparse.Namespace, folder: Path) -> None:
    report = Report(options)
    settings = [(0, WITH_RANK_0), *((1, path.name) for path in CONFIGS)]
    table: Table = {}
    for model in MODELS:
        base = folder / f"{model}-base"
        _write_base(base, MODELS[model][0])
        for world, (rank, setting) in itertools.product(options.ranks, settings):
            spent_in = _measured(folder, base, model, setting, world, rank)
            print(
                f"{model}, {world:,} ranks, {setting}, rank {rank}: {spent_in}",
                flush=True,
            )
            for phase, spent in spent_in.items():
                line = (phase, setting, rank)
                table.setdefault(line, {})[f"{model}, {world:,} ranks"] = spent
        shutil.rmtree(base)
    report.show("CPU seconds", _rows(table, lambda spent: f"{spent.cpu_s:.3f}"))
    report.show("files", _rows(table, lambda spent: str(spent.files)))
    by_cycle = [["layers", "ranks", "cycle", "merge", "replay", "ledger", "memory"]]
    for layers, ranks in itertools.product(ADAPTED, SHARING):
        by_cycle += _by_cycle(folder, layers, ranks)
    report.show("CPU seconds of a merge and a replay", by_cycle)
    _measure_store(options, folder, report)
    report.write()


def _measure_store(options: argparse.Namespace, folder: Path, report: Report) -> None:
    """Requests and bytes of ranks whose checkpoints and model are in a store."""
    base = folder / "stored_base"
    _write_base(base, MODELS[STORED][0])
    table: Table = {}
    for world, rank in itertools.product(options.ranks, (0, 1)):
        spent_in = _forked(folder, _in_store, base, STORED, world, rank)
        print(f"in a store, {world:,} ranks, rank {rank}: {spent_in}", flush=True)
        for phase, spent in spent_in.items():
            line = (phase, WITH_RANK_0, rank)
            table.setdefault(line, {})[f"{world:,} ranks"] = spent
    report.show("requests/MB", _rows(table, _traffic_cell))


def _traffic_cell(spent: Spent) -> str:
    return f"{spent.requests:,}/{spent.nbytes / 1e6:,.1f}"


def _rows(table: Table, cell: Callable[[Spent], str]) -> list[list[str]]:
    """A row a phase, setting and rank; a column a model and number of ranks."""
    columns = list(dict.fromkeys(itertools.chain.from_iterable(table.values())))
    rows = [["phase", *columns]]
    for phase, setting, rank in sorted(table, key=lambda line: PHASES.index(line[0])):
        spent = table[phase, setting, rank]
        cells = (cell(spent[column]) if column in spent else "" for column in columns)
        rows.append([f"{phase}, {setting}, rank {rank}", *cells])
    return rows


def _write_base(folder: Path, config: LlamaConfig) -> None:
    """One decoder layer, in 16 bits."""
    small = LlamaConfig(
        **{**config.to_dict(), "num_hidden_layers": 1, "vocab_size": 512}
    )
    write_own_base(
        AutoModelForCausalLM.from_config(small, dtype=torch.bfloat16), folder
    )


def _measured(
    folder: Path, base: Path, model: str, setting: str, world: int, rank: int
) -> dict[str, Spent]:
    """What one rank spends in each phase; a fork, since a process has one group."""
    return _forked(folder, _one, base, model, setting, world, rank)


def _forked(folder: Path, work: Callable[..., Any], *arguments: Any) -> Any:
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(dir=folder) as scratch, fork.Pool(1) as alone:
        return alone.apply(work, (Path(scratch), *arguments))


def _by_cycle(folder: Path, layers: int, ranks: int) -> list[list[str]]:
    """What `_cycles` finds on rank 0 of real processes."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(dir=folder) as scratch, fork.Pool(ranks) as pool:
        work = [(Path(scratch), layers, rank, ranks) for rank in range(ranks)]
        rows: list[list[str]] = pool.starmap(_cycles, work, chunksize=1)[0]
        return rows


def _cycles(folder: Path, layers: int, rank: int, ranks: int) -> list[list[str]]:
    """(layers, ranks, cycle, CPU seconds of its merge, of a replay after it, of the
    ledger at a resume, memory of this process). The ranks share the base."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", meeting, rank=rank, world_size=ranks)
    torch.manual_seed(0)
    config = llama_config(64, layers // 7, 512, 64)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if rank == 0:
        write_own_base(model, folder / "base")
    dist.barrier()
    run = _started(model, folder, BaseCheckpoint.open(folder / "base"), 4)
    rows = []
    seconds: list[float] = []
    for cycle in range(1, CYCLES[-1] + 1):
        seconds.append(cpu_seconds(partial(run.merge, cycle)))
        if cycle in CYCLES:
            ledger = run.remora.ledger
            found = (
                median(seconds[-5:]),
                median(cpu_seconds(run.remora.rebuild) for _ in range(3)),
                cpu_seconds(
                    partial(_resume_ledger, ledger, folder / f"copy-{rank}-{cycle}")
                ),
            )
            resident = psutil.Process().memory_info().rss / 1e6
            times = (f"{second:.3f}" for second in found)
            names = map(str, (layers, ranks, cycle))
            rows.append([*names, *times, f"{resident:,.0f} MB"])
    return rows


def _resume_ledger(ledger: Ledger, folder: Path) -> None:
    """What a resume does with the ledger of a checkpoint: its files are hashed, as all
    of the checkpoint, and linked."""
    for record in ledger.records:
        sha256_file(ledger.folder / record.file)
    Ledger.open(ledger.folder, hashes=False).copy_to(folder)


# -- one rank --------------------------------------------------------------------------


def _one(
    folder: Path, base: Path, model: str, setting: str, world: int, rank: int
) -> dict[str, Spent]:
    torch.set_num_threads(1)
    config, lora_rank, saved_layers = MODELS[model]
    one = OneRank(rank, world, folder)
    sides, completed = _sizes_and_settings(model, setting, world)
    zero = completed["zero_optimization"]
    persists = zero["stage3_param_persistence_threshold"] >= max(sides) ** 2
    threshold = BOOKKEEPING_SIDE**2 if persists else 0
    as_the_real_ones = {
        **completed,
        "zero_optimization": {**zero, "stage3_param_persistence_threshold": threshold},
    }
    small = [BOOKKEEPING_SIDE] * len(sides)
    small_model = _MatrixModel(config, small, config.num_hidden_layers)
    spent_in = {"step": _step(one, _engine(small_model, as_the_real_ones))}
    engine = _engine(_MatrixModel(config, sides, saved_layers), completed)
    _step(one, engine, times=1)
    spent_in["save"], checkpoint = _save(one, engine, folder / "run", zero["stage"])
    with one.phase() as spent_in["resume"]:
        state = TrainerState.read(checkpoint)
        _manager(engine, checkpoint.parent, state).load(checkpoint)
    if rank == 0:
        spent_in |= _start_and_merge(one, folder, base, lora_rank)
    return spent_in


def _sizes_and_settings(
    model: str, setting: str, world: int
) -> tuple[list[int], dict[str, Any]]:
    """Sides of the MoRA matrices of a decoder layer, and DeepSpeed's settings for the
    complete model."""
    config, lora_rank, _ = MODELS[model]
    sides = _sides(config, lora_rank)
    numels = [side**2 for side in sides] * config.num_hidden_layers
    ds_config = load_ds_config(ROOT / "configs" / setting)
    return sides, _completed(ds_config, numels, world)


def _in_store(
    folder: Path, base: Path, model: str, world: int, rank: int
) -> dict[str, Spent]:
    """What a rank asks of a store: of ZeRO-3, with the model of one decoder layer."""
    torch.set_num_threads(1)
    config, _, saved_layers = MODELS[model]
    one = OneRank(rank, world, folder)
    sides, completed = _sizes_and_settings(model, WITH_RANK_0, world)
    engine = _engine(_MatrixModel(config, sides, saved_layers), completed)
    _step(one, engine, times=1)
    url = f"file://{folder}/store"
    remote = RemoteFolder(url, folder)
    root = remote.folder / CHECKPOINTS
    fetch_into(folder)
    spent_in: dict[str, Spent] = {}
    if rank:  # what rank 0 has done before
        local(f"file://{base}")
        fetched_once.cache_clear()
        root.parent.mkdir()
    with one.phase() as spent_in["start"]:
        if rank == 0:
            remote.open()
            remote.begin(overwrites=False)
        local(f"file://{base}")
    store = folder / "store" / CHECKPOINTS
    spent_in["save"], saved = _save(one, engine, root, 3, store)
    with one.phase() as spent_in["resume"]:
        if rank == 0:
            resume_checkpoint(LATEST, root)
        state = TrainerState.read(saved)
        _manager(engine, root, state).load(root / saved.name)
    if rank == 0:
        remote.close()
    return spent_in


class _MatrixLayer(nn.Module):
    def __init__(self, side: int) -> None:
        super().__init__()
        self.mora_matrix = nn.Parameter(torch.zeros(side, side))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mora_matrix.view(-1)[:1]


def _sides(config: LlamaConfig, rank: int) -> list[int]:
    """The sides of the MoRA matrices of one decoder layer."""
    one_layer = LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 1})
    model = planned_model(Work(one_layer, MoRAConfig(rank=rank), 8))
    return [layer.spec.adapter_weight_shape[0] for layer in mora_layers(model).values()]


def _completed(
    ds_config: dict[str, Any], numels: list[int], ranks: int
) -> dict[str, Any]:
    """The ZeRO settings of a file of configs/, as `initialize` completes them for these
    sizes, in bf16."""
    settings = zero3_config(
        1, zero_optimization=ds_config["zero_optimization"], bf16={"enabled": True}
    )
    completed = complete_ds_config(settings, numels)
    avoid_slices(completed, numels, ranks)
    return completed


class _MatrixModel(nn.Module):
    """MoRA matrices in decoder layers, as ZeRO sees them, without arithmetic."""

    def __init__(self, config: LlamaConfig, sides: list[int], layers: int) -> None:
        """`sides`: of the matrices of a layer."""
        super().__init__()
        self.config = LlamaConfig(**{**config.to_dict(), "num_hidden_layers": layers})
        self.blocks = nn.ModuleList(
            nn.Sequential(*map(_MatrixLayer, sides)) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.float().sum()


def _engine(model: nn.Module, completed: dict[str, Any]) -> Any:
    engine = initialize_full(model=model, config=completed)[0]
    if completed["zero_optimization"]["stage"] == 3:
        remove_unused_hooks(engine)
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


def _save(
    one: OneRank, engine: Any, root: Path, stage: int, store: Path | None = None
) -> tuple[Spent, Path]:
    """(what it took, the checkpoint with the other ranks' files and the table added).
    `store`: the folder where a store has what belongs to `root`."""
    final = (store or root) / "step-000001"
    writing = final if store else root / ".step-000001.writing"
    # Under ZeRO-3 a parameter is empty but for its partition
    size_of = attrgetter("ds_numel") if stage == 3 else nn.Parameter.numel
    sizes = np.array([size_of(parameter) for parameter in engine.module.parameters()])

    def share_of(share: Any, rank: int) -> Any:
        """What another rank would have sent; its files are links to this rank's."""
        if not isinstance(share, (list, tuple)):
            return share
        recorded, facts = share
        template = next(filter(None, facts))
        files = {}
        for source, entry in recorded.items():
            name = _renamed(source, one.rank, rank)
            files[name] = entry
            if name != source:
                os.link(writing / source, writing / name)
        shard = _shard_of(RankShard(*template), one, rank, sizes, stage)
        return files, [shard if fact else None for fact in facts]

    one.relabel = share_of
    state = TrainerState(step=1, world_size=one.world)
    if one.rank:
        writing.mkdir(parents=True)
    manager = _manager(engine, root, state)
    with one.phase() as spent:
        manager.save(1)
    if one.rank:  # what rank 0 would have added
        everyone = [share_of(one.gathered, rank) for rank in range(one.world)]
        if store is None:
            writing.rename(final)
        shards = [next(filter(None, facts)) for _, facts in everyone]
        table = EngineShards.of(final / ENGINE_TAG, layout_of(engine), shards)
        table.write_table(table.where)
        (final / STATE_FILE).write_text(json.dumps(vars(state)))
        listed = {name: entry for files, _ in everyone for name, entry in files.items()}
        for path in (table.where, final / STATE_FILE):
            listed[path.relative_to(final).as_posix()] = facts_of(path)
        write_compact_json(final / MANIFEST, manifest_of(listed))
    return spent, final


def _manager(engine: Any, root: Path, state: TrainerState) -> CheckpointManager:
    sections = full_sections(engine, state)
    return CheckpointManager(storage_of(root), sections, Ranks.current())


def _renamed(name: str, rank: int, other_rank: int) -> str:
    return name.replace(f"rank-{rank:05d}", f"rank-{other_rank:05d}")


def _shard_of(
    template: RankShard, one: OneRank, rank: int, sizes: np.ndarray, stage: int
) -> RankShard:
    """Another rank's shard: under ZeRO-3 a part of each matrix, else of all in a
    row."""
    if stage == 3:
        share = -(-sizes // one.world)
        start = np.minimum(rank * share, sizes)
        end = np.minimum(start + share, sizes)
        offset = np.cumsum(share) - share
    else:
        begins = np.cumsum(sizes) - sizes
        length = -(-int(sizes.sum()) // one.world)
        first = rank * length
        start = np.clip(first - begins, 0, sizes)
        end = np.clip(first + length - begins, 0, sizes)
        offset = begins + start - first
    rows = np.zeros((len(sizes), COLUMNS), np.int64)
    rows[:, NAME] = np.arange(len(sizes))
    rows[:, NUMEL] = end - start
    rows[:, START] = start - rank * (end - start)
    rows[:, OFFSET] = offset
    rows[:, [STRIDE, COUNT]] = 1
    file = _renamed(template.file, one.rank, rank)
    origins = zlib.compress(rows[end > start].tobytes(), level=1)
    return template._replace(rank=rank, file=file, origins=origins)


def _start_and_merge(
    one: OneRank, folder: Path, base_folder: Path, rank: int
) -> dict[str, Spent]:
    """Rank 0 with one decoder layer of the model, on a base of its own: it merges as the
    others do, and records the merge."""

    # The others give what this rank gives
    one.relabel = lambda value, rank: value
    base = BaseCheckpoint.open(base_folder)
    model = AutoModelForCausalLM.from_pretrained(
        base_folder, dtype=torch.bfloat16, use_kernels=False
    )
    spent_in: dict[str, Spent] = {}
    with one.phase() as spent_in["start"]:
        ranks = Ranks.current()
        ranks.same("settings", {f"--flag_{number}": number for number in range(150)})
        run = _started(model, folder, base, rank)
    with one.phase() as spent_in["merge"]:
        run.merge(1)
    return spent_in


def _started(model: Any, folder: Path, base: BaseCheckpoint, rank: int) -> Run:
    keys = {name: name for name, _ in model.named_parameters()}
    mora_ds.inject(model, MoRAConfig(rank=rank))
    settings = zero3_config(1, bf16={"enabled": True}, gradient_accumulation_steps=1)
    engine, *_ = mora_ds.initialize(model=model, config=settings)
    options = RunOptions(keys=keys)
    return Run(engine, base=base, folder=folder / "out", options=options)


def _options() -> argparse.Namespace:
    parser = bench_parser(__doc__)
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder with space for checkpoints; unchanged afterwards",
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024, 4096])
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
