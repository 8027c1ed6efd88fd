"""Planned against measured memory and traffic, on 1, 2 and 4 real ranks (gloo, CPU).

    python tools/bench/plan.py [--ranks 1 2 4] [--layers 8] [--hidden 512] [--rows 2]
    [--seq_len 256] [--rank 32]

A Llama of random weights is written to disk, mapped by every rank, adapted and trained for a few steps under ZeRO-3.
Measured on rank 0, next to what a `Planner` says from the config alone:

    held                 bytes of all tensors that are alive between steps, less those that were there before
    kept, peak           of tensors made in forward and backward (`MemoryMeter`)
    gathered             of all-gathers in a step (`CollectiveCounter`)
    resident             the process's highest resident memory in a step, less that before the model was loaded
    Pss, all ranks       proportional memory of all ranks together between steps: the base's pages count once
"""

import argparse
import gc
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

# A bare checkout, not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import AutoModelForCausalLM

from mora_ds import MoRAConfig, initialize, inject
from mora_ds.engine.ds_config import complete_ds_config
from mora_ds.engine.traffic import CollectiveCounter
from mora_ds.models.loss import chunk_loss, token_nll
from mora_ds.planning.memory_meter import MemoryMeter
from mora_ds.planning.plan import Cluster, Plan, Planner
from mora_ds.planning.step import Work, planned_model
from mora_ds.runtime import cli
from tools.bench.measuring import llama_config, memory_of, on_processes, zero3_config
from tools.bench.report import Report, bench_parser

STEPS = 4
VOCABULARY = 8192


def main() -> None:
    options = _options()
    report = Report(options)
    sides = {"heads": 8, "kv_heads": 4}
    config = llama_config(
        options.hidden,
        options.layers,
        VOCABULARY,
        2048,
        options.hidden * 43 // 16,
        **sides,
    )
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(
            folder
        )
        tiny = llama_config(64, 1, 64, 2048, 128, **sides)
        AutoModelForCausalLM.from_config(tiny, dtype=torch.float32).save_pretrained(
            f"{folder}/tiny"
        )
        work = Work(config, _adapter(options), options.seq_len, options.rows, torch.float32)
        numels = [parameter.numel() for parameter in planned_model(work).parameters()]
        completed = complete_ds_config(
            zero3_config(options.rows, gradient_accumulation_steps=1), numels
        )
        report.say(
            f"{options.rows} x {options.seq_len} tokens a rank, fp32, {sum(numels):,} trained; MB (10^6)"
        )
        for ranks in options.ranks:
            plan = Planner(work, Cluster(ranks, ranks), completed, on_cpu=True).plan()
            _show(report, ranks, plan, measure(ranks, folder, options))
    report.write()


def _options() -> argparse.Namespace:
    numbers = {
        "layers": (8, "of the model"),
        "hidden": (512, "its width"),
        "rows": (2, "sequences a rank"),
        "seq_len": (256, "tokens of each"),
        "rank": (32, "as --mora_rank"),
    }
    parser = bench_parser(__doc__, numbers)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    return parser.parse_args()


def _adapter(options: argparse.Namespace) -> MoRAConfig:
    return MoRAConfig(rank=options.rank, operator="share")


def _show(report: Report, ranks: int, plan: Plan, by_rank: list[dict[str, float]]) -> None:
    memory = plan.memory
    mine = by_rank[0]
    rows = [
        ("held between steps", memory.static + _persistent(plan), mine["held"]),
        ("kept at the end of forward", memory.activations, mine["kept"]),
        ("forward and backward, peak", memory.forward_backward - memory.gathered, mine["peak"]),
        ("optimizer's step, peak", memory.optimizer_step, mine["step"]),
        ("gathered a step", plan.gathered, mine["gathered"]),
        ("resident, peak", memory.peak + plan.files - memory.base, mine["resident"]),
        ("Pss, all ranks, between steps",
         plan.files + ranks * (memory.static - memory.base + _persistent(plan)),
         sum(usage["pss"] for usage in by_rank)),
    ]  # fmt: skip
    lines = [[f"{ranks} rank(s)", "planned", "measured", "measured / planned"]]
    for name, planned, measured in rows:
        ratio = f"{measured / planned:.3f}" if planned else "-"
        lines.append([name, f"{planned / 1e6:.2f}", f"{measured / 1e6:.2f}", ratio])
    report.show(f"{ranks} ranks", lines)


def _persistent(plan: Plan) -> int:
    return (
        sum(plan.trained.persistent) * plan.trained.bytes_each
        if plan.trained.ranks > 1
        else 0
    )


def measure(ranks: int, folder: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """What each process measures."""
    # glibc would keep freed memory, which then counts as resident (mallopt(3))
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    return on_processes(ranks, _measured, folder, options)


def _measured(folder: str, options: argparse.Namespace) -> dict[str, float]:
    _train(f"{folder}/tiny", options, warm_up=True)  # libraries and code are in memory
    gc.collect()
    before = {"held": _alive(), "resident": memory_of("VmRSS"), "pss": memory_of("Pss")}
    measured = _train(folder, options)
    return {name: value - before.get(name, 0) for name, value in measured.items()}


def _train(
    folder: str, options: argparse.Namespace, warm_up: bool = False
) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inject(model, _adapter(options))
    chunk_loss(model)
    engine, *_ = initialize(
        model=model, config=zero3_config(options.rows, gradient_accumulation_steps=1)
    )
    ids = torch.randint(64 if warm_up else VOCABULARY, (options.rows, options.seq_len))
    positions = torch.arange(options.seq_len).expand(options.rows, -1) % (
        options.seq_len // 2
    )
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions.contiguous()}
    counter = CollectiveCounter()
    measured: dict[str, float] = {}
    for _ in range(1 if warm_up else STEPS):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts afresh
        counter.reset()
        with counter.counting():
            loss = token_nll(engine, batch)
            engine.backward(loss / ids.numel())
            del loss
            engine.step()
        measured["resident"] = memory_of("VmHWM")
        measured["gathered"] = counter.gathered_bytes
    gc.collect()
    dist.barrier()
    measured["held"] = _alive()
    measured["pss"] = memory_of("Pss")
    dist.barrier()
    with MemoryMeter() as meter:
        loss = token_nll(engine, batch)
        measured["kept"] = meter.live
        engine.backward(loss / ids.numel())
        del loss
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


if __name__ == "__main__":
    cli.run(main)
