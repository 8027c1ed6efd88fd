"""What merges, saves and the export cost, against one training step and against copying files. One table, one run.

    python tools/bench/cycle.py --folder DIR [--width 512 --layers 8 --rank 64 --tokens 4096 --cycles 10]

A Llama of random weights is trained on random tokens with ReMoRA under ZeRO-3, on one CPU rank (two ranks of a node
share its disk and memory, and add up). Step, merge, save at once, save in the background: the medians of alternating
repeats in one process, with `--cycles` merged cycles behind them. The export runs in a process of its own, as
`tools/export_hf.py` does, in turns with a copy of the base's files, both to DIR and on disk before the clock stops.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a bare checkout, not installed

import torch
from transformers import AutoModelForCausalLM

import mora_ds
from mora_ds.common.errors import UserError
from mora_ds.models.base import write_own_base
from mora_ds.runtime import cli
from tools.bench.measuring import ROOT, llama_config, memory_of, only_rank, seconds_of, zero3_config
from tools.bench.report import Report, json_flag

SEQUENCE, VOCABULARY = 512, 8192


@dataclass
class Subject:
    """A run that can be stepped, merged, saved and exported."""

    run: mora_ds.Run
    step: Callable[[], None]
    trained: int
    """Parameters."""
    done: int = 0


def main() -> None:
    options = _options()
    os.environ.update(only_rank())
    options.folder.mkdir(parents=True, exist_ok=True)
    work = options.folder / "bench_cycle"
    shutil.rmtree(work, ignore_errors=True)
    try:
        _measure(options, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _measure(options: argparse.Namespace, work: Path) -> None:
    report = Report(options)
    subject = _subject(options, work, work / "out", background=False)
    report.say(_setting(options, subject))
    for _ in range(options.cycles):
        subject.step()
        _merge(subject)
    steps, merges, saves = [], [], []
    for _ in range(options.repeat):
        steps.append(seconds_of(subject.step))
        saves.append(seconds_of(lambda: _save(subject)))
        steps.append(seconds_of(subject.step))
        merges.append(seconds_of(lambda: _merge(subject)))
    blocked, during = _background(options, work)
    export, copy, memory, largest = _export(options, work)
    step = median(steps)
    cycles = f"{options.cycles} to {options.cycles + options.repeat - 1} cycles behind it"
    rows = [
        ["what", "seconds", "against", "ratio"],
        ["a training step", f"{step:.3f}", "", ""],
        [f"a merge of all layers, {cycles}", f"{median(merges):.3f}", "a step", f"{median(merges) / step:.2f}"],
        ["a save, at once", f"{median(saves):.3f}", "a step", f"{median(saves) / step:.2f}"],
        ["a save in the background, blocked", f"{median(blocked):.3f}", "a step", f"{median(blocked) / step:.2f}"],
        ["the step during that save", f"{median(during):.3f}", "a step", f"{median(during) / step:.2f}"],
        ["an export", f"{median(export):.3f}", f"a copy ({median(copy):.3f} s)", f"{_ratio(export, copy):.2f}"],
    ]
    report.show("cycle", rows)
    budget = 2 * largest + 300e6
    report.say(
        f"the export took {memory / 1e6:.0f} MB beyond its imports; twice the largest tensor ({largest / 1e6:.0f} MB)"
        f" and 300 MB are {budget / 1e6:.0f} MB"
    )
    report.write()


def _subject(options: argparse.Namespace, work: Path, out: Path, background: bool) -> Subject:
    torch.manual_seed(0)
    config = llama_config(options.width, options.layers, VOCABULARY, SEQUENCE)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    base = write_own_base(model, work / "base")
    adapter = mora_ds.MoRAConfig(rank=options.rank)
    report = mora_ds.inject(model, adapter)
    rows = max(1, options.tokens // SEQUENCE)
    settings = zero3_config(rows, bf16={"enabled": options.bf16})
    engine, *_ = mora_ds.initialize(model=model, config=settings)
    ids = torch.randint(VOCABULARY, (rows, SEQUENCE))

    def step() -> None:
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()

    step()
    return Subject(mora_ds.Run(engine, adapter, base, out, async_save=background), step, report.trainable_params)


def _setting(options: argparse.Namespace, subject: Subject) -> str:
    """What is measured."""
    size = sum(path.stat().st_size for path in subject.run.remora.base.files())
    return (
        f"base {size / 1e6:.0f} MB in {'bf16' if options.bf16 else 'fp32'}, {subject.trained:,} trained,"
        f" {max(1, options.tokens // SEQUENCE)} x {SEQUENCE} tokens a step, {torch.get_num_threads()} thread(s)"
    )


def _merge(subject: Subject) -> None:
    subject.done += 1
    subject.run.merge(subject.done)


def _save(subject: Subject) -> None:
    subject.done += 1
    subject.run.save(subject.done, keep=1)


def _background(options: argparse.Namespace, work: Path) -> tuple[list[float], list[float]]:
    """Seconds that each save stopped training, and of the steps that ran while it was written."""
    subject = _subject(options, work, work / "background", background=True)
    blocked, during = [], []
    for _ in range(options.repeat):
        blocked.append(seconds_of(lambda: _save(subject)))
        during.append(seconds_of(subject.step))
        subject.run.wait()
    return blocked, during


def _export(options: argparse.Namespace, work: Path) -> tuple[list[float], list[float], int, int]:
    """Seconds of each export and of each copy; the export's anonymous memory; bytes of the largest tensor."""
    files = sorted((work / "base").glob("*.safetensors"))
    exports, copies, memory = [], [], 0
    for turn in range(options.repeat):
        copies.append(seconds_of(lambda: _copy(files, work / f"copy-{turn}")))  # noqa: B023
        seconds, peak = _export_once(work, work / f"merged-{turn}")
        exports.append(seconds)
        memory = max(memory, peak)
        shutil.rmtree(work / f"copy-{turn}")
        shutil.rmtree(work / f"merged-{turn}")
    largest = VOCABULARY * options.width * (2 if options.bf16 else 4)
    return exports, copies, memory, max(largest, 11 * options.width**2 // 4 * (2 if options.bf16 else 4))


def _copy(files: list[Path], target: Path) -> None:
    target.mkdir()
    for path in files:
        shutil.copyfile(path, target / path.name)
    os.sync()


def _export_once(work: Path, target: Path) -> tuple[float, int]:
    """(seconds without starting Python, bytes of anonymous memory beyond what the imports took)."""
    code = (
        "import sys, time, os; sys.path.insert(0, sys.argv[1])\n"
        "from mora_ds.deploy.export import export_merged; import mora_ds.checkpoint.verify\n"
        "print('ready', flush=True); sys.stdin.readline(); t = time.perf_counter()\n"
        "export_merged(sys.argv[2], sys.argv[3]); os.sync(); print(time.perf_counter() - t, flush=True)\n"
    )
    argv = [sys.executable, "-c", code, str(ROOT), str(work / "out"), str(target)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
        before = peak = memory_of("RssAnon", child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        os.set_blocking(child.stdout.fileno(), False)
        while not (line := child.stdout.readline()):
            if child.poll() is not None:
                raise UserError("the export failed")
            peak = max(peak, memory_of("RssAnon", child.pid))
            time.sleep(0.005)
    return float(line), peak - before


def _ratio(ones: list[float], others: list[float]) -> float:
    return median(one / other for one, other in zip(ones, others, strict=True))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure; left as it was")
    parser.add_argument("--width", type=int, default=512, help="of the model")
    parser.add_argument("--layers", type=int, default=8, help="how many")
    parser.add_argument("--rank", type=int, default=64, help="of MoRA")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--cycles", type=int, default=10, help="merged before the clock starts")
    parser.add_argument("--repeat", type=int, default=5, help="of everything; medians count")
    parser.add_argument("--bf16", action="store_true")
    json_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
