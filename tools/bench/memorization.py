"""The MoRA paper's memorisation task: how many steps until random UUID pairs are memorised?

    python tools/bench/memorization.py [--base MODEL] [--pairs 64] [--steps 400] [--rank 8]
    [--seeds 3] ...

Full training, LoRA, MoRA and ReMoRA, at equal trainable parameters, on one engine (ZeRO,
AdamW, a constant learning rate after a warm-up): each learns, of pairs of 32 hex digits,
the second from the first, at every learning rate of its sweep. At intervals the second is
generated greedily; the share of right digits is the character accuracy (1/16 is chance); a
trial that knows everything ends. A digit is one token here, so rows need no padding.
Prints, at each method's best learning rate (largest mean accuracy over all intervals), the
accuracy over steps, mean over seeds, and the steps to 90%; `--json FILE` keeps all trials.

The default is for two cores: the demo's small Llama, warm-started on prose. The paper's:
Llama-2 7B,

    --base LLAMA_2_7B --pairs 10000 --batch 1000 --micro_batch 20 --steps 1000 --every 100 --rank 8 (and 256)

A small base, frozen, would spend its adapter on learning that digits follow digits:
--digit_steps 300 teaches it that first, on pairs that are asked for nowhere.
"""

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

# A bare checkout, not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mora_ds import Run, initialize, inject
from mora_ds.adapters.config import AdapterConfig, LoRAConfig, MoRAConfig
from mora_ds.common.errors import COUNT, UserError, refuse, unknown, wrong_values
from mora_ds.engine import zero
from mora_ds.engine.initialize import initialize_full, start_distributed
from mora_ds.remora.schedule import Schedule, ScheduleKind
from mora_ds.runtime import cli
from tools.bench.measuring import only_rank, zero3_config
from tools.bench.report import Report, bench_parser
from tools.bench.trials import at_edge
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

Results = dict[float, list[dict[str, Any]]]
"""Learning rate -> what each seed has found with it."""


def main() -> None:
    options = _options()
    _check(options)
    os.environ.update(only_rank())
    base = str(prepared_base(options.base, options.work, options.digit_steps))
    start_distributed()
    results: dict[str, Results] = {}
    for name in options.methods:
        results[name] = {}
        for rate in options.rates or METHODS[name].rates:
            print(f"{name} at {rate:g}", flush=True)
            seeds = range(1, options.seeds + 1)
            results[name][rate] = [
                trained(METHODS[name], base, rate, seed, options) for seed in seeds
            ]
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
    }
    parser = bench_parser(__doc__, numbers)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("out/bench_memorization"),
        help="folder for the base",
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
        "--rates", nargs="+", type=float, help="instead of each method's own sweep"
    )
    return parser.parse_args()


def _check(options: argparse.Namespace) -> None:
    refuse(
        unknown("--methods", name, METHODS)
        for name in options.methods
        if name not in METHODS
    )
    counts = (
        "rank",
        "pairs",
        "batch",
        "micro_batch",
        "steps",
        "every",
        "probe",
        "cycles",
        "seeds",
    )
    refuse(wrong_values(options, dict.fromkeys(counts, COUNT)))
    if options.batch % options.micro_batch:
        raise UserError(
            f"--batch {options.batch} is no multiple of --micro_batch {options.micro_batch}"
        )
    if "remora" in options.methods and options.steps // options.cycles <= RAMP:
        raise UserError(
            f"--steps {options.steps} make cycles of {options.steps // options.cycles}, no longer than the re-warmup"
        )


# -- one trial ---------------------------------------------------------------------------------------------------------


def trained(
    method: Method, base: str, rate: float, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Train once and measure: trained parameters, and at each measurement the step, the
    accuracy and the loss.
    """
    torch.manual_seed(seed)
    rows = Digits(base).rows(options.pairs, seed)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = _ds_config(rate, options)
    if method.adapter is None:
        count = sum(parameter.numel() for parameter in model.parameters())
        engine, *_ = initialize_full(model=model, config=config)
    else:
        count = inject(model, method.adapter(rank=options.rank, seed=seed)).trainable_params
        engine, *_ = initialize(model=model, config=config)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(engine, base=base, folder=folder) if method.merges else None
        result = {
            "seed": seed,
            "trained": count,
            **_learned(engine, run, rows, rate, seed, options),
        }
    engine.destroy()
    return result


def _learned(
    engine: zero.Engine,
    run: Run | None,
    rows: Tensor,
    rate: float,
    seed: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    every = options.steps // options.cycles if run is not None else 0
    schedule = Schedule(
        ScheduleKind.CONSTANT,
        rate,
        options.steps,
        WARMUP,
        merge_every=every,
        restart_warmup_steps=RAMP,
    )
    draw = random.Random(f"order/{seed}")
    merges: list[int] = []
    measured = [*range(options.every, options.steps, options.every), options.steps]
    shares: list[float] = []
    losses: list[float] = []
    for step in range(1, options.steps + 1):
        zero.set_learning_rate(engine, schedule.learning_rate(step - 1, merges))
        loss = _step(
            engine,
            rows,
            [draw.randrange(len(rows)) for _ in range(options.batch)],
            options.micro_batch,
        )
        if run is not None and schedule.merges_after(step):
            run.merge(step)
            merges.append(step)
        if step in measured:
            shares.append(accuracy(engine, rows[: options.probe]))
            losses.append(loss)
            if shares[-1] >= LEARNT:
                break
    # Of a trial that knows everything: its curve is flat from there
    unmeasured = len(measured) - len(shares)
    return {
        "ended_at": step,
        "steps": measured,
        "accuracy": shares + shares[-1:] * unmeasured,
        "loss": losses + losses[-1:] * unmeasured,
    }


def _step(engine: zero.Engine, rows: Tensor, chosen: list[int], micro_batch: int) -> float:
    total = 0.0
    for first in range(0, len(chosen), micro_batch):
        ids = rows[chosen[first : first + micro_batch]].to(engine.device)
        loss = engine(input_ids=ids, labels=labels_of(ids), use_cache=False).loss
        engine.backward(loss)
        engine.step()
        total += loss.item() * micro_batch / len(chosen)
    return total


def _ds_config(rate: float, options: argparse.Namespace) -> dict[str, Any]:
    return zero3_config(
        options.micro_batch,
        gradient_accumulation_steps=options.batch // options.micro_batch,
        gradient_clipping=1.0,
        optimizer={"type": "AdamW", "params": {"lr": rate, "weight_decay": 0.0}},
    )


# -- the table ---------------------------------------------------------------------------------------------------------


def _row(method: str, by_rate: Results, shown: Sequence[int]) -> list[str]:
    """A method at the learning rate of the largest mean accuracy, at the measurements
    `shown`.
    """
    rate = max(
        by_rate, key=lambda rate: sum(sum(result["accuracy"]) for result in by_rate[rate])
    )
    seeds = by_rate[rate]
    percents = [[100 * result["accuracy"][index] for result in seeds] for index in shown]
    means = [f"{fmean(percent):.1f}" for percent in percents[:-1]]
    known = "/".join(_known_at(result) for result in seeds)
    edge = at_edge(rate, list(by_rate))
    return [
        method, f"{seeds[0]['trained']:,}", f"{rate:g}{edge}", *means, mean_and_spread(percents[-1]), known
    ]  # fmt: skip


def _known_at(result: dict[str, Any]) -> str:
    """The first measured step with `KNOWN` of the digits; "-" where there is none."""
    measured = zip(result["steps"], result["accuracy"], strict=True)
    return next((str(step) for step, accuracy in measured if accuracy >= KNOWN), "-")


def _show(results: dict[str, Results], options: argparse.Namespace) -> None:
    """Print the table, with at most ten of the measurements."""
    runs = [
        {"method": method, "rate": rate, **result}
        for method, by_rate in results.items()
        for rate, seeds in by_rate.items()
        for result in seeds
    ]
    steps = runs[0]["steps"]
    last = len(steps) - 1
    every = -(-len(steps) // 10)
    shown = [*range(every - 1, last, every), last]
    rows = [
        [
            "method",
            "trained",
            "best lr",
            *(str(steps[index]) for index in shown),
            f"to {KNOWN:.0%}",
        ]
    ]
    rows += [_row(method, by_rate, shown) for method, by_rate in results.items()]
    report = Report(options)
    report.say(
        f"Character accuracy (%) of {options.probe} of {options.pairs} pairs after N steps of {options.batch} pairs, "
        f"rank {options.rank}, {options.seeds} seed(s), each at its best learning rate (*: the sweep's edge); first "
        f"measured step with {KNOWN:.0%} of each seed."
    )
    report.show("memorization", rows)
    report.points["runs"] = runs
    report.write()


if __name__ == "__main__":
    cli.run(main)
