"""The MoRA paper's memorization task: how many steps until random UUID pairs are
memorized?

    python tools/bench/memorization.py [--base MODEL] [--pairs 64] [--steps 400] [--rank 8]
    [--seeds 3] ...

Full training, LoRA, MoRA and ReMoRA, at equal trainable parameters, on one engine
(ZeRO, AdamW, a constant learning rate after a warm-up): each learns, of pairs of 32 hex
digits, the second from the first, at every learning rate of its sweep. Eight times in a
run the second is generated greedily; the share of right digits is the character
accuracy (1/16 is chance). A digit is one token here, so rows need no padding. Prints,
at each method's best learning rate (largest mean accuracy over all measurements), the
accuracy over steps, mean over seeds, and the steps to 90%; `--json FILE` keeps all
runs.

The default is for two cores: the demo's small Llama, warm-started on prose. The
paper's: Llama-2 7B,

    --base LLAMA_2_7B --pairs 10000 --batch 1000 --micro_batch 20 --steps 1000 --rank 8 (and 256)

The small one, frozen, would spend its adapter on learning that digits follow digits: it
is taught that first, on pairs that are asked for nowhere.
"""

import argparse
import os
import random
import sys
import tempfile
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
from mora_ds.common.errors import (
    COUNT,
    Bounds,
    UserError,
    raise_validation_errors,
    wrong_values,
)
from mora_ds.common.files import atomic_folder
from mora_ds.config.lr_schedule import Schedule, ScheduleKind
from mora_ds.data import load_tokenizer
from mora_ds.engine import zero
from mora_ds.engine.initialize import initialize_full, start_distributed
from mora_ds.runtime import cli
from tools.bench.measuring import count_trained, only_rank, zero3_config
from tools.bench.report import Report, bench_parser
from tools.bench.trials import at_edge, warm_base
from tools.runs import Row, rows_of
from tools.tables import mean_and_spread

WARMUP = 10
RAMP = 5
"""Steps of the warm-up, and of the re-warmup after a merge."""
CYCLES = 4
"""Cycles of ReMoRA, with three merges between them."""
MEASUREMENTS = 8
"""Measurements of a run: evenly spaced, the last one at its end."""
PROBED = 32
"""Pairs that are generated at each measurement."""
KNOWN = 0.9
"""The fraction of the digits that counts as memorized."""

DIGIT_STEPS = 300
"""Steps in which the small base learns what digits look like."""
DIGITS = 32
HEX = "0123456789abcdef"


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


def main() -> None:
    options = _options()
    _check(options)
    os.environ.update(only_rank())
    base = options.base or small_base(options.work)
    start_distributed()
    runs = []
    for name in options.methods:
        for rate in options.rates or METHODS[name].rates:
            print(f"{name} at {rate:g}", flush=True)
            for seed in range(1, options.seeds + 1):
                result = _train(METHODS[name], base, rate, seed, options)
                run = {"method": name, "learning_rate": rate, "seed": seed}
                runs.append({**run, **result})
    _show(runs, options)


def _options() -> argparse.Namespace:
    defaults = {
        "work": (Path("out/bench_memorization"), "folder for the base"),
        "rank": (8, "LoRA's rank; MoRA matrices have about as many"),
        "pairs": (64, "pairs to memorize"),
        "batch": (32, "pairs an optimizer step"),
        "micro_batch": (32, "pairs at a time"),
        "steps": (400, "optimizer steps"),
        "seeds": (3, "runs of each method at every learning rate"),
    }
    parser = bench_parser(__doc__, defaults)
    parser.add_argument(
        "--base",
        type=Path,
        help="model folder. Default: a small Llama, made here",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        choices=list(METHODS),
        help="what is trained",
    )
    parser.add_argument(
        "--rates", nargs="+", type=float, help="instead of each method's own sweep"
    )
    return parser.parse_args()


def _check(options: argparse.Namespace) -> None:
    counts = dict.fromkeys(("rank", "pairs", "batch", "micro_batch", "seeds"), COUNT)
    # Longer cycles than the warm-up after a merge
    steps = Bounds(above=CYCLES * RAMP)
    raise_validation_errors(wrong_values(options, {**counts, "steps": steps}))
    if options.batch % options.micro_batch:
        raise UserError(
            f"--batch {options.batch} is no multiple of --micro_batch {options.micro_batch}"
        )


# -- the task --------------------------------------------------------------------------


def pairs_of_digits(base: Path, number: int, seed: int | str) -> Tensor:
    """(number, 2 * DIGITS + 2) token ids of the tokenizer of `base`: start, 32 random
    digits, separator, 32 random digits. Raises `UserError` where a digit has no token
    of its own."""
    tokenizer = load_tokenizer(base, flag="--base")
    *digits, separator = (
        tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in f"{HEX}="
    )
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    if len({*digits, separator, start}) < len(HEX) + 2:
        raise UserError(
            f"--base {base}: its tokenizer has no token of its own for every hex digit"
        )
    draw = random.Random(f"pairs/{seed}")

    def half() -> list[int]:
        return [draw.choice(digits) for _ in range(DIGITS)]

    return torch.tensor([[start, *half(), separator, *half()] for _ in range(number)])


def _labels(ids: Tensor) -> Tensor:
    """The labels: the second halves of the pairs alone."""
    labels = ids.clone()
    labels[:, :-DIGITS] = -100
    return labels


@torch.no_grad()
def _accuracy(engine: Any, rows: Tensor) -> float:
    """Share of digits that are right when the second halves are generated greedily from
    the first. The engine is in training mode afterwards."""
    engine.eval()
    ids = rows[:, :-DIGITS].to(engine.device)
    cache = None
    right = 0
    for position in range(DIGITS):
        output = engine(input_ids=ids, past_key_values=cache, use_cache=True)
        ids = output.logits[:, -1:].argmax(dim=-1)
        cache = output.past_key_values
        right += int((ids[:, 0].cpu() == rows[:, position - DIGITS]).sum())
    engine.train()
    return right / (len(rows) * DIGITS)


def small_base(work: Path) -> Path:
    """The demo's small Llama, warm-started on prose and then trained on pairs that
    never come again. It knows then that digits follow, and none of them, as a large
    pretrained model does by itself."""
    folder = work / "base-of-digits"
    if folder.is_dir():
        return folder
    warm = warm_base(work / "base").warm
    print("training on pairs that are not measured", flush=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(warm, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for ids in pairs_of_digits(warm, 16 * DIGIT_STEPS, "never again").split(16):
        model(input_ids=ids, labels=_labels(ids), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with atomic_folder(folder.absolute()) as partial:
        model.save_pretrained(partial)
        load_tokenizer(warm).save_pretrained(partial)
    return folder


# -- one run ---------------------------------------------------------------------------


def _train(
    method: Method, base: Path, rate: float, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Train once. Returns the number of trained parameters, and the step, accuracy and
    loss of each measurement."""
    torch.manual_seed(seed)
    rows = pairs_of_digits(base, options.pairs, seed)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = zero3_config(
        options.micro_batch,
        gradient_accumulation_steps=options.batch // options.micro_batch,
        gradient_clipping=1.0,
        optimizer={"type": "AdamW", "params": {"lr": rate, "weight_decay": 0.0}},
    )
    if method.adapter is not None:
        inject(model, method.adapter(rank=options.rank, seed=seed))
    trained = count_trained(model)
    make = initialize_full if method.adapter is None else initialize
    engine = make(model=model, config=config)[0]
    schedule = Schedule(
        ScheduleKind.CONSTANT,
        rate,
        options.steps,
        WARMUP,
        merge_every=options.steps // CYCLES if method.merges else 0,
        restart_warmup_steps=RAMP,
    )
    measured = [
        options.steps * (number + 1) // MEASUREMENTS for number in range(MEASUREMENTS)
    ]
    shares: list[float] = []
    losses: list[float] = []
    merges: list[int] = []
    draw = random.Random(f"order/{seed}")
    with tempfile.TemporaryDirectory() as folder:
        run = Run(engine, base=base, folder=folder) if method.merges else None
        for step in range(1, options.steps + 1):
            zero.set_learning_rate(engine, schedule.learning_rate(step - 1, merges))
            batch = rows[[draw.randrange(len(rows)) for _ in range(options.batch)]]
            loss = _step(engine, batch, options.micro_batch)
            if run is not None and schedule.merges_after(step):
                run.merge(step)
                merges.append(step)
            if step in measured:
                shares.append(_accuracy(engine, rows[:PROBED]))
                losses.append(loss)
    engine.destroy()
    return {"trained": trained, "steps": measured, "accuracy": shares, "loss": losses}


def _step(engine: zero.Engine, batch: Tensor, micro_batch: int) -> float:
    """The mean loss of a step on `batch`."""
    losses = []
    for ids in batch.to(engine.device).split(micro_batch):
        loss = engine(input_ids=ids, labels=_labels(ids), use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return fmean(losses)


# -- the table -------------------------------------------------------------------------


def _show(runs: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print a line for each method at its best learning rate."""
    steps = map(str, runs[0]["steps"])
    lines = [["method", "trained", "best lr", *steps, f"to {KNOWN:.0%}"]]
    rows = rows_of(runs)
    for method in options.methods:
        swept = [row for row in rows if row.method == method]
        best = max(
            swept, key=lambda row: fmean(fmean(run["accuracy"]) for run in row.runs)
        )
        lines.append(_line(best, [row.rate for row in swept]))
    report = Report(options)
    report.say(
        f"Character accuracy (%) of {min(PROBED, options.pairs)} of {options.pairs} pairs after N steps of "
        f"{options.batch} pairs, rank {options.rank}, {options.seeds} seed(s), each at its best learning rate (*: the "
        f"sweep's edge); first measured step with {KNOWN:.0%} of each seed."
    )
    report.show("memorization", lines)
    report.write(runs=runs)


def _line(row: Row, swept: list[float]) -> list[str]:
    percents = zip(
        *([100 * share for share in run["accuracy"]] for run in row.runs), strict=True
    )
    *earlier, last = percents
    return [
        row.method,
        f"{row.trained:,}",
        f"{row.rate:g}{at_edge(row.rate, swept)}",
        *(f"{fmean(percent):.1f}" for percent in earlier),
        mean_and_spread(last),
        "/".join(map(_known_at, row.runs)),
    ]


def _known_at(run: dict[str, Any]) -> str:
    """The first measured step with `KNOWN` of the digits; "-" where there is none."""
    measured = zip(run["steps"], run["accuracy"], strict=True)
    return next((str(step) for step, share in measured if share >= KNOWN), "-")


if __name__ == "__main__":
    cli.run(main)
