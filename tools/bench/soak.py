"""A long run of the training program: does a step, a merge or a process grow?

    deepspeed --num_gpus 2 tools/bench/soak.py --folder DIR [--steps 12040 --merge_every 40 --json FILE]

`mora-ds pretrain` trains a tiny Llama on Python's own code, with merges, evaluations, a
log, and checkpoints of which it keeps three. Each rank counts the CPU seconds of all its
threads, and at every hundredth of the run what its process holds. The table compares the
last tenth with the second one.

Other work on the cores changes CPU seconds too. So each rank also measures a step of the
same model alone, without adapter and DeepSpeed, which has no past: a step of the run is
given in such steps.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

# A bare checkout, not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoModelForCausalLM

from mora_ds.commands import pretrain
from mora_ds.config.arguments import parse
from mora_ds.data import domain_documents
from mora_ds.remora.merge import ReMoRA
from mora_ds.runtime import cli
from mora_ds.runtime.log_setup import set_up_logging
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.trainer import Trainer
from tools.bench.measuring import adamw_step, cpu_seconds, llama_config
from tools.bench.report import Report, bench_parser

MODEL = llama_config(64, 2, 512, 64)
DOCUMENTS = 300
FLAGS = (
    "--train_tokenizer_vocab 512 --seq_len 32 --per_device_train_batch_size 2 --mora_rank 4 --restart_warmup_steps 5 "
    "--save_steps 100 --save_total_limit 3 --eval_steps 400 --max_eval_batches 4 --report_to none --log_level warning"
)
PERIODS = 100
"""How often a rank looks at what it holds."""
LOOK_EVERY = 10
"""Steps from one step alone to the next."""

Period = dict[str, float]
"""What was counted in a hundredth of the run, by its name in the table."""


def main() -> None:
    numbers = {
        "steps": (12_040, "optimizer steps"),
        "merge_every": (40, "steps between merges"),
        "local_rank": (0, "the launcher's"),
    }
    parser = bench_parser(__doc__, numbers)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder")
    options = parser.parse_args()
    periods = _watched(options)
    by_rank = Ranks.current().gather("soak", periods)
    if int(os.environ["RANK"]) > 0:
        return
    report = Report(options)
    report.say(
        f"{options.steps:,} steps, a merge every {options.merge_every}, {len(by_rank)} ranks"
    )
    rows = [["", "second tenth", "last tenth", "ratio"]]
    for rank, counted in enumerate(by_rank):
        rows += _compared(rank, counted)
    report.show("tenths", rows)
    report.write(periods=by_rank[0])


def _flags(options: argparse.Namespace) -> list[str]:
    """The run's flags. Each rank writes its own text and model config."""
    own = options.folder / f"rank-{os.environ['RANK']}"
    own.mkdir(parents=True)
    texts = [document.text for document in domain_documents()[:DOCUMENTS]]
    lines = [json.dumps({"text": text}) for text in texts]
    (own / "text.jsonl").write_text("\n".join(lines[:-20]))
    (own / "held.jsonl").write_text("\n".join(lines[-20:]))
    MODEL.to_json_file(own / "config.json")
    return [
        *FLAGS.split(),
        *("--model_config", str(own / "config.json")),
        *("--train_files", str(own / "text.jsonl")),
        *("--eval_files", str(own / "held.jsonl")),
        *("--cache_dir", str(options.folder / "cache")),
        *("--output_dir", str(options.folder / "out")),
        *("--max_steps", str(options.steps)),
        *("--merge_every", str(options.merge_every)),
    ]


def _watched(options: argparse.Namespace) -> list[Period]:
    """Trains, and returns what this rank counted."""
    periods: list[Period] = []
    steps: list[float] = []
    merges: list[float] = []
    alone: list[float] = []
    step_alone = _step_alone()
    began = [time.process_time(), time.perf_counter()]
    every = max(LOOK_EVERY, options.steps // PERIODS)

    def look(trainer: Trainer) -> None:
        if trainer.state.step % every:
            return
        cpu_s = time.process_time() - began[0]
        wall_s = time.perf_counter() - began[1]
        periods.append(
            {
                "step": trainer.state.step,
                **_held(),
                "CPU ms a step, median": 1e3 * median(steps),
                "CPU ms a step, with all else": 1e3 * cpu_s / len(steps),
                "wall ms a step, with all else": 1e3 * wall_s / len(steps),
                "CPU ms a merge": 1e3 * median(merges or [0.0]),
                "CPU ms of a step alone": 1e3 * median(alone),
                "a step, in steps alone": median(steps) / median(alone),
                "a merge, in steps alone": median(merges or [0.0]) / median(alone),
            }
        )
        for seconds in (steps, merges, alone):
            seconds.clear()
        began[:] = time.process_time(), time.perf_counter()

    train_step = Trainer.train_step
    merge = ReMoRA.merge

    def watched_step(trainer: Trainer) -> None:
        steps.append(cpu_seconds(lambda: train_step(trainer)))
        if len(steps) % LOOK_EVERY == 0:
            alone.append(cpu_seconds(step_alone))
        look(trainer)

    def watched_merge(*arguments: Any) -> Any:
        started = time.process_time()
        report = merge(*arguments)
        merges.append(time.process_time() - started)
        return report

    Trainer.train_step = watched_step  # type: ignore[method-assign, assignment]
    ReMoRA.merge = watched_merge  # type: ignore[method-assign, assignment]
    set_up_logging("warning")
    pretrain.train(parse(_flags(options)))
    return periods


def _held() -> Period:
    """What this process holds now."""
    process = Path("/proc/self")
    pages = int((process / "statm").read_text().split()[1])
    return {
        "resident MB": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        "mappings": (process / "maps").read_text().count("\n"),
        "file descriptors": len(os.listdir(process / "fd")),
        "threads": len(os.listdir(process / "task")),
    }


def _step_alone() -> Callable[[], None]:
    model = AutoModelForCausalLM.from_config(MODEL)
    ids = torch.randint(MODEL.vocab_size, (2, 32))
    return adamw_step(model, lambda: model(input_ids=ids, labels=ids).loss)


def _compared(rank: int, periods: list[Period]) -> list[list[str]]:
    tenth = max(1, len(periods) // 10)
    rows = []
    for name in list(periods[0])[1:]:
        early = fmean(period[name] for period in periods[tenth : 2 * tenth])
        late = fmean(period[name] for period in periods[-tenth:])
        ratio = f"{late / early:.3f}" if early else ""
        rows.append([f"{name}, rank {rank}", f"{early:,.2f}", f"{late:,.2f}", ratio])
    return rows


if __name__ == "__main__":
    cli.run(main)
