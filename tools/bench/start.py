"""From the command to the first step: what the base's size adds in seconds and in memory, over all ranks of a node.

    python tools/bench/start.py --folder DIR [--gigabytes 1 --ranks 2]

Runs `launch/pretrain.py` for one step with a base of that size (random bf16 weights, written to DIR first) and a tiny
one; the difference is the base's. Seconds count until the first step begins: by the clock, and as CPU time of all
ranks, of which other processes take none. Memory is the ranks' Pss (shared pages divided among those who share them)
in that step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a bare checkout, not installed

import psutil
import torch
from transformers import AutoModelForCausalLM

from mora_ds.common.errors import RunError
from mora_ds.data import load_tokenizer, train_sentencepiece
from mora_ds.models.base import write_own_base
from mora_ds.runtime import cli
from tools.bench.measuring import ROOT, llama_config, memory_of
from tools.bench.report import Report, json_flag

VOCABULARY = 512


@dataclass(frozen=True)
class Start:
    """One start of a run."""

    seconds: float
    """Until the first step began."""
    cpu: float
    """Seconds of CPU time of all ranks until then."""
    pss: int
    """Bytes of all ranks together, at their highest in the first step."""


def main() -> None:
    options = _options()
    report, rows = Report(options), [["turn", "start, s", "of CPU", "with a tiny base, s", "of CPU"]]
    work = options.folder / "bench_start"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        text = work / "text.txt"
        text.write_text("\n\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("mora_ds/**/*.py"))))
        large, tiny = _base(work, text, "large", options.gigabytes), _base(work, text, "tiny", 0.0)
        reading = median(_read(large) for _ in range(3))
        size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
        report.say(f"base {size / 1e9:.2f} GB, read in {reading:.2f} s; {options.ranks} ranks")
        ones, others = [], []
        for turn in range(options.repeat):
            ones.append(_start(large, text, work / f"large-{turn}", options.ranks))
            others.append(_start(tiny, text, work / f"tiny-{turn}", options.ranks))
            seconds = [f"{each:.1f}" for start in (ones[-1], others[-1]) for each in (start.seconds, start.cpu)]
            rows.append([str(turn), *seconds])
        report.show("start", rows)
        clock = median(one.seconds - other.seconds for one, other in zip(ones, others, strict=True))
        cpu = median(one.cpu - other.cpu for one, other in zip(ones, others, strict=True))
        memory = median(one.pss - other.pss for one, other in zip(ones, others, strict=True))
        report.say(f"the base adds {clock:.1f} s to the start, and {cpu:.1f} s of CPU time, all ranks together")
        report.say(f"the base adds {memory / 1e9:.2f} GB of Pss, all ranks together: {memory / size:.2f} x its size")
        report.write()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _base(work: Path, text: Path, name: str, gigabytes: float) -> Path:
    """A model folder with a tokenizer. Width 2048 where the size allows: 0.1 GB a layer in bf16."""
    layers = max(1, round(gigabytes * 1e9 / (2 * (4 * 2048**2 + 3 * 2048 * 5504)))) if gigabytes else 1
    width = 2048 if gigabytes else 64
    torch.manual_seed(0)
    config = llama_config(width, layers, VOCABULARY, 512, mlp=43 * width // 16)
    trained = train_sentencepiece([text.read_text(encoding="utf-8")], VOCABULARY, work)
    write_own_base(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), work / name, load_tokenizer(trained))
    return work / name


def _read(folder: Path) -> float:
    buffer = bytearray(1 << 24)
    started = time.perf_counter()
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def _start(base: Path, text: Path, out: Path, ranks: int) -> Start:
    argv = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "launch/pretrain.py"),
        *("--deepspeed", "configs/zero3.json", "--model_name_or_path", str(base), "--train_files", str(text)),
        *("--output_dir", str(out), "--cache_dir", str(out.parent / "cache"), "--max_steps", "1", "--seq_len", "32"),
        *("--per_device_train_batch_size", "1", "--bf16", "--mora_rank", "8", "--compute", "activation"),
    ]
    log, peak, started = out.with_suffix(".log"), 0, time.time()
    used: list[tuple[float, float]] = []
    with log.open("w") as file, subprocess.Popen(argv, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT) as runner:
        while (first := _first_step(out / "metrics.jsonl")) is None:
            if runner.poll() is not None:
                raise RunError(f"the run ended with code {runner.returncode}:\n{log.read_text()[-2000:]}")
            ranks_now = _ranks(runner.pid)
            used.append((time.time(), sum(map(_cpu, ranks_now))))
            peak = max(peak, sum(memory_of("Pss", rank) for rank in ranks_now))
            time.sleep(0.05)
        ended = (out / "metrics.jsonl").stat().st_mtime
        if runner.wait():
            raise RunError(f"the run ended with code {runner.returncode}:\n{log.read_text()[-2000:]}")
    cpu = max(seconds for moment, seconds in [(0.0, 0.0), *used] if moment <= ended - first)
    return Start(ended - first - started, cpu, peak)


def _first_step(metrics: Path) -> float | None:
    """Seconds that the first step took, once it is logged."""
    if not metrics.is_file():
        return None
    rows = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
    return next((row["step_time_s"] for row in rows if row.get("step") == 1 and "step_time_s" in row), None)


def _ranks(launcher: int) -> list[int]:
    """Processes below the launcher that hold a model."""
    return sorted(process.pid for process in psutil.Process(launcher).children(recursive=True))


def _cpu(process: int) -> float:
    """Seconds of CPU time so far; 0 where the process has ended."""
    try:
        words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure; left as it was")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the base")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="starts of each; medians count")
    json_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
