"""Which adapter learns a new domain best, at equal trainable parameters? One table, from one engine.

    python tools/bench/learning.py [--work FOLDER] [--rank 8] [--steps 200] [--seeds 3] [--jobs 2] [--methods lora ...]

A small Llama is warm-started on prose and continued on code (both are made out of the running Python) by every method
at every learning rate of its sweep, the best one with more seeds; batches, their order and the schedule are the same
for all. Best is the least perplexity on code; of learning rates that are as good within 1%, the one that leaves least
on prose. `--methods replay-5 ...` set MoRA against itself with that percentage of prose in every batch. Each run is
`launch/pretrain.py` with other flags, on one rank. A run that is done is kept: the command goes on where it was
stopped. Prints, at each method's best learning rate, the perplexity on code and on prose, mean and largest deviation
over seeds; writes results.json, and learning.png where matplotlib is there. Curves: tensorboard --logdir FOLDER/runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mora_ds.common.errors import UserError, unknown
from mora_ds.runtime import cli
from mora_ds.train.demo import DemoPaths
from tools.bench.report import Report, json_flag
from tools.bench.trials import at_edge, mean_and_spread, pretrain_alone, run_all, save_figure, warm_base

LORA_RATES = MORA_RATES = (3e-3, 1e-2, 3e-2)
MUON_RATES = (1e-2, 3e-2, 1e-1)
FULL_RATES = (3e-4, 1e-3, 3e-3)
EMBEDDING_RATES = (1e-3, 3e-3, 1e-2)
ROWS, CYCLES, RAMP = 8, 4, 5
AS_GOOD = 1.01
"""Of the best perplexity on code."""


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    flags: dict[str, Any]
    rates: tuple[float, ...] = MORA_RATES
    merges: bool = False
    rate_flag: str = "learning_rate"
    """What is swept; with embeddings their learning rate, while the adapter keeps the one that is best without them."""
    replay: float = 0.0
    """Share of prose in every batch."""
    full_rank: float = 0.0
    """Share of the steps that train every parameter first."""


EMBEDDINGS = {"train_embeddings": True, "learning_rate": 1e-2}
EMBEDDING_RATE = "embedding_learning_rate"
METHODS: dict[str, Method] = {
    "none": Method({"adapter": "none"}, rates=(1e-3,)),
    "lora": Method({"adapter": "lora"}, LORA_RATES),
    "relora": Method({"adapter": "lora"}, LORA_RATES, merges=True),
    "mora-rotate": Method({"operator": "rotate"}),
    "mora-share": Method({"operator": "share"}),
    "remora-rotate": Method({"operator": "rotate"}, merges=True),
    "remora-share": Method({"operator": "share"}, merges=True),
    "remora-alternate": Method({"operator": "share", "grouping": "alternate"}, merges=True),
    "mora-muon": Method({"operator": "rotate", "optimizer": "muon"}, MUON_RATES, rate_flag="muon_learning_rate"),
    "remora-muon": Method({"operator": "rotate", "optimizer": "muon"}, MUON_RATES, True, "muon_learning_rate"),
    "lora-embeddings": Method({"adapter": "lora", **EMBEDDINGS}, EMBEDDING_RATES, rate_flag=EMBEDDING_RATE),
    "relora-embeddings": Method({"adapter": "lora", **EMBEDDINGS}, EMBEDDING_RATES, True, EMBEDDING_RATE),
    "mora-embeddings": Method({"operator": "rotate", **EMBEDDINGS}, EMBEDDING_RATES, rate_flag=EMBEDDING_RATE),
    "remora-embeddings": Method({"operator": "rotate", **EMBEDDINGS}, EMBEDDING_RATES, True, EMBEDDING_RATE),
    "muon-embeddings": Method(
        {"operator": "rotate", "optimizer": "muon", "muon_learning_rate": 3e-2, **EMBEDDINGS},
        EMBEDDING_RATES,
        rate_flag=EMBEDDING_RATE,
    ),
    "mora-warm": Method({"operator": "rotate", "full_rank_learning_rate": 1e-3}, full_rank=0.2),
    "mora-muon-warm": Method(
        {"operator": "rotate", "optimizer": "muon", "full_rank_learning_rate": 1e-3},
        MUON_RATES,
        False,
        "muon_learning_rate",
        full_rank=0.2,
    ),
    "full": Method({"adapter": "full"}, rates=FULL_RATES),
}
REPLAYS = {f"replay-{share}": Method({"operator": "rotate"}, (1e-2,), replay=share / 100) for share in (5, 10, 25)}
KNOWN = {**METHODS, **REPLAYS}


@dataclass(frozen=True)
class Trial:
    """One run."""

    method: str
    rate: float
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def summary(self) -> Path:
        return self.folder / "summary.json"


@dataclass(frozen=True)
class Row:
    """A method at one rate, over all seeds."""

    method: str
    rate: float
    trainable: int
    code: tuple[float, ...]
    prose: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.code) / len(self.code)


def main() -> None:
    options = _options()
    _check(options)
    paths = warm_base(options.work / "base", ROWS)
    swept = list(_trials(options, range(1, min(options.sweep_seeds, options.seeds) + 1)))
    run_all(swept, lambda trial: _run(trial, paths, options), options.jobs)
    best = {row.method: row.rate for row in _best([_row(group) for group in _groups(swept)])}
    more = _trials(options, range(options.sweep_seeds + 1, options.seeds + 1))
    repeated = [trial for trial in more if trial.rate == best[trial.method]]
    run_all(repeated, lambda trial: _run(trial, paths, options), options.jobs)
    rows = [_row(group) for group in _groups([*swept, *repeated])]
    (options.work / "results.json").write_text(json.dumps([vars(row) for row in rows], indent=1), encoding="utf-8")
    report = Report(options)
    report.say(
        f"perplexity after {options.steps} steps of {ROWS} x 128 tokens, rank {options.rank}, {options.seeds} seed(s);"
        " the best learning rate on code of each sweep (*: at its edge)"
    )
    report.show("learning", _table([row for row in rows if row.rate == best[row.method]], options))
    report.write()
    _plot(rows, options.work / "learning.png")


def _check(options: argparse.Namespace) -> None:
    wrong = [name for name in options.rates_of if name not in KNOWN]
    if wrong:
        raise UserError(unknown("--methods", wrong[0], KNOWN))
    counts = (options.steps // CYCLES - 1, options.rank, options.seeds, options.sweep_seeds, options.jobs)
    if min(counts) < 1 or options.steps <= CYCLES * RAMP:
        raise UserError(
            f"--steps must be more than {CYCLES * RAMP}; --rank, --seeds, --sweep_seeds and --jobs at least 1"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("out/bench_learning"), help="folder for everything")
    parser.add_argument("--rank", type=int, default=8, help="LoRA's rank; MoRA matrices have about as many")
    parser.add_argument("--steps", type=int, default=200, help=f"steps of {ROWS} x 128 tokens")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method at its best learning rate")
    parser.add_argument("--sweep_seeds", type=int, default=2, help="of them at every learning rate of the sweep")
    parser.add_argument("--rates", nargs="+", type=float, help="instead of each method's own sweep")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), metavar="METHOD[@RATE]",
        help=f"each at one learning rate where it is given with one: {', '.join(KNOWN)}",
    )  # fmt: skip
    json_flag(parser)
    options = parser.parse_args()
    options.rates_of = dict(_with_rates(each, options.rates) for each in options.methods)
    return options


def _with_rates(text: str, rates: list[float] | None) -> tuple[str, tuple[float, ...]]:
    """A method and the learning rates of its sweep. Raises `UserError` for a rate that is no number."""
    name, at, rate = text.partition("@")
    try:
        own = (float(rate),) if at else tuple(rates or ())
    except ValueError:
        raise UserError(f"--methods {text}: {rate!r} is no learning rate") from None
    return name, own or (KNOWN[name].rates if name in KNOWN else ())


def _trials(options: argparse.Namespace, seeds: range) -> Iterator[Trial]:
    for name, rates in options.rates_of.items():
        for rate in rates:
            for seed in seeds if name != "none" else [each for each in seeds if each == 1]:
                folder = f"r{options.rank}-{options.steps}-{name}-{rate:g}-{seed}"
                yield Trial(name, rate, seed, options.work / "runs" / folder)


def _run(trial: Trial, paths: DemoPaths, options: argparse.Namespace) -> None:
    if not trial.summary.is_file():
        method = KNOWN[trial.method]
        settings: dict[str, Any] = {
            "seq_len": 128, "per_device_train_batch_size": ROWS, "per_device_eval_batch_size": 16,
            "model_name_or_path": paths.warm, "train_files": paths.train_files("domain"),
            "eval_files": paths.eval_files, "cache_dir": paths.tokens, "output_dir": trial.folder,
            "overwrite_output_dir": True, "mora_rank": options.rank, "max_steps": options.steps,
            method.rate_flag: trial.rate, "lr_scheduler_type": "cosine", "min_lr_ratio": 0.1, "warmup_steps": 10,
            "logging_steps": 10, "eval_on_start": False, "seed": trial.seed, **method.flags,
        }  # fmt: skip
        if method.merges:
            settings |= {"merge_every": options.steps // CYCLES, "restart_warmup_steps": RAMP}
        if method.full_rank:
            settings["full_rank_steps"] = round(method.full_rank * options.steps)
        if method.replay:
            settings["replay"] = [f"old={paths.train_files('general')[0]}:{method.replay:g}"]
        trial.folder.parent.mkdir(parents=True, exist_ok=True)
        pretrain_alone(settings, trial.folder.with_name(f"{trial.name}.log"))


# -- the table ---------------------------------------------------------------------------------------------------------


def _groups(trials: Sequence[Trial]) -> list[list[Trial]]:
    keys = dict.fromkeys((trial.method, trial.rate) for trial in trials)
    return [[trial for trial in trials if (trial.method, trial.rate) == key] for key in keys]


def _row(trials: Sequence[Trial]) -> Row:
    found = [json.loads(trial.summary.read_text(encoding="utf-8")) for trial in trials]
    code, prose = (tuple(each["perplexity_after"][name] for each in found) for name in ("code", "prose"))
    return Row(trials[0].method, trials[0].rate, found[0]["trainable_params"], code, prose)


def _best(rows: Sequence[Row]) -> list[Row]:
    """Of each method."""
    found = []
    for name in _names(rows):
        own = [row for row in rows if row.method == name]
        least = min(row.mean for row in own)
        found.append(min((row for row in own if row.mean <= AS_GOOD * least), key=lambda row: sum(row.prose)))
    return found


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.method for row in rows))


def _table(rows: Sequence[Row], options: argparse.Namespace) -> list[list[str]]:
    titles = ["method", "trained", "learning rate", "seeds", "on code (new)", "±", "on prose (old)", "±"]
    cells = [
        [
            row.method, f"{row.trainable:,}", _rate(row, options.rates_of[row.method]), str(len(row.code)),
            *map("{:.1f}".format, (*mean_and_spread(row.code), *mean_and_spread(row.prose))),
        ]
        for row in rows
    ]  # fmt: skip
    return [titles, *cells]


def _rate(row: Row, swept: Sequence[float]) -> str:
    if row.method == "none":
        return "-"
    return f"{row.rate:g}" + (at_edge(row.rate, swept) if len(swept) > 1 else "")


def _plot(rows: Sequence[Row], path: Path) -> None:
    def draw(axes: Any) -> None:
        for name in _names(rows):
            swept = [row for row in rows if row.method == name]
            axes.plot([row.rate for row in swept], [row.mean for row in swept], marker="o", label=name)
        axes.set(xscale="log", xlabel="learning rate", ylabel="perplexity on code", title="after continued pretraining")
        axes.legend(fontsize="small")

    save_figure(path, draw)


if __name__ == "__main__":
    cli.run(main)
