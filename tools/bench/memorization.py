"""The MoRA paper's memorization task: how many steps until random UUID pairs are
memorized?

    python tools/bench/memorization.py [--base MODEL] [--pairs 64] [--steps 400] [--rank 8]
    [--seeds 3] [--text FILE] ...

Full training, LoRA, MoRA and ReMoRA on one engine (ZeRO, AdamW, a constant learning
rate after a warm-up): each learns, of pairs of 32 hex digits, the second from the first,
at every learning rate of its sweep, the best one with more seeds. MoRA has at most LoRA's
trainable parameters; `mora-unrounded` has as many, with sides that are no multiple of
16, which decides at ranks of 1 or 2. The softmax is over the 16 digits: over a large vocabulary it would cost
more than all layers. Eight times in a run the second is generated greedily; the share of
right digits is the character accuracy (1/16 is chance). A digit is one token here, so
rows need no padding. Prints, at each method's best learning rate (largest mean accuracy
over all measurements), the accuracy over steps, mean over seeds, the steps to 90%, and
the perplexity of `--text`, ordinary text, before and after the run; `--json FILE` keeps
all runs.

Every finished run leaves WORK/results/NAME.json and is not repeated while its settings
are the same, so the command goes on where it was stopped.

The default is for two cores: the demo's small Llama, warm-started on prose. The
paper's: Llama-2 7B,

    --base LLAMA_2_7B --pairs 10000 --batch 1000 --micro_batch 20 --steps 1000 --rank 8 (and 256)

The small one, frozen, would spend its adapter on learning that digits follow digits: it
is taught that first, on pairs that are asked for nowhere.
"""

import argparse
import json
import math
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path
from statistics import fmean
from typing import Any, Self

# A bare checkout, not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mora_ds import Run, initialize, inject
from mora_ds.adapters.config import AdapterConfig, LoRAConfig, MoRAConfig
from mora_ds.common.errors import (
    COUNT,
    Bounds,
    UserError,
    out_of_bounds,
    raise_validation_errors,
    wrong_values,
)
from mora_ds.common.files import (
    atomic_folder,
    read_json,
    sha256_file,
    write_json_atomic,
)
from mora_ds.config.lr_schedule import Schedule, ScheduleKind
from mora_ds.data import load_tokenizer
from mora_ds.engine import zero
from mora_ds.engine.initialize import initialize_full, start_distributed
from mora_ds.models.base import BaseCheckpoint
from mora_ds.runtime import cli
from tools.bench.measuring import count_trained, only_rank, zero3_config
from tools.bench.report import Report, bench_parser
from tools.bench.trials import at_edge, chosen_rates, warm_base
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
TEXT_ROWS = 16
TEXT_LENGTH = 256
"""Tokens of `--text` in a row."""
HEX = "0123456789abcdef"


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    sweep: tuple[float, ...]
    """Its learning rates where `--methods` gives none."""
    adapter: type[AdapterConfig] | None = MoRAConfig
    """None: every parameter is trained."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Other settings of the adapter than its rank and seed."""
    merges: bool = False


@dataclass(frozen=True)
class Trial:
    """One run."""

    method: str
    rank: int
    """0 of full training."""
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-r{self.rank}-{self.rate:g}-{self.seed}"


METHODS: dict[str, Method] = {
    "full": Method((3e-4, 1e-3, 3e-3), adapter=None),
    "lora": Method((1e-3, 3e-3, 1e-2), adapter=LoRAConfig),
    "mora": Method((3e-3, 1e-2, 3e-2)),
    "mora-unrounded": Method((3e-3, 1e-2, 3e-2), settings={"r_hat_multiple": 1}),
    "remora": Method((3e-3, 1e-2, 3e-2), merges=True),
}


def main() -> None:
    options = _options()
    _check(options)
    os.environ.update(only_rank())
    base = options.base or small_base(options.work)
    settings = _settings(base, options)
    start_distributed()
    sweep_seeds = min(options.sweep_seeds, options.seeds)
    swept = _trials(options, range(1, sweep_seeds + 1))
    runs = [_result(trial, base, settings, options) for trial in swept]
    best = best_rates(rows_of(runs))
    for trial in _trials(options, range(sweep_seeds + 1, options.seeds + 1)):
        if trial.rate == best[trial.method, trial.rank]:
            runs.append(_result(trial, base, settings, options))
    _show(runs, best, options)


def _options() -> argparse.Namespace:
    defaults = {
        "work": (Path("out/bench_memorization"), "folder for the base"),
        "pairs": (64, "pairs to memorize"),
        "batch": (32, "pairs an optimizer step"),
        "micro_batch": (32, "pairs at a time"),
        "steps": (400, "optimizer steps"),
        "seeds": (3, "runs of each method at its best learning rate"),
        "sweep_seeds": (1, "of them at every learning rate of the sweep"),
    }
    parser = bench_parser(__doc__, defaults)
    parser.add_argument(
        "--rank",
        type=int,
        nargs="+",
        default=[8],
        help="LoRA's rank, or several; MoRA matrices have about as many parameters",
    )
    parser.add_argument("--bf16", action="store_true", help="train in bf16")
    parser.add_argument(
        "--text",
        type=Path,
        help="JSON lines of ordinary text, whose perplexity is measured before and after",
    )
    parser.add_argument(
        "--base",
        type=Path,
        help="model folder. Default: a small Llama, made here",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        metavar="METHOD[@RATE]",
        help="what is trained, each at the learning rates that it is given with, if any",
    )
    return parser.parse_args()


def _check(options: argparse.Namespace) -> None:
    counted = ("pairs", "batch", "micro_batch", "seeds", "sweep_seeds")
    counts = dict.fromkeys(counted, COUNT)
    # Longer cycles than the warm-up after a merge
    steps = Bounds(above=CYCLES * RAMP)
    raise_validation_errors(wrong_values(options, {**counts, "steps": steps}))
    for rank in options.rank:
        raise_validation_errors(out_of_bounds("rank", rank, COUNT))
    if options.text is not None and not options.text.is_file():
        raise UserError(f"--text: there is no {options.text}")
    if options.batch % options.micro_batch:
        raise UserError(
            f"--batch {options.batch} is no multiple of --micro_batch {options.micro_batch}"
        )


# -- runs ------------------------------------------------------------------------------


def _trials(options: argparse.Namespace, seeds: Sequence[int]) -> Iterator[Trial]:
    """The runs at every rank, learning rate and seed."""
    sweeps = {name: method.sweep for name, method in METHODS.items()}
    for name, rates in chosen_rates(options.methods, sweeps).items():
        ranks = [0] if METHODS[name].adapter is None else options.rank
        for rank, rate, seed in product(ranks, rates, seeds):
            yield Trial(name, rank, rate, seed)


def _settings(base: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What the results of all runs depend on, wherever the files lie."""
    names = ("pairs", "batch", "micro_batch", "steps", "bf16")
    settings = {name: getattr(options, name) for name in names}
    text = options.text and sha256_file(options.text)
    model = BaseCheckpoint.open(base).fingerprint()
    return {**settings, "text": text, "base": model}


def _result(
    trial: Trial, base: Path, settings: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """The result of a run, which is made unless it is there with these settings."""
    path = options.work / "results" / f"{trial.name}.json"
    if path.is_file():
        earlier: dict[str, Any] = read_json(path)
        if earlier["settings"] == settings:
            return earlier
    print(trial.name, flush=True)
    result = {
        "method": trial.method,
        "rank": trial.rank,
        "learning_rate": trial.rate,
        "seed": trial.seed,
        "settings": settings,
        **_train(trial, base, options),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, result)
    return result


def best_rates(rows: Sequence[Row]) -> dict[tuple[str, int], float]:
    """Method and rank -> the learning rate with the largest mean accuracy over all
    measurements and seeds."""

    def accuracy(row: Row) -> float:
        return fmean(fmean(run["accuracy"]) for run in row.runs)

    best: dict[tuple[str, int], Row] = {}
    for row in rows:
        known = best.setdefault(row.kind, row)
        if accuracy(row) > accuracy(known):
            best[row.kind] = row
    return {kind: row.rate for kind, row in best.items()}


# -- the task --------------------------------------------------------------------------


@dataclass(frozen=True)
class PairTokens:
    """Token ids of a tokenizer that pairs are made of."""

    digits: list[int]
    separator: int
    start: int

    @classmethod
    def of(cls, base: Path) -> Self:
        """Those of the tokenizer of `base`. Raises `UserError` where a digit has no token
        of its own."""
        tokenizer = load_tokenizer(base, flag="--base")
        *digits, separator = (
            tokenizer(text, add_special_tokens=False)["input_ids"][-1]
            for text in f"{HEX}="
        )
        start = tokenizer.bos_token_id
        if start is None:
            start = tokenizer.eos_token_id
        if len({*digits, separator, start}) < len(HEX) + 2:
            raise UserError(
                f"--base {base}: its tokenizer has no token of its own for every hex digit"
            )
        return cls(digits, separator, start)

    def pairs(self, number: int, seed: int | str) -> Tensor:
        """(number, 2 * DIGITS + 2) token ids: start, 32 random digits, separator, 32
        random digits."""
        draw = random.Random(f"pairs/{seed}")

        def half() -> list[int]:
            return [draw.choice(self.digits) for _ in range(DIGITS)]

        return torch.tensor(
            [[self.start, *half(), self.separator, *half()] for _ in range(number)]
        )


class DigitHead(nn.Module):
    """The head of a model, whose logits are those of the digits alone, in their order;
    with `over_vocabulary`, those of all tokens."""

    weight: nn.Parameter
    """Shared with the embeddings where they are tied."""
    digits: Tensor
    over_vocabulary: bool

    def __init__(self, head: nn.Linear, digits: list[int]) -> None:
        super().__init__()
        if head.bias is not None:
            raise UserError("--base: its head has a bias, which is not supported here")
        self.weight = head.weight
        self.register_buffer("digits", torch.tensor(digits), persistent=False)
        self.over_vocabulary = False

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.weight if self.over_vocabulary else self.weight[self.digits]
        return nn.functional.linear(hidden, weight)

    def classes(self, ids: Tensor) -> Tensor:
        """The index of each id, all of them digits, among the logits."""
        return (ids[..., None] == self.digits).int().argmax(dim=-1)


def _labels(ids: Tensor) -> Tensor:
    """The labels: the second halves of the pairs alone."""
    labels = ids.clone()
    labels[:, :-DIGITS] = -100
    return labels


def rows_of_text(base: Path, file: Path) -> Tensor:
    """(TEXT_ROWS, TEXT_LENGTH) token ids of the first texts in a file of JSON lines.
    Raises `UserError` for too little text."""
    texts: list[str] = []
    with file.open(encoding="utf-8") as lines:
        for line in islice(lines, TEXT_ROWS * TEXT_LENGTH):
            texts.append(json.loads(line)["text"])
    tokenizer = load_tokenizer(base, flag="--base")
    ids = torch.tensor(tokenizer("\n\n".join(texts))["input_ids"])
    if ids.numel() < TEXT_ROWS * TEXT_LENGTH:
        raise UserError(
            f"--text {file} has fewer than {TEXT_ROWS * TEXT_LENGTH:,} tokens"
        )
    return ids[: TEXT_ROWS * TEXT_LENGTH].view(TEXT_ROWS, TEXT_LENGTH)


@torch.no_grad()
def _perplexity(engine: Any, head: DigitHead, text: Tensor | None) -> float | None:
    """Of rows of text, over the vocabulary. The engine is in training mode
    afterwards."""
    if text is None:
        return None
    engine.eval()
    head.over_vocabulary = True
    rows = text.to(engine.device).split(1)
    losses = [
        engine(input_ids=ids, labels=ids, use_cache=False).loss.item() for ids in rows
    ]
    head.over_vocabulary = False
    engine.train()
    return math.exp(fmean(losses))


@torch.no_grad()
def _accuracy(engine: Any, head: DigitHead, rows: Tensor) -> float:
    """Share of digits that are right when the second halves are generated greedily from
    the first. The engine is in training mode afterwards."""
    engine.eval()
    rows = rows.to(engine.device)
    ids = rows[:, :-DIGITS]
    cache = None
    right = 0
    for position in range(DIGITS):
        output = engine(
            input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        ids = head.digits[output.logits.argmax(dim=-1)]
        cache = output.past_key_values
        right += int((ids[:, 0] == rows[:, position - DIGITS]).sum())
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
    model = AutoModelForCausalLM.from_pretrained(
        warm, dtype=torch.float32, use_kernels=False
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    pairs = PairTokens.of(warm).pairs(16 * DIGIT_STEPS, "never again")
    for ids in pairs.split(16):
        model(input_ids=ids, labels=_labels(ids), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with atomic_folder(folder.absolute()) as partial:
        model.save_pretrained(partial)
        load_tokenizer(warm).save_pretrained(partial)
    return folder


# -- one run ---------------------------------------------------------------------------


def adapter_of(trial: Trial) -> AdapterConfig | None:
    """What is injected; None for full training."""
    method = METHODS[trial.method]
    if method.adapter is None:
        return None
    return method.adapter(rank=trial.rank, seed=trial.seed, **method.settings)


def _train(trial: Trial, base: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train once. Returns the number of trained parameters, the step, accuracy and loss
    of each measurement, and the perplexity of `--text` before and after."""
    method = METHODS[trial.method]
    torch.manual_seed(trial.seed)
    tokens = PairTokens.of(base)
    rows = tokens.pairs(options.pairs, trial.seed)
    text = options.text and rows_of_text(base, options.text)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, use_kernels=False
    )
    head = DigitHead(model.get_output_embeddings(), tokens.digits)
    model.set_output_embeddings(head)
    config = zero3_config(
        options.micro_batch,
        gradient_accumulation_steps=options.batch // options.micro_batch,
        gradient_clipping=1.0,
        optimizer={"type": "AdamW", "params": {"lr": trial.rate, "weight_decay": 0.0}},
        bf16={"enabled": options.bf16},
    )
    adapter = adapter_of(trial)
    if adapter is not None:
        inject(model, adapter)
    trained = count_trained(model)
    make = initialize_full if adapter is None else initialize
    engine = make(model=model, config=config)[0]
    before = _perplexity(engine, head, text)
    schedule = Schedule(
        ScheduleKind.CONSTANT,
        trial.rate,
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
    draw = random.Random(f"order/{trial.seed}")
    with tempfile.TemporaryDirectory() as folder:
        run = Run(engine, base=base, folder=folder) if method.merges else None
        for step in range(1, options.steps + 1):
            zero.set_learning_rate(engine, schedule.learning_rate(step - 1, merges))
            batch = rows[[draw.randrange(len(rows)) for _ in range(options.batch)]]
            loss = _step(engine, head, batch, options.micro_batch)
            if run is not None and schedule.merges_after(step):
                run.merge(step)
                merges.append(step)
            if step in measured:
                shares.append(_accuracy(engine, head, rows[:PROBED]))
                losses.append(loss)
                print(f"  step {step}: {shares[-1]:.1%}, loss {loss:.3f}", flush=True)
    after = _perplexity(engine, head, text)
    engine.destroy()
    return {
        "trained": trained,
        "steps": measured,
        "accuracy": shares,
        "loss": losses,
        "perplexity": [before, after],
    }


def _step(
    engine: zero.Engine, head: DigitHead, batch: Tensor, micro_batch: int
) -> float:
    """The mean loss of a step on `batch`: of the second halves alone."""
    losses = []
    for ids in batch.to(engine.device).split(micro_batch):
        # The logits that predict the second half: from the separator on
        logits = engine(
            input_ids=ids, use_cache=False, logits_to_keep=DIGITS + 1
        ).logits[:, :-1]
        classes = head.classes(ids[:, -DIGITS:])
        loss = nn.functional.cross_entropy(
            logits.float().flatten(end_dim=1), classes.flatten()
        )
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return fmean(losses)


# -- the table -------------------------------------------------------------------------


def _show(
    runs: list[dict[str, Any]],
    best: dict[tuple[str, int], float],
    options: argparse.Namespace,
) -> None:
    """Print a line for each method and rank at its best learning rate."""
    rows = rows_of(runs)
    *earlier, last = map(str, runs[0]["steps"])
    texts = ["text before", "after"] if options.text else []
    steps = [*earlier, last, f"to {KNOWN:.0%}", *texts]
    lines = [["method", "rank", "trained", "best lr", "seeds", *steps]]
    for row in rows:
        if row.rate == best[row.kind]:
            swept = [other.rate for other in rows if other.kind == row.kind]
            lines.append(_line(row, swept))
    report = Report(options)
    report.say(
        f"Character accuracy (%) of {min(PROBED, options.pairs)} of {options.pairs} pairs after N steps of "
        f"{options.batch} pairs, up to {options.seeds} seed(s), each at its best learning rate (*: the sweep's edge); "
        f"first measured step with {KNOWN:.0%} of each seed."
    )
    report.show("memorization", lines)
    report.write(runs=runs)


def _line(row: Row, swept: list[float]) -> list[str]:
    percents = zip(
        *([100 * share for share in run["accuracy"]] for run in row.runs), strict=True
    )
    *earlier, last = percents
    texts = zip(*(run["perplexity"] for run in row.runs), strict=True)
    return [
        row.method,
        f"{row.rank or '-'}",
        f"{row.trained:,}",
        f"{row.rate:g}{at_edge(row.rate, swept)}",
        f"{len(row.runs)}",
        *(f"{fmean(percent):.1f}" for percent in earlier),
        mean_and_spread(last),
        "/".join(map(_known_at, row.runs)),
        *(mean_and_spread(text) for text in texts if None not in text),
    ]


def _known_at(run: dict[str, Any]) -> str:
    """The first measured step with `KNOWN` of the digits; "-" where there is none."""
    measured = zip(run["steps"], run["accuracy"], strict=True)
    return next((str(step) for step, share in measured if share >= KNOWN), "-")


if __name__ == "__main__":
    cli.run(main)
