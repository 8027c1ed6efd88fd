"""The MoRA paper's memorisation task: how many steps until random UUID pairs are memorised?

    python tools/bench/memorization.py [--base MODEL] [--pairs 64] [--steps 400] [--rank 8] [--seeds 3] [--jobs 2] ...

Full training, LoRA, MoRA and ReMoRA, at equal trainable parameters, on one engine (ZeRO, AdamW, a constant learning
rate after a warm-up): each learns, of pairs of 32 hex digits, the second from the first, at every learning rate of
its sweep. At intervals the second is generated greedily; the share
of right digits is the character accuracy (1/16 is chance); a trial that knows everything ends. A digit is one token
here, so rows need no padding. Prints, at each method's best learning rate (largest mean accuracy over all intervals),
the accuracy over steps, mean over seeds, and the steps to 90%; `--json FILE` keeps all trials. A trial that is done is
kept.

The default is for two cores: the demo's small Llama, warm-started on prose. The paper's: Llama-2 7B,

    --base LLAMA_2_7B --pairs 10000 --batch 1000 --micro_batch 20 --steps 1000 --every 100 --rank 8 (and 256)

A small base, frozen, would spend its adapter on learning that digits follow digits: --digit_steps 300 teaches it that
first, on pairs that are asked for nowhere.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a bare checkout, not installed

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mora_ds import Run, initialize, inject
from mora_ds.adapters.config import AdapterConfig, LoRAConfig, MoRAConfig
from mora_ds.common.errors import COUNT, UserError, refuse, unknown, wrong_values
from mora_ds.common.files import write_json_atomic
from mora_ds.engine import zero
from mora_ds.engine.initialize import initialize_full, start_distributed
from mora_ds.remora.schedule import Schedule, ScheduleKind
from mora_ds.runtime import cli
from tools.bench.measuring import zero3_config
from tools.bench.report import Report, bench_parser
from tools.bench.trials import at_edge, run_all, run_alone
from tools.bench.uuid_pairs import Digits, accuracy, labels_of, prepared_base
from tools.tables import mean_and_spread

WARMUP = 10
RAMP = 5
KNOWN = 0.9
LEARNT = 0.995


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    rates: tuple[float, ...]
    adapter: type[AdapterConfig] | None = MoRAConfig
    """None: every parameter is trained."""
    merges: bool = False


METHODS: dict[str, Method] = {
    "full": Method((3e-4, 1e-3, 3e-3), adapter=None),
    "lora": Method((1e-3, 3e-3, 1e-2), adapter=LoRAConfig),
    "mora": Method((3e-3, 1e-2, 3e-2)),
    "remora": Method((3e-3, 1e-2, 3e-2), merges=True),
}


@dataclass(frozen=True)
class Trial:
    """One method at one rate with one seed; everything that its result hangs on."""

    method: str
    rate: float
    seed: int
    base: str
    rank: int
    pairs: int
    batch: int
    micro_batch: int
    steps: int
    every: int
    probe: int
    cycles: int

    @property
    def name(self) -> str:
        """Of its folder; without what the base is, which has a folder of its own."""
        return "-".join(str(value) for name, value in asdict(self).items() if name != "base")


def main() -> None:
    options = _options()
    if options.trial is not None:
        run_trial(Trial(**json.loads(options.trial)), options.work)
        return
    _check(options)
    options.base = str(prepared_base(options.base, options.work, options.digit_steps))
    trials = list(_trials(options))
    run_all(trials, lambda trial: _start(trial, options.work), options.jobs)
    results = [(trial, json.loads((options.work / trial.name / "result.json").read_text())) for trial in trials]
    _show(results, options)


def _options() -> argparse.Namespace:
    numbers = {
        "digit_steps": (0, "teach the base first what digits look like"),
        "rank": (8, "LoRA's rank; MoRA matrices have about as many"),
        "pairs": (64, "pairs to memorise"),
        "batch": (32, "pairs an optimizer step"),
        "micro_batch": (32, "pairs at a time"),
        "steps": (400, "optimizer steps"),
        "every": (50, "steps from one measurement to the next"),
        "probe": (32, "pairs that are generated at each measurement"),
        "cycles": (4, "of ReMoRA: merges, and one more"),
        "seeds": (3, "runs of each method at every learning rate"),
        "jobs": (2, "runs side by side, one thread each"),
    }
    parser = bench_parser(__doc__, numbers)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("out/bench_memorization"),
        help="folder for everything",
    )
    parser.add_argument(
        "--base",
        type=Path,
        help="model folder. Default: a small Llama, warm-started on prose",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        metavar="METHOD",
        help=", ".join(METHODS),
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        help="instead of each method's own sweep",
    )
    parser.add_argument("--trial", help=argparse.SUPPRESS)
    return parser.parse_args()


def _check(options: argparse.Namespace) -> None:
    refuse(unknown("--methods", name, METHODS) for name in options.methods if name not in METHODS)
    counts = ("rank", "pairs", "batch", "micro_batch", "steps", "every", "probe", "cycles", "seeds", "jobs")
    refuse(wrong_values(options, dict.fromkeys(counts, COUNT)))
    if options.batch % options.micro_batch:
        raise UserError(f"--batch {options.batch} is no multiple of --micro_batch {options.micro_batch}")
    if "remora" in options.methods and options.steps // options.cycles <= RAMP:
        raise UserError(
            f"--steps {options.steps} make cycles of {options.steps // options.cycles}, no longer than the re-warmup"
        )


def _trials(options: argparse.Namespace) -> Iterator[Trial]:
    shared = ("base", "rank", "pairs", "batch", "micro_batch", "steps", "every", "probe", "cycles")
    for name in options.methods:
        for rate in options.rates or METHODS[name].rates:
            for seed in range(1, options.seeds + 1):
                yield Trial(
                    name,
                    rate,
                    seed,
                    **{field_name: getattr(options, field_name) for field_name in shared},
                )


def _start(trial: Trial, work: Path) -> None:
    """As its launcher's only rank, in a process of its own, unless it has been run."""
    folder = work / trial.name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "result.json").is_file():
        command = [sys.executable, __file__, "--work", str(work), "--trial", json.dumps(asdict(trial))]
        run_alone(command, folder / "log")


# -- one trial ---------------------------------------------------------------------------------------------------------


def run_trial(trial: Trial, work: Path) -> None:
    """Trains and measures; writes result.json."""
    start_distributed()
    torch.manual_seed(trial.seed)
    rows = Digits(trial.base).rows(trial.pairs, trial.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(trial.base, dtype=torch.float32)
    method = METHODS[trial.method]
    run = None
    if method.adapter is None:
        trained = sum(parameter.numel() for parameter in model.parameters())
        engine, *_ = initialize_full(model=model, config=_ds_config(trial))
    else:
        trained = inject(model, method.adapter(rank=trial.rank, seed=trial.seed)).trainable_params
        engine, *_ = initialize(model=model, config=_ds_config(trial))
        if method.merges:
            run = Run(
                engine,
                base=trial.base,
                folder=work / trial.name / "run",
                overwrite=True,
            )
    every = trial.steps // trial.cycles if method.merges else 0
    schedule = Schedule(
        ScheduleKind.CONSTANT,
        trial.rate,
        trial.steps,
        WARMUP,
        merge_every=every,
        restart_warmup_steps=RAMP,
    )
    result: dict[str, Any] = {"trained": trained, "steps": [], "accuracy": [], "loss": []}
    draw = random.Random(f"order/{trial.seed}")
    merges = list[int]()
    for step in range(trial.steps):
        zero.set_learning_rate(engine, schedule.learning_rate(step, merges))
        loss = _step(
            engine,
            rows,
            [draw.randrange(len(rows)) for _ in range(trial.batch)],
            trial.micro_batch,
        )
        if run is not None and schedule.merges_after(step + 1):
            run.merge(step + 1)
            merges.append(step + 1)
        if (step + 1) % trial.every == 0 or step + 1 == trial.steps:
            result["steps"].append(step + 1)
            result["accuracy"].append(accuracy(engine, rows[: trial.probe]))
            result["loss"].append(loss)
            if result["accuracy"][-1] >= LEARNT:
                break
    _fill(result, trial)
    write_json_atomic(work / trial.name / "result.json", result)


def _fill(result: dict[str, Any], trial: Trial) -> None:
    """A trial ends once it knows everything; what is left of its curve is flat."""
    measured = [*range(trial.every, trial.steps, trial.every), trial.steps]
    result["ended_at"] = result["steps"][-1]
    for name in ("accuracy", "loss"):
        result[name] += result[name][-1:] * (len(measured) - len(result["steps"]))
    result["steps"] = measured


def _step(engine: zero.Engine, rows: Tensor, chosen: Sequence[int], micro_batch: int) -> float:
    total = 0.0
    for first in range(0, len(chosen), micro_batch):
        ids = rows[list(chosen[first : first + micro_batch])].to(engine.device)
        loss = engine(input_ids=ids, labels=labels_of(ids), use_cache=False).loss
        engine.backward(loss)
        engine.step()
        total += loss.item() * micro_batch / len(chosen)
    return total


def _ds_config(trial: Trial) -> dict[str, Any]:
    return zero3_config(
        trial.micro_batch,
        gradient_accumulation_steps=trial.batch // trial.micro_batch,
        gradient_clipping=1.0,
        zero_optimization={"stage": 3},
        optimizer={"type": "AdamW", "params": {"lr": trial.rate, "weight_decay": 0.0}},
    )


# -- the table ---------------------------------------------------------------------------------------------------------


Results = dict[float, list[dict[str, Any]]]
"""Learning rate -> what each seed has found with it."""


def _by_rate(method: str, results: Sequence[tuple[Trial, dict[str, Any]]]) -> Results:
    by_rate: Results = {}
    for trial, result in results:
        if trial.method == method:
            by_rate.setdefault(trial.rate, []).append(result)
    return by_rate


def _row(method: str, by_rate: Results, shown: Sequence[int], options: argparse.Namespace) -> list[str]:
    """A method at the learning rate of the largest mean accuracy, at the measurements `shown`."""
    rate = max(by_rate, key=lambda rate: sum(sum(result["accuracy"]) for result in by_rate[rate]))
    seeds = by_rate[rate]
    percents = [[100 * result["accuracy"][index] for result in seeds] for index in shown]
    means = [f"{fmean(percent):.1f}" for percent in percents[:-1]]
    edge = at_edge(rate, options.rates or METHODS[method].rates)
    known = "/".join(_known_at(result) for result in seeds)
    trained = f"{seeds[0]['trained']:,}"
    return [method, trained, f"{rate:g}{edge}", *means, mean_and_spread(percents[-1]), known]


def _known_at(result: dict[str, Any]) -> str:
    """The first measured step with `KNOWN` of the digits; "-" where there is none."""
    measured = zip(result["steps"], result["accuracy"], strict=True)
    return next((str(step) for step, accuracy in measured if accuracy >= KNOWN), "-")


def _show(results: Sequence[tuple[Trial, dict[str, Any]]], options: argparse.Namespace) -> None:
    """Print the table, with at most ten of the measurements."""
    steps = results[0][1]["steps"]
    last = len(steps) - 1
    every = -(-len(steps) // 10)
    shown = [*range(every - 1, last, every), last]
    rows = [["method", "trained", "best lr", *(str(steps[index]) for index in shown), f"to {KNOWN:.0%}"]]
    rows += [_row(method, _by_rate(method, results), shown, options) for method in options.methods]
    report = Report(options)
    report.say(
        f"Character accuracy (%) of {options.probe} of {options.pairs} pairs after N steps of {options.batch} pairs, "
        f"rank {options.rank}, {options.seeds} seed(s), each at its best learning rate (*: the sweep's edge); first "
        f"measured step with {KNOWN:.0%} of each seed."
    )
    report.show("memorization", rows)
    report.points["runs"] = [
        {"method": trial.method, "rate": trial.rate, "seed": trial.seed, **result} for trial, result in results
    ]
    report.write()


if __name__ == "__main__":
    cli.run(main)
