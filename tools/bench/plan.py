"""Planned against measured memory and traffic, on 1, 2 and 4 real ranks (gloo, CPU).

    python tools/bench/plan.py

A Llama of random weights is written to disk, mapped by every rank, adapted and trained
for a few steps under ZeRO-3. Measured on rank 0, next to what a `Planner` says from the
config alone:

    held                 bytes of all tensors that are alive between steps, less those that
                         were there before
    kept, peak           of tensors made in forward and backward (`MemoryMeter`)
    gathered             of all-gathers in a step (`CollectiveCounter`)
    resident             the process's highest resident memory in a step, less that before
                         the model was loaded
    Pss, all ranks       proportional memory of all ranks together between steps: the base's
                         pages count once
"""

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# A bare checkout, not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import AutoModelForCausalLM

from mora_ds import MoRAConfig, initialize, inject
from mora_ds.common.errors import RunError
from mora_ds.common.files import read_json, write_json_atomic
from mora_ds.engine.ds_config import complete_ds_config
from mora_ds.engine.initialize import start_distributed
from mora_ds.engine.traffic import CollectiveCounter
from mora_ds.models.loss import chunk_loss, token_nll
from mora_ds.planning.memory_meter import MemoryMeter
from mora_ds.planning.plan import Cluster, Plan, Planner
from mora_ds.planning.step import Work, planned_model
from mora_ds.runtime import cli
from tools.bench.measuring import count_trained, llama_config, zero3_config
from tools.bench.report import Report, bench_parser

RANKS = (1, 2, 4)
STEPS = 4
ROWS = 2
"""Sequences of a rank."""
SEQ_LEN = 256
VOCABULARY = 8192
SIDES = {"positions": 2048, "heads": 8, "kv_heads": 4}
MODEL = llama_config(512, 8, VOCABULARY, mlp=1376, **SIDES)
WARM_UP_VOCABULARY = 64
WARM_UP_MODEL = llama_config(64, 1, WARM_UP_VOCABULARY, mlp=128, **SIDES)
ADAPTER = MoRAConfig(rank=32, operator="share")
SETTINGS = zero3_config(ROWS, gradient_accumulation_steps=1)


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument(
        "--folder", type=Path, help="set by this program for the ranks that it starts"
    )
    options = parser.parse_args()
    if options.folder is not None:
        _be_a_rank(options.folder)
        return
    report = Report(options)
    work = Work(MODEL, ADAPTER, SEQ_LEN, ROWS, torch.float32)
    planned = planned_model(work)
    numels = [parameter.numel() for parameter in planned.parameters()]
    completed = complete_ds_config(SETTINGS, numels)
    report.say(
        f"{ROWS} x {SEQ_LEN} tokens a rank, fp32, {count_trained(planned):,} trained; MB (10^6)"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, config in (("model", MODEL), ("warm_up", WARM_UP_MODEL)):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model.save_pretrained(Path(folder, name))
        for ranks in RANKS:
            plan = Planner(work, Cluster(ranks, ranks), completed, on_cpu=True).plan()
            _show(report, ranks, plan, _measured(ranks, Path(folder)))
    report.write()


def _show(
    report: Report, ranks: int, plan: Plan, by_rank: list[dict[str, int]]
) -> None:
    memory = plan.memory
    first = by_rank[0]
    persistent = (
        sum(plan.trained.persistent) * plan.trained.bytes_each if ranks > 1 else 0
    )
    between_steps = memory.static + persistent
    together = plan.files + ranks * (between_steps - memory.base)
    rows = [
        ("held between steps", between_steps, first["held"]),
        ("kept at the end of forward", memory.activations, first["kept"]),
        ("forward and backward, peak", memory.forward_backward - memory.gathered, first["peak"]),
        ("optimizer's step, peak", memory.optimizer_step, first["step"]),
        ("gathered a step", plan.gathered, first["gathered"]),
        ("resident, peak", memory.peak + plan.files - memory.base, first["resident"]),
        ("Pss, all ranks, between steps", together, sum(rank["pss"] for rank in by_rank)),
    ]  # fmt: skip
    lines = [[f"{ranks} rank(s)", "planned", "measured", "measured / planned"]]
    for name, planned, measured in rows:
        ratio = f"{measured / planned:.3f}" if planned else "-"
        lines.append([name, f"{planned / 1e6:.2f}", f"{measured / 1e6:.2f}", ratio])
    report.show(f"{ranks} ranks", lines)


def _measured(ranks: int, folder: Path) -> list[dict[str, int]]:
    """What each of `ranks` processes measures."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = [f"--nproc_per_node={ranks}", __file__, f"--folder={folder}"]
    # glibc would keep freed memory, which then counts as resident (mallopt(3))
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    ended = subprocess.run([*launcher, *program], env={**os.environ, **malloc})
    if ended.returncode:
        raise RunError(f"one of {ranks} ranks failed: see above")
    by_rank: list[dict[str, int]] = read_json(folder / "measured.json")["ranks"]
    return by_rank


# -- one rank --------------------------------------------------------------------------


def _be_a_rank(folder: Path) -> None:
    """Measure, and have rank 0 write what all have measured."""
    torch.set_num_threads(1)
    start_distributed()
    # Libraries and code are in memory afterwards
    _train(folder / "warm_up", WARM_UP_VOCABULARY, steps=1)
    gc.collect()
    before = {"held": _alive(), "resident": _memory("VmRSS"), "pss": _memory("Pss")}
    measured = _train(folder / "model", VOCABULARY, STEPS)
    added = {name: value - before.get(name, 0) for name, value in measured.items()}
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, added)
    if dist.get_rank() == 0:
        write_json_atomic(folder / "measured.json", {"ranks": by_rank})


def _train(folder: Path, vocabulary: int, steps: int) -> dict[str, int]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_kernels=False
    )
    inject(model, ADAPTER)
    chunk_loss(model)
    engine, *_ = initialize(model=model, config=SETTINGS)
    ids = torch.randint(vocabulary, (ROWS, SEQ_LEN))
    # Two documents a row
    positions = torch.arange(SEQ_LEN // 2).repeat(ROWS, 2)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}

    def loss() -> Tensor:
        return token_nll(engine, batch) / ids.numel()

    measured: dict[str, int] = {}
    for _ in range(steps):
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # the high-water mark starts afresh
        with CollectiveCounter().counting() as counter:
            engine.backward(loss())
            engine.step()
        measured["resident"] = _memory("VmHWM")
        measured["gathered"] = counter.gathered_bytes
    gc.collect()
    dist.barrier()
    measured["held"] = _alive()
    measured["pss"] = _memory("Pss")
    dist.barrier()
    with MemoryMeter() as meter:
        of_batch = loss()
        measured["kept"] = meter.live
        engine.backward(of_batch)
        del of_batch
    measured["peak"] = meter.peak
    with MemoryMeter() as meter:
        engine.step()
    measured["step"] = meter.peak
    engine.destroy()
    return measured


def _alive() -> int:
    """Bytes of all storages of tensors that Python knows of."""
    storages = {}
    for tracked in gc.get_objects():
        if issubclass(type(tracked), torch.Tensor) and not tracked.is_meta:
            storage = tracked.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _memory(key: str) -> int:
    """Bytes of this process by a key of /proc/self/status, such as VmRSS, or Pss."""
    file = "smaps_rollup" if key == "Pss" else "status"
    lines = Path("/proc/self", file).read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    cli.run(main)
