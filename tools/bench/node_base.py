"""One base a node against one a process (--node_base): memory of the base after merges, CPU time of a merge.

    python tools/bench/node_base.py --folder DIR [--ranks 1 2 4 --width 1024 --layers 4 --rank 8 --cycles 3]

A Llama of random weights, whose file is mapped, is trained under ZeRO-3 on CPU processes: a step and a merge, several
times. Memory is the Pss (shared pages divided among those who share them) of everything that maps the base's file or
the memory of the node, all processes together, by /proc/PID/smaps; before the first merge and after the last one. Time
is a process's own CPU time in a merge, so that processes which share cores can be compared: the largest of all
processes, the median of all merges. The choices alternate, each in processes of its own.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a bare checkout, not installed

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import mora_ds
from mora_ds.models.base import write_own_base
from mora_ds.runtime import cli
from tools.bench.measuring import llama_config, on_processes, zero3_config
from tools.bench.report import Report, json_flag

SEQUENCE, VOCABULARY = 32, 2048
CHOICES = ("private", "auto", "shared")


def main() -> None:
    options = _options()
    work = options.folder / "bench_node_base"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    report = Report(options)
    try:
        torch.manual_seed(0)
        config = llama_config(options.width, options.layers, VOCABULARY, SEQUENCE)
        dtype = torch.bfloat16 if options.bf16 else torch.float32
        base = write_own_base(AutoModelForCausalLM.from_config(config, dtype=dtype), work / "base")
        report.say(f"base {base.nbytes / 1e6:.0f} MB in {dtype}, {options.cycles} merges of rank {options.rank}")
        report.show("node_base", _rows(options, work, base.nbytes, dtype))
        report.write()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _rows(options: argparse.Namespace, work: Path, size: int, dtype: torch.dtype) -> list[list[str]]:
    """Memory as a multiple of the base's size, time as a multiple of a private merge's on as many processes."""
    rows = [["processes", "--node_base", "before merges", "after merges", "CPU of a merge, s", "of a private one"]]
    for world in options.ranks:
        found: dict[str, list[dict[str, Any]]] = {choice: [] for choice in CHOICES}
        for turn in range(options.repeat):
            for choice in CHOICES:
                out = work / f"{world}-{choice}-{turn}"
                found[choice] += [_together(on_processes(world, _merges, options, work / "base", out, choice, dtype))]
                shutil.rmtree(out)
        for choice, runs in found.items():
            before, after = (max(run[when] for run in runs) / size for when in ("before", "after"))
            seconds = median(run["seconds"] for run in runs)
            ratio = median(run["seconds"] / other["seconds"] for run, other in zip(runs, found["private"], strict=True))
            rows.append([str(world), choice, f"{before:.3f}", f"{after:.3f}", f"{seconds:.3f}", f"{ratio:.2f}"])
    return rows


def _together(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Memory of all processes, and the CPU time of the busiest one."""
    merges = [max(times) for times in zip(*(rank["seconds"] for rank in ranks), strict=True)]
    sums = {when: sum(rank[when] for rank in ranks) for when in ("before", "after")}
    return {**sums, "seconds": median(merges[1:] or merges)}  # the first one copies what it will share


def _merges(options: argparse.Namespace, folder: Path, out: Path, choice: str, dtype: torch.dtype) -> dict[str, Any]:
    """One process: Pss of its base, and its CPU seconds in each merge."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    adapter = mora_ds.MoRAConfig(rank=options.rank, operator="share", compute="activation")
    mora_ds.inject(model, adapter)
    settings = zero3_config(1, bf16={"enabled": dtype is torch.bfloat16})
    engine, *_ = mora_ds.initialize(model=model, config=settings, node_base=choice)
    run = mora_ds.Run(engine, adapter, folder, out)
    ids = torch.randint(VOCABULARY, (1, SEQUENCE), generator=torch.Generator().manual_seed(dist.get_rank()))

    def step() -> None:
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()

    step()
    before, seconds = _pss_of_base(folder), []
    for cycle in range(1, options.cycles + 1):
        started = time.process_time()
        run.merge(cycle)
        seconds.append(time.process_time() - started)
        step()
    return {"before": before, "after": _pss_of_base(folder), "seconds": seconds}


def _pss_of_base(folder: Path) -> int:
    """Bytes of this process's part of what lies behind the base, once all processes are here."""
    dist.barrier()
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            counts = str(folder) in line or "memfd:mora_ds" in line
        elif counts and line.startswith("Pss:"):
            total += int(line.split()[1]) * 1024
    dist.barrier()
    return total


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True, help="for the base and the runs; left as it was")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="processes of the node")
    parser.add_argument("--width", type=int, default=1024, help="of the model")
    parser.add_argument("--layers", type=int, default=4, help="how many")
    parser.add_argument("--rank", type=int, default=8, help="of MoRA")
    parser.add_argument("--cycles", type=int, default=3, help="merges of each run")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each choice; medians count")
    parser.add_argument("--bf16", action="store_true")
    json_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
