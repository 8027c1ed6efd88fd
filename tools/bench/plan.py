"""Planned against measured memory and traffic, on 1, 2 and 4 real ranks (gloo, CPU).

    python tools/bench/plan.py [--ranks 1 2 4] [--layers 8] [--hidden 512] [--rows 2] [--seq_len 256] [--rank 32]
        [--base_bits 8]

A Llama of random weights is written to disk, mapped by every rank, given squares and trained for a few steps under
ZeRO-3. Measured on rank 0, beside what `mora_ds.plan` says from the config alone:

    held                 bytes of all tensors that are alive between steps, less those that were there before
    kept, peak           of tensors made in forward and backward (`MemoryMeter`)
    gathered, calls      of all-gathers in a step (`CollectiveCounter`)
    resident             the process's highest resident memory in a step, less that before the model was loaded
    Pss, all ranks       proportional memory of all ranks together between steps: the base's pages count once
"""

from __future__ import annotations

import argparse
import gc
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a bare checkout, not installed

from transformers import AutoConfig, AutoModelForCausalLM

from mora_ds import MoRAConfig, initialize, inject
from mora_ds.engine.ds_config import complete_ds_config
from mora_ds.engine.initialize import start_distributed
from mora_ds.engine.traffic import CollectiveCounter
from mora_ds.models.loss import token_nll
from mora_ds.planning.memory_meter import MemoryMeter
from mora_ds.planning.plan import Plan, Planner
from mora_ds.planning.step import Work, planned_model
from mora_ds.planning.timing import Cluster
from mora_ds.runtime import cli
from mora_ds.runtime.cli import table

STEPS = 4


def main() -> None:
    options = _options()
    config = AutoConfig.for_model(
        "llama", hidden_size=options.hidden, intermediate_size=options.hidden * 43 // 16, vocab_size=options.vocabulary,
        num_hidden_layers=options.layers, num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        small: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
        tiny = AutoConfig.for_model("llama", num_attention_heads=8, num_key_value_heads=4, **small)
        AutoModelForCausalLM.from_config(tiny, dtype=torch.float32).save_pretrained(f"{folder}/tiny")
        work = Work(config, _adapter(options), options.seq_len, options.rows, torch.float32, options.checkpointing)
        numels = [parameter.numel() for parameter in planned_model(work).parameters()]
        completed = complete_ds_config(_ds_config(options), numels)
        print(f"{options.rows} x {options.seq_len} tokens a rank, fp32, {sum(numels):,} trained; MB (10^6)")
        for ranks in options.ranks:
            plan = Planner(work, Cluster(ranks, ranks), completed, on_cpu=True).plan()
            _print(ranks, plan, measure(ranks, folder, options))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--rank", type=int, default=32, help="of the squares, as --mora_rank")
    parser.add_argument("--base_bits", type=int, choices=[8, 16], default=16)
    parser.add_argument("--checkpointing", action="store_true")
    return parser.parse_args()


def _adapter(options: argparse.Namespace) -> MoRAConfig:
    return MoRAConfig(rank=options.rank, operator="share", base_bits=options.base_bits)


def _ds_config(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": options.rows,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    }


def _print(ranks: int, plan: Plan, found: list[dict[str, float]]) -> None:
    memory, mine = plan.memory, found[0]
    mapped = plan.files - memory.base + plan.eight_bits  # beside a base in 8 bits: what it was made of
    rows = [
        ("held between steps", memory.static + _persistent(plan), mine["held"]),
        ("kept at the end of forward", memory.activations, mine["kept"]),
        ("forward and backward, peak", memory.forward_backward - memory.gathered, mine["peak"]),
        ("optimizer's step, peak", memory.optimizer_step, mine["step"]),
        ("gathered a step", plan.gathered, mine["gathered"]),
        ("resident, peak", memory.peak + mapped, mine["resident"]),
        ("Pss, all ranks, between steps",
         plan.files + ranks * (memory.static - memory.base + plan.eight_bits + _persistent(plan)),
         sum(each["pss"] for each in found)),
    ]  # fmt: skip
    lines = [[f"{ranks} rank(s)", "planned", "measured", "measured / planned"]]
    for name, planned, measured in rows:
        ratio = f"{measured / planned:.3f}" if planned else "-"
        lines.append([name, f"{planned / 1e6:.2f}", f"{measured / 1e6:.2f}", ratio])
    print("\n".join(table(lines)))
    print(f"collectives that gather: planned {plan.gather_calls}, measured {mine['calls']:.0f}\n", flush=True)


def _persistent(plan: Plan) -> int:
    return sum(plan.trained.persistent) * plan.trained.bytes_each if plan.trained.ranks > 1 else 0


def measure(ranks: int, folder: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """Of every rank."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    # glibc keeps freed memory for itself; what is freed shall be seen to be (mallopt(3))
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (ranks, port, folder, options, results), nprocs=ranks)
    return [measured for _, measured in sorted(results.get() for _ in range(ranks))]


def _rank(rank: int, ranks: int, port: int, folder: str, options: argparse.Namespace, results: Any) -> None:
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launched.items()})
    torch.set_num_threads(1)
    start_distributed()
    results.put((rank, _measured(folder, options)))
    dist.barrier()
    os._exit(0)  # gloo's threads often abort at interpreter exit, after right results


def _measured(folder: str, options: argparse.Namespace) -> dict[str, float]:
    _train(f"{folder}/tiny", options, warm_up=True)  # libraries and code are in memory
    gc.collect()
    tensors, resident, pss = _alive(), _status("VmRSS"), _pss()
    return _train(folder, options, False, tensors, resident, pss)


def _train(
    folder: str, options: argparse.Namespace, warm_up: bool, tensors: int = 0, resident: int = 0, pss: int = 0
) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if options.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inject(model, _adapter(options))
    engine, *_ = initialize(model=model, config=_ds_config(options))
    ids = torch.randint(64 if warm_up else options.vocabulary, (options.rows, options.seq_len))
    positions = torch.arange(options.seq_len).expand(options.rows, -1) % (options.seq_len // 2)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions.contiguous()}
    counter = CollectiveCounter()
    found: dict[str, float] = {}
    for _ in range(1 if warm_up else STEPS):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts afresh
        counter.reset()
        with counter.counting():
            loss = token_nll(engine, batch)
            engine.backward(loss / ids.numel())
            del loss
            engine.step()
        found["resident"] = _status("VmHWM") - resident
        found["gathered"], found["calls"] = counter.gathered_bytes, counter.calls
    gc.collect()
    dist.barrier()
    found["held"], found["pss"] = _alive() - tensors, _pss() - pss
    dist.barrier()
    with MemoryMeter() as meter:
        loss = token_nll(engine, batch)
        found["kept"] = meter.live
        engine.backward(loss / ids.numel())
        del loss
    found["peak"] = meter.peak
    with MemoryMeter() as meter:
        engine.step()
    found["step"] = meter.peak
    engine.destroy()
    return found


def _alive() -> int:
    """Bytes of all storages of tensors that Python knows of."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _pss() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    cli.run(main)
