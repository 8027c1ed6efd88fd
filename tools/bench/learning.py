"""Which adapter learns a new domain best, at equal trainable parameters? One table, from
one engine.

    python tools/bench/learning.py [--work FOLDER] [--rank 8] [--steps 200] [--seeds 3]
    [--methods lora full@0.003] python tools/bench/learning.py --rank 1 2 4 8 --steps 3000
    --methods lora@0.01 mora-rotate@0.01 full@0.001 python tools/bench/learning.py --base
    MODEL --new law.jsonl law_held.jsonl --old web.jsonl web_held.jsonl

A model that knows the old text is continued on the new one by every method of a YAML file
(learning.yaml beside this one), at every learning rate of its sweep, the best one with more
seeds; batches, their order and the schedule are the same for all. Best is the least
perplexity on the new text; of learning rates that are as good within 1%, the one that
leaves least on the old one. By default the model is a small Llama, warm-started on prose
and continued on code, both made out of the running Python. Each run is `launch/pretrain.py`
with other flags, on one process.

Every finished run leaves FOLDER/results/NAME.json and is not repeated while its base, texts and flags are the same, so
the command goes on where it was stopped. A table grows over days and machines: `--with FILE` takes over the runs of
earlier `--json` files, and refuses those of another base, other texts or other flags. Prints, at each method's best
learning rate, both perplexities, mean and largest deviation over seeds, and the part of LoRA's distance to full
training that is closed; `--json FILE` keeps all runs with their curves, of which `tools/figures.py --learning FILE
--output FOLDER` draws the curves.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mora_ds.common.errors import (
    COUNT,
    UserError,
    out_of_bounds,
    refuse,
    unknown,
    wrong_values,
)
from mora_ds.common.files import read_json, write_json_atomic
from mora_ds.runtime import cli
from mora_ds.train.demo import MODEL_CONFIG, WARM_START
from tools.bench.learning_methods import METHODS_FILE, Methods
from tools.bench.learning_texts import NEW, OLD, Texts, digest
from tools.bench.report import Report, bench_parser
from tools.bench.trials import at_edge, pretrain_alone, run_all, warm_base
from tools.tables import mean_and_spread

AS_GOOD = 1.01
"""Of the best perplexity on the new text."""
EVALUATIONS = 4
"""Of a run, evenly spaced, the last one at its end."""
PLACES = (
    "model_name_or_path",
    "train_files",
    "eval_files",
    "cache_dir",
    "output_dir",
    "save_steps",
)
"""Flags of a run that only say where its files lie, and which."""
KEPT = (
    "method",
    "learning_rate",
    "seed",
    "trained",
    "perplexity",
    "curve",
    "loss",
    "marks",
    "scores",
)
"""What `--json` keeps of a run; runs before `--tasks` existed have no scores."""


@dataclass(frozen=True)
class Trial:
    """One run."""

    method: str
    rate: float
    seed: int
    settings: dict[str, Any]
    """Flags of the training program; output_dir names the run."""
    texts: Texts
    rank: int = 0
    """Of those that `--rank` names; 0 where the method's own flags decide how much it
    trains.
    """

    @property
    def kind(self) -> tuple[str, int]:
        """What has a best learning rate: the method, at a rank."""
        return self.method, self.rank

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
        """What the run is known by: digests of the base, the texts and the flags, wherever
        their files lie.
        """
        flags = {name: value for name, value in self.settings.items() if name not in PLACES}
        replayed = [f"old={word.rpartition(':')[2]}" for word in flags.pop("replay", [])]
        if "eval_tasks" in flags:
            flags["eval_tasks"] = [Path(name).name for name in flags["eval_tasks"]]
        return {
            **self.texts.marks,
            "flags": digest(json.dumps([flags, replayed, ""], sort_keys=True)),
        }

    def read(self) -> dict[str, Any] | None:
        """What the run has found; None where it has not been run with this base, these
        texts and these flags.
        """
        result = read_json(self.result) if self.result.is_file() else None
        return result if result is not None and result["marks"] == self.marks else None


@dataclass(frozen=True)
class Row:
    """A method at one rank and learning rate, over its seeds."""

    method: str
    rank: int
    rate: float
    trained: int
    new: dict[int, float]
    """Seed -> perplexity on the new text."""
    old: dict[int, float]
    scores: dict[str, list[float]] = field(default_factory=dict)
    """Task -> the score of each seed."""

    @property
    def kind(self) -> tuple[str, int]:
        return self.method, self.rank


def main() -> None:
    options = _options()
    methods = Methods.read(options.methods_file)
    changes = {
        "bf16": options.bf16 or None,
        "per_device_train_batch_size": options.batch,
        "eval_tasks": options.tasks,
    }
    methods.change(changes, options.compute, options.replay)
    if options.methods is None:
        options.methods = list(methods.methods)
    options.rates_of = methods.chosen(options.methods)
    _check(options)
    texts = _texts(options)
    trials = partial(_trials, options, methods, texts)
    earlier = [trial for path in options.runs for trial in _take(path, methods, trials)]
    swept = list(
        trials(options.rates_of, range(1, min(options.sweep_seeds, options.seeds) + 1))
    )
    run_all(swept, _run, options.jobs)
    best = {row.kind: row.rate for row in _best(_rows([*earlier, *swept]))}
    more = trials(options.rates_of, range(options.sweep_seeds + 1, options.seeds + 1))
    repeated = [trial for trial in more if trial.rate == best[trial.kind]]
    run_all(repeated, _run, options.jobs)
    order_of = {name: number for number, name in enumerate(methods.methods)}
    all_trials = {trial.name: trial for trial in [*earlier, *swept, *repeated]}.values()

    def order(trial: Trial) -> tuple[float, ...]:
        return (
            len(options.rank) > 1 and trial.rank,
            order_of[trial.method],
            trial.rate,
            trial.seed,
        )

    _report(options, sorted(all_trials, key=order), best)


def _options() -> argparse.Namespace:
    numbers = {
        "base_steps": (
            WARM_START["max_steps"],
            "steps of its warm start; 0 leaves the model untrained",
        ),
        "base_rate": (WARM_START["learning_rate"], "and their learning rate"),
        "steps": (200, "optimizer steps of each run"),
        "seeds": (3, "runs of each method at its best learning rate"),
        "sweep_seeds": (2, "of them at every learning rate of the sweep"),
        "jobs": (os.cpu_count() or 1, "runs side by side, one thread each"),
    }
    parser = bench_parser(__doc__, numbers)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("out/bench_learning"),
        help="folder for everything",
    )
    parser.add_argument(
        "--base",
        type=Path,
        help="model folder. Default: a small Llama, warm-started on prose",
    )
    parser.add_argument(
        "--base_config", type=Path, default=MODEL_CONFIG, metavar="FILE",
        help="config of the model that is warm-started where there is no --base",
    )  # fmt: skip
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="the warm start and all runs in bf16",
    )
    parser.add_argument(
        "--new",
        type=Path,
        nargs=2,
        metavar=("TRAIN", "HELD"),
        help="the new text, with --base",
    )
    parser.add_argument(
        "--old",
        type=Path,
        nargs=2,
        metavar=("TRAIN", "HELD"),
        help="what the base knows, with --base",
    )
    parser.add_argument(
        "--rank", type=int, nargs="+", default=[8],
        help="LoRA's rank, or several; MoRA matrices have about as many parameters. Methods without one run once",
    )  # fmt: skip
    parser.add_argument(
        "--batch",
        type=int,
        help="sequences of a step. Default: those of --methods_file",
    )
    parser.add_argument(
        "--compute", choices=("activation", "weight"),
        help="how MoRA layers compute in all runs. Default: by their shapes; in bf16 the paths round differently",
    )  # fmt: skip
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="of lm-eval, at the end of every run (--eval_tasks)",
    )
    parser.add_argument(
        "--replay",
        type=float,
        help="share of the old text in every batch. Default: each method's own",
    )
    parser.add_argument(
        "--methods_file",
        type=Path,
        default=METHODS_FILE,
        help="YAML file that defines the methods",
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD[@RATE]",
        help="those of the file to run, each at the learning rates that it is given with, if any. Default: all",
    )  # fmt: skip
    parser.add_argument(
        "--with", dest="runs", type=Path, nargs="+", default=[], metavar="FILE",
        help="earlier --json files, whose runs count too",
    )  # fmt: skip
    return parser.parse_args()


def _check(options: argparse.Namespace) -> None:
    refuse(
        wrong_values(
            options,
            dict.fromkeys(("steps", "batch", "seeds", "sweep_seeds", "jobs"), COUNT),
        )
    )
    refuse(out_of_bounds(("rank", rank, COUNT) for rank in options.rank))
    for path in options.runs:
        if not path.is_file():
            raise UserError(f"--with: there is no {path}")
    if len({paths is None for paths in (options.base, options.new, options.old)}) > 1:
        raise UserError(
            "--base, --new and --old belong together: give all three, or none for the demo's model and texts"
        )


def _texts(options: argparse.Namespace) -> Texts:
    if options.base is not None:
        for path in (options.base, *options.new, *options.old):
            if not path.exists():
                raise UserError(f"--base, --new and --old: there is no {path}")
        return Texts.of(
            *(path.resolve() for path in (options.base, *options.new, *options.old))
        )
    warm = {
        "bf16": options.bf16,
        "max_steps": options.base_steps,
        "learning_rate": options.base_rate,
    }
    paths = warm_base(options.work / "base", 8, options.base_config, **warm)
    base = paths.warm if options.base_steps else paths.start  # no steps: from scratch
    return Texts.of(base, *(paths.corpus / f"{name}_{split}.jsonl" for name in ("domain", "general")
                                  for split in ("train", "eval")))  # fmt: skip


def _trials(
    options: argparse.Namespace, methods: Methods, texts: Texts, rates_of: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
) -> Iterator[Trial]:  # fmt: skip
    length = (
        f"{options.steps}" if options.batch is None else f"{options.steps}x{options.batch}"
    )
    for name, rates in rates_of.items():
        method = methods.methods[name]
        learns = method.flags.get("adapter") != "none"
        ranks = options.rank if method.has_rank else options.rank[:1]
        for rank, rate, seed in product(
            ranks,
            rates,
            seeds if learns else [number for number in seeds if number == 1],
        ):
            settings = {
                "model_name_or_path": texts.base, "train_files": [texts.new], "cache_dir": options.work / "tokens",
                "eval_files": [f"{OLD}={texts.old_held}", f"{NEW}={texts.new_held}"], "mora_rank": rank,
                "max_steps": options.steps, "eval_steps": max(1, options.steps // EVALUATIONS),
                "eval_on_start": False, "save_steps": 0, "overwrite_output_dir": True, "seed": seed,
                "output_dir": options.work / "runs" / f"r{rank}-{length}-{name}-{rate:g}-{seed}",
                **methods.settings, **method.settings(rate, options.steps, texts.old),
            }  # fmt: skip
            yield Trial(name, rate, seed, settings, texts, rank * method.has_rank)


def _take(
    path: Path, methods: Methods, trials: Callable[..., Iterable[Trial]]
) -> list[Trial]:
    """Put the runs of an earlier report among the finished ones. Raises `UserError` for one
    that is unlike these.
    """
    taken = []
    for run in read_json(path).get("runs", []):
        if run["method"] not in methods.methods:
            raise UserError(
                f"--with {path}: {unknown('--methods_file', run['method'], methods.methods)}"
            )
        alike = list(trials({run["method"]: [run["learning_rate"]]}, [run["seed"]]))
        if not alike:  # what learns nothing is measured with seed 1 alone
            raise UserError(
                f"--with {path}: {run['method']} with seed {run['seed']} is none of the runs here"
            )
        trial = next(
            (candidate for candidate in alike if candidate.marks == run.get("marks")),
            alike[0],
        )
        unlike = [
            name
            for name, mark in trial.marks.items()
            if run.get("marks", {}).get(name) != mark
        ]
        if unlike:
            raise UserError(
                f"--with {path}: not the same {', '.join(unlike)} as here: {trial.name}"
            )
        trial.result.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(trial.result, _kept(run))
        taken.append(trial)
    return taken


def _run(trial: Trial) -> None:
    """Run what has not been run, and write its result."""
    if trial.read() is not None:
        return
    trial.folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(trial.folder, ignore_errors=True)
    log = trial.folder.with_name(f"{trial.name}.log")
    pretrain_alone(trial.settings, log)
    summary = json.loads((trial.folder / "summary.json").read_text(encoding="utf-8"))
    lines = (trial.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    trial.result.parent.mkdir(exist_ok=True)
    write_json_atomic(trial.result, {
        "method": trial.method, "learning_rate": trial.rate, "seed": trial.seed,
        "trained": summary["trainable_params"], "perplexity": summary["perplexity_after"],
        "curve": [{"step": row["step"], **row["eval"]} for row in rows if "eval" in row],
        "loss": [[row["step"], row["loss"]] for row in rows if "loss" in row],
        "marks": trial.marks, "scores": _scores(rows),
    })  # fmt: skip


def _scores(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Task -> its last score in the rows of metrics.jsonl: the accuracy, or else its first
    metric.
    """
    tasks = [row["tasks"] for row in rows if "tasks" in row][-1:]
    return {
        name: scores.get("acc", next(iter(scores.values())))
        for scored in tasks
        for name, scores in scored.items()
    }


def _kept(run: Mapping[str, Any]) -> dict[str, Any]:
    return {key: run[key] for key in KEPT if key in run}


# -- the table ---------------------------------------------------------------------------------------------------------


def _report(
    options: argparse.Namespace,
    trials: Sequence[Trial],
    best: Mapping[tuple[str, int], float],
) -> None:
    shown = [row for row in _rows(trials) if row.rate == best[row.kind]]
    report = Report(options)
    ranks = ", ".join(map(str, options.rank))
    report.say(
        f"perplexity after {options.steps} steps, rank {ranks}, up to {options.seeds} seed(s), at the best"
        " learning rate on the new text of each sweep (*: at its edge); gap: how much of LoRA's distance to full"
        " training is closed, on the seeds that all three have"
    )
    swept = {
        row.kind: [
            candidate.rate for candidate in _rows(trials) if candidate.kind == row.kind
        ]
        for row in shown
    }
    report.show("learning", _table(shown, swept, len(options.rank) > 1))
    report.points["runs"] = [
        {**_kept(result), "rank": trial.rank, "is_best": trial.rate == best[trial.kind]}
        for trial in trials
        if (result := trial.read()) is not None
    ]
    report.write()


def _rows(trials: Sequence[Trial]) -> list[Row]:
    """One for each method, rank and learning rate, in their order."""
    rows = []
    for key in dict.fromkeys((*trial.kind, trial.rate) for trial in trials):
        runs = [
            run
            for trial in trials
            if (*trial.kind, trial.rate) == key and (run := trial.read()) is not None
        ]
        new, old = (
            {result["seed"]: result["perplexity"][name] for result in runs}
            for name in (NEW, OLD)
        )
        scores: dict[str, list[float]] = {}
        for run in runs:
            for name, score in run.get("scores", {}).items():
                scores.setdefault(name, []).append(score)
        rows.append(Row(*key, runs[0]["trained"], new, old, scores))
    return rows


def _best(rows: Sequence[Row]) -> list[Row]:
    """Of each method and rank, judged by the seeds that all of its learning rates have."""
    best = []
    for kind in dict.fromkeys(row.kind for row in rows):
        candidates = [row for row in rows if row.kind == kind]
        seeds = set.intersection(*(set(row.new) for row in candidates))
        new = {row.rate: sum(row.new[seed] for seed in seeds) for row in candidates}
        old = {row.rate: sum(row.old[seed] for seed in seeds) for row in candidates}
        good = [row for row in candidates if new[row.rate] <= AS_GOOD * min(new.values())]
        best.append(min(good, key=lambda row: old[row.rate]))
    return best


def _table(
    rows: Sequence[Row],
    rates: Mapping[tuple[str, int], Sequence[float]],
    with_ranks: bool,
) -> list[list[str]]:
    """The titles and a line for each row, without the columns that are empty in all of
    them.
    """
    tasks = list(dict.fromkeys(name for row in rows for name in row.scores))
    table = [
        ["rank", "method", "trained", "learning rate", "seeds", NEW, OLD, "gap", *tasks]
    ]
    for row in rows:
        peers = {
            peer.method: peer for peer in rows if peer.rank in (0, row.rank) or not row.rank
        }
        scores = [
            f"{fmean(row.scores[name]):.1%}" if name in row.scores else "-"
            for name in tasks
        ]
        perplexities = [
            mean_and_spread(list(seeds.values())) for seeds in (row.new, row.old)
        ]
        rank = str(row.rank or "-") if with_ranks else "-"
        rate = _rate(row, rates[row.kind])
        trained = f"{row.trained:,}"
        table.append(
            [
                rank,
                row.method,
                trained,
                rate,
                str(len(row.new)),
                *perplexities,
                _gap(row, peers),
                *scores,
            ]
        )
    filled = [
        index
        for index in range(len(table[0]))
        if any(line[index] != "-" for line in table[1:])
    ]
    return [[line[index] for index in filled] for line in table]


def _rate(row: Row, swept: Sequence[float]) -> str:
    return f"{row.rate:g}{at_edge(row.rate, swept)}" if row.trained else "-"


def _gap(row: Row, of: dict[str, Row]) -> str:
    """The part of the distance from LoRA to full training that a method closes, on the new
    text; "-" where full training is less than 5% ahead, as there is no distance then."""
    if row.method in ("lora", "full") or not {"lora", "full"} <= set(of) or not row.trained:
        return "-"
    lora = of["lora"].new
    full = of["full"].new
    if not (seeds := set(lora) & set(full) & set(row.new)):
        return "-"
    start, end, reached = (
        sum(perplexities[seed] for seed in seeds) for perplexities in (lora, full, row.new)
    )
    return f"{(start - reached) / (start - end):.0%}" if start > 1.05 * end else "-"


if __name__ == "__main__":
    cli.run(main)
