"""Which adapter learns a new domain best, at equal trainable parameters? One table,
from one engine.

    python tools/bench/learning.py [--work FOLDER] [--rank 8] [--steps 200] [--seeds 3]
    python tools/bench/learning.py --rank 1 2 4 8 --steps 3000 --methods lora@0.01 full@0.001
    python tools/bench/learning.py --base MODEL --new law.jsonl law_held.jsonl --old web.jsonl web_held.jsonl

A model that knows the old text is continued on the new one by every method of a YAML
file (learning.yaml in this folder), at every learning rate of its sweep, the best one
with more seeds; batches, their order and the schedule are the same for all. Best is the
least perplexity on the new text; of learning rates that are as good within 1%, the one
that leaves least on the old one. By default the model is a small Llama, warm-started on
prose and continued on code, both made out of the running Python. Each run is
`launch/pretrain.py` with other flags, on one process.

Every finished run leaves FOLDER/results/NAME.json and is not repeated while its base,
texts and flags are the same, so the command goes on where it was stopped. A table grows
over days and machines: `--with FILE` takes over the runs of earlier `--json` files, and
refuses those of another base, other texts or other flags.

Prints, at each method's best learning rate, both perplexities, mean and largest
deviation over seeds, and the part of LoRA's distance to full training that is closed.
`--json FILE` keeps all runs with their curves, which `tools/figures.py` draws for the
pages.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

# A bare checkout, not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mora_ds.common.errors import (
    BELOW_1,
    COUNT,
    UserError,
    out_of_bounds,
    raise_validation_errors,
    unknown,
    wrong_values,
)
from mora_ds.common.files import read_json, sha256_file, write_json_atomic
from mora_ds.data import load_tokenizer, tokenizer_fingerprint
from mora_ds.models.base import BaseCheckpoint
from mora_ds.runtime import cli
from mora_ds.train.demo import MODEL_CONFIG, WARM_START
from tools.bench.learning_methods import METHODS_FILE, Methods
from tools.bench.report import Report, bench_parser
from tools.bench.trials import at_edge, pretrain_alone, run_all, warm_base
from tools.runs import Row, rows_of
from tools.tables import mean_and_spread

NEW = "new"
OLD = "old"
SECONDS = "s/step"
MEMORY = "peak GiB"
COSTS = (SECONDS, MEMORY)
"""What a run costs: seconds of a step on one core, and the peak of memory."""
AS_GOOD = 1.01
"""Learning rates within this factor of the best perplexity on the new text are equal."""
EVALUATIONS = 4
"""Evaluations of a run: evenly spaced, the last one at its end."""
FILE_FLAGS = (
    "model_name_or_path",
    "train_files",
    "eval_files",
    "cache_dir",
    "output_dir",
    "save_steps",
)
"""Flags of a run that only name its files."""


@dataclass(frozen=True)
class Texts:
    """What the runs start from and learn: a model's folder, and files of text."""

    base: Path
    new: Path
    new_held: Path
    old: Path
    old_held: Path

    @cached_property
    def marks(self) -> dict[str, str]:
        """Digests of the base with its tokenizer, and of the texts."""
        model = BaseCheckpoint.open(self.base).fingerprint()
        tokenizer = tokenizer_fingerprint(load_tokenizer(self.base))
        files = (self.new, self.new_held, self.old, self.old_held)
        contents = " ".join(sha256_file(file) for file in files)
        return {"base": _digest(model + tokenizer), "texts": _digest(contents)}


@dataclass(frozen=True)
class Trial:
    """One run."""

    method: str
    rate: float
    seed: int
    settings: dict[str, Any]
    """Flags of the training program; output_dir names the run."""
    texts: Texts
    rank: int
    """One of `--rank`; 0 where the method's own flags decide."""

    @property
    def folder(self) -> Path:
        return Path(self.settings["output_dir"])

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def result(self) -> Path:
        return self.folder.parents[1] / "results" / f"{self.name}.json"

    @property
    def marks(self) -> dict[str, str]:
        """Digests of base, texts and flags: the same wherever their files lie."""
        flags = {
            name: value
            for name, value in self.settings.items()
            if name not in FILE_FLAGS
        }
        replayed = [
            f"old={word.rpartition(':')[2]}" for word in flags.pop("replay", [])
        ]
        if "eval_tasks" in flags:
            flags["eval_tasks"] = [Path(name).name for name in flags["eval_tasks"]]
        # The empty string stands for a setting that earlier reports had
        text = json.dumps([flags, replayed, ""], sort_keys=True)
        return {**self.texts.marks, "flags": _digest(text)}

    def read(self) -> dict[str, Any] | None:
        """The result of the run; None if it was not run with these marks."""
        if not self.result.is_file():
            return None
        result = read_json(self.result)
        return result if result["marks"] == self.marks else None

    def write(self, result: Mapping[str, Any]) -> None:
        """Put `result` where `read` finds it."""
        self.result.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(self.result, result)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main() -> None:
    options = _options()
    _check(options)
    methods = Methods.read(options.methods_file)
    methods.settings.update(_shared_settings(options))
    if options.compute is not None:
        methods.compute_by(options.compute)
    if options.replay is not None:
        methods.replay(options.replay)
    rates_of = methods.chosen(options.methods or list(methods.methods))
    trials = partial(_trials, options, methods, _texts(options))
    earlier = [trial for path in options.runs for trial in _take(path, methods, trials)]

    swept = list(
        trials(rates_of, range(1, min(options.sweep_seeds, options.seeds) + 1))
    )
    run_all(swept, _run, options.jobs)
    best = best_rates(rows_of(_found([*earlier, *swept])))

    more = trials(rates_of, range(options.sweep_seeds + 1, options.seeds + 1))
    repeated = [trial for trial in more if trial.rate == best[trial.method, trial.rank]]
    run_all(repeated, _run, options.jobs)

    order = list(methods.methods)

    def place(trial: Trial) -> tuple[float, ...]:
        rank = trial.rank if len(options.rank) > 1 else 0
        return rank, order.index(trial.method), trial.rate, trial.seed

    _report(options, sorted([*earlier, *swept, *repeated], key=place), best)


# -- settings --------------------------------------------------------------------------


def _options() -> argparse.Namespace:
    defaults = {
        "work": (Path("out/bench_learning"), "folder for everything"),
        "base_config": (
            MODEL_CONFIG,
            "config of the model that is warm-started where there is no --base",
        ),
        "base_steps": (
            WARM_START["max_steps"],
            "steps of its warm start; 0 leaves the model untrained",
        ),
        "base_rate": (WARM_START["learning_rate"], "and their learning rate"),
        "steps": (200, "optimizer steps of each run"),
        "seeds": (3, "runs of each method at its best learning rate"),
        "sweep_seeds": (2, "of them at every learning rate of the sweep"),
        "jobs": (os.cpu_count() or 1, "runs side by side, one thread each"),
        "methods_file": (METHODS_FILE, "YAML file that defines the methods"),
    }
    parser = bench_parser(__doc__, defaults)
    add = parser.add_argument
    add(
        "--base",
        type=Path,
        help="model folder. Default: a small Llama, warm-started on prose",
    )
    add("--bf16", action="store_true", help="the warm start and all runs in bf16")
    pair: dict[str, Any] = {"type": Path, "nargs": 2, "metavar": ("TRAIN", "HELD")}
    add("--new", help="the new text, with --base", **pair)
    add("--old", help="what the base knows, with --base", **pair)
    add(
        "--rank",
        type=int,
        nargs="+",
        default=[8],
        help="LoRA's rank, or several; MoRA matrices have about as many parameters. "
        "Methods without one run once",
    )
    add(
        "--batch",
        type=int,
        help="sequences of a step. Default: those of --methods_file",
    )
    add(
        "--compute",
        choices=("activation", "weight"),
        help="how MoRA layers compute in all runs. Default: by their shapes; in bf16 the "
        "paths round differently",
    )
    add(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="of lm-eval, at the end of every run (--eval_tasks)",
    )
    add(
        "--replay",
        type=float,
        help="share of the old text in every batch. Default: each method's own",
    )
    add(
        "--methods",
        nargs="+",
        metavar="METHOD[@RATE]",
        help="those of the file to run, each at the learning rates that it is given with, "
        "if any. Default: all",
    )
    add(
        "--with",
        dest="runs",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="earlier --json files, whose runs count too",
    )
    return parser.parse_args()


def _check(options: argparse.Namespace) -> None:
    counts = dict.fromkeys(("steps", "batch", "seeds", "sweep_seeds", "jobs"), COUNT)
    raise_validation_errors(wrong_values(options, {**counts, "replay": BELOW_1}))
    for rank in options.rank:
        raise_validation_errors(out_of_bounds("rank", rank, COUNT))
    if len({paths is None for paths in (options.base, options.new, options.old)}) > 1:
        raise UserError(
            "--base, --new and --old belong together: give all three, or none for the "
            "demo's model and texts"
        )
    texts = [options.base, *options.new, *options.old] if options.base else []
    for path in (*texts, *options.runs):
        if not path.exists():
            flags = "--with" if path in options.runs else "--base, --new and --old"
            raise UserError(f"{flags}: there is no {path}")


def _shared_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The flags of all runs that the command line gives."""
    settings = {
        "bf16": options.bf16 or None,
        "per_device_train_batch_size": options.batch,
        "eval_tasks": options.tasks,
        # The user's own task files
        "trust_remote_code": True if options.tasks else None,
    }
    return {name: value for name, value in settings.items() if value is not None}


def _texts(options: argparse.Namespace) -> Texts:
    if options.base is not None:
        paths = (options.base, *options.new, *options.old)
        return Texts(*(path.resolve() for path in paths))
    demo = warm_base(
        options.work / "base",
        options.base_config,
        bf16=options.bf16,
        max_steps=options.base_steps,
        learning_rate=options.base_rate,
    )
    # No steps: the runs train from scratch
    base = demo.warm if options.base_steps else demo.start
    names = ("domain_train", "domain_eval", "general_train", "general_eval")
    return Texts(base, *(demo.corpus / f"{name}.jsonl" for name in names))


# -- runs ------------------------------------------------------------------------------


def _trials(
    options: argparse.Namespace,
    methods: Methods,
    texts: Texts,
    rates_of: Mapping[str, Sequence[float]],
    seeds: Iterable[int],
) -> Iterator[Trial]:
    """The runs at every rank, learning rate and seed. A method that learns nothing has
    seed 1 only."""
    batch = "" if options.batch is None else f"x{options.batch}"
    shared = {
        "model_name_or_path": texts.base,
        "train_files": [texts.new],
        "eval_files": [f"{OLD}={texts.old_held}", f"{NEW}={texts.new_held}"],
        "cache_dir": options.work / "tokens",
        "max_steps": options.steps,
        "eval_steps": max(1, options.steps // EVALUATIONS),
        "eval_on_start": False,
        "save_steps": 0,
        "overwrite_output_dir": True,
    }
    for name, rates in rates_of.items():
        method = methods.methods[name]
        ranks = options.rank if method.has_rank else options.rank[:1]
        for rank, rate, seed in product(ranks, rates, seeds):
            if not method.learns and seed != 1:
                continue
            run = f"r{rank}-{options.steps}{batch}-{name}-{rate:g}-{seed}"
            settings = {
                **shared,
                "mora_rank": rank,
                "seed": seed,
                "output_dir": options.work / "runs" / run,
                **methods.settings,
                **method.settings(rate, options.steps, texts.old),
            }
            yield Trial(name, rate, seed, settings, texts, rank * method.has_rank)


def _take(
    path: Path, methods: Methods, trials: Callable[..., Iterable[Trial]]
) -> list[Trial]:
    """Take over the runs of an earlier report. Raises `UserError` for one unlike
    these."""
    taken = []
    for run in read_json(path)["runs"]:
        method = run["method"]
        if method not in methods.methods:
            problem = unknown("--methods_file", method, methods.methods)
            raise UserError(f"--with {path}: {problem}")
        # One for each rank
        candidates = list(trials({method: [run["learning_rate"]]}, [run["seed"]]))
        same = [trial for trial in candidates if trial.marks == run["marks"]]
        if not same:
            marks = candidates[0].marks.items()
            unlike = [name for name, mark in marks if run["marks"].get(name) != mark]
            raise UserError(
                f"--with {path}: not the same {', '.join(unlike)} as here: "
                f"{candidates[0].name}"
            )
        same[0].write(run)
        taken.append(same[0])
    return taken


def _run(trial: Trial) -> None:
    """Run what has not been run, and write its result."""
    if trial.read() is not None:
        return
    trial.folder.parent.mkdir(parents=True, exist_ok=True)
    pretrain_alone(trial.settings, trial.folder.with_name(f"{trial.name}.log"))
    summary = read_json(trial.folder / "summary.json")
    lines = (trial.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    trial.write(
        {
            "method": trial.method,
            "learning_rate": trial.rate,
            "seed": trial.seed,
            "trained": summary["trainable_params"],
            "perplexity": summary["perplexity_after"],
            "curve": [
                {"step": row["step"], **row["eval_perplexity"]}
                for row in rows
                if "eval_perplexity" in row
            ],
            "loss": [[row["step"], row["loss"]] for row in rows if "loss" in row],
            "marks": trial.marks,
            "scores": _scores(rows),
            "cost": _cost(summary, rows),
        }
    )


def _cost(
    summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Of a run's steps: empty if it has none. The median of the seconds, as other
    programs may have slowed some steps."""
    seconds = [row["step_time_s"] for row in rows if "step_time_s" in row]
    if not seconds:
        return {}
    return {SECONDS: median(seconds), MEMORY: summary["peak_memory_bytes"] / 2**30}


def _scores(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Task -> its last score in metrics.jsonl: the accuracy, or else its first
    metric."""
    scored = [row["tasks"] for row in rows if "tasks" in row]
    return {
        name: scores.get("acc", next(iter(scores.values())))
        for name, scores in (scored[-1] if scored else {}).items()
    }


def _found(trials: Iterable[Trial]) -> list[dict[str, Any]]:
    """The results of the runs that have ended, each once, with their rank."""
    by_name = {trial.name: trial for trial in trials}
    return [{**(trial.read() or {}), "rank": trial.rank} for trial in by_name.values()]


# -- the table -------------------------------------------------------------------------


def best_rates(rows: Sequence[Row]) -> dict[tuple[str, int], float]:
    """Method and rank -> its best learning rate, by the seeds that all of
    its learning rates have."""
    best = {}
    for kind in dict.fromkeys(row.kind for row in rows):
        candidates = [row for row in rows if row.kind == kind]
        seeds = set.intersection(*(row.seeds for row in candidates))
        least = min(row.mean(NEW, seeds) for row in candidates)
        good = [row for row in candidates if row.mean(NEW, seeds) <= AS_GOOD * least]
        best[kind] = min(good, key=lambda row: row.mean(OLD, seeds)).rate
    return best


def _report(
    options: argparse.Namespace,
    trials: Sequence[Trial],
    best: Mapping[tuple[str, int], float],
) -> None:
    report = Report(options)
    ranks = ", ".join(map(str, options.rank))
    report.say(
        f"perplexity after {options.steps} steps, rank {ranks}, up to {options.seeds} seed(s), at the best"
        " learning rate on the new text of each sweep (*: at its edge); gap: how much of LoRA's distance to full"
        " training is closed, on the seeds that all three have"
    )
    runs = [
        {**run, "is_best": run["learning_rate"] == best[run["method"], run["rank"]]}
        for run in _found(trials)
    ]
    report.show("learning", _table(rows_of(runs), best, len(options.rank) > 1))
    report.write(runs=runs)


def _table(
    rows: Sequence[Row], best: Mapping[tuple[str, int], float], with_ranks: bool
) -> list[list[str]]:
    """The titles and a line for each method and rank at its best learning rate, without
    the columns that are empty in all of them."""
    shown = [row for row in rows if row.rate == best[row.kind]]
    tasks = list(
        dict.fromkeys(
            task for row in shown for run in row.runs for task in _of_tasks(run)
        )
    )
    titles = ["rank", "method", "trained", "learning rate", "seeds", NEW, OLD, "gap"]
    lines = [[*titles, *tasks, *COSTS]]
    for row in shown:
        swept = [candidate.rate for candidate in rows if candidate.kind == row.kind]
        peers = [peer for peer in shown if peer.rank in (0, row.rank) or not row.rank]
        lines.append(
            [
                str(row.rank or "-") if with_ranks else "-",
                row.method,
                f"{row.trained:,}",
                rate_cell(row, swept),
                str(len(row.runs)),
                mean_and_spread(row.perplexities(NEW)),
                mean_and_spread(row.perplexities(OLD)),
                gap_cell(row, {peer.method: peer for peer in peers}),
                *(_score(row, task) for task in tasks),
                *(_cost_cell(row, cost) for cost in COSTS),
            ]
        )
    columns = [
        column
        for column in zip(*lines, strict=True)
        if any(cell != "-" for cell in column[1:])
    ]
    return [list(line) for line in zip(*columns, strict=True)]


def _of_tasks(run: Mapping[str, Any]) -> dict[str, float]:
    """Runs before `--tasks` existed have no scores."""
    scores: dict[str, float] = run.get("scores", {})
    return scores


def _score(row: Row, task: str) -> str:
    scores = [_of_tasks(run)[task] for run in row.runs if task in _of_tasks(run)]
    return f"{fmean(scores):.1%}" if scores else "-"


def _cost_cell(row: Row, cost: str) -> str:
    """The mean of the seeds. Runs before costs were kept have none."""
    costs = [run["cost"][cost] for run in row.runs if run.get("cost")]
    return f"{fmean(costs):.2f}" if costs else "-"


def rate_cell(row: Row, swept: Sequence[float]) -> str:
    return f"{row.rate:g}{at_edge(row.rate, swept)}" if row.trained else "-"


def gap_cell(row: Row, peers: Mapping[str, Row]) -> str:
    """The fraction of the distance from LoRA to full training that a method closes, on the
    new text; "-" where full training is less than 5% ahead, as there is no distance
    then."""
    if row.method in ("lora", "full") or not {"lora", "full"} <= set(peers):
        return "-"
    seeds = row.seeds & peers["lora"].seeds & peers["full"].seeds
    if not (row.trained and seeds):
        return "-"
    lora = peers["lora"].mean(NEW, seeds)
    full = peers["full"].mean(NEW, seeds)
    if lora <= 1.05 * full:
        return "-"
    return f"{(lora - row.mean(NEW, seeds)) / (lora - full):.0%}"


if __name__ == "__main__":
    cli.run(main)
