"""Where to adapt, and with what: the adapter's options against each other, at equal trainable parameters.

    python tools/bench/options.py [--work FOLDER] [--steps 150] [--seeds 3] [--jobs 2] [--methods mora lora ...]
        [--rates 0.003 0.01 0.03]

Small models of three architectures are warm-started on prose, then continued on a mixture of three domains (a third of
every batch each: Python's code, C++ headers, the table of Unicode) by every method; perplexity on each domain, and on
prose for what is forgotten. Each method's rate is swept on the first architecture with the first seed, and kept. Each
run is `launch/pretrain.py` with other flags, on one rank; a run that is done is kept, so the command goes on where it
was stopped. Prints a table, mean over seeds and the largest deviation of the domains' mean.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mora_ds.common.errors import UserError, unknown
from mora_ds.data import load_corpus, load_tokenizer, train_sentencepiece
from mora_ds.models.load import create_base
from mora_ds.runtime import cli
from tools.bench.domain_texts import DOMAINS, PROSE, write_texts
from tools.bench.report import Report, json_flag
from tools.bench.trials import mean_and_spread, pretrain_alone, run_all

VOCABULARY, WARM_STEPS, ROWS, SEQ_LEN = 2048, 300, 8, 128
_WIDE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_WIDE, **_IDS, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt2": {
        "model_type": "gpt2", "n_embd": 192, "n_layer": 4, "n_head": 6, "n_positions": 256, "bos_token_id": 1,
        "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "gpt_neox": {"model_type": "gpt_neox", **_WIDE, **_IDS, "tie_word_embeddings": True},
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "mora": {},
    "lora": {"adapter": "lora"},
    "budget": {"targets": "auto"},
    "subspace": {"operator": "subspace"},
    "alignment": {"alignment_weight": 0.1, "alignment_rank": 16},
    "domains": {"domain_adapters": True, "mora_rank": 8 // (1 + len(DOMAINS))},
}
"""`budget` has as many parameters as `mora`; `domains` has four MoRA matrices a layer, of a quarter of the rank."""


@dataclass(frozen=True)
class Trial:
    """One run."""

    architecture: str
    method: str
    rate: float
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.architecture} {self.folder.name}"

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        return found

    def domains(self) -> float:
        """Geometric mean of the perplexities on the domains."""
        after = self.summary()["perplexity_after"]
        return math.exp(sum(math.log(after[name]) for name in DOMAINS) / len(DOMAINS))


def main() -> None:
    options = _options()
    _check(options)
    texts = options.work / "texts"
    if not (texts / "unicode_eval.jsonl").is_file():
        write_texts(texts)
    for architecture in options.architectures:
        _warm(architecture, options.work)
    first = options.architectures[0]
    # mora goes first: budget asks how many parameters it has
    for methods in (["mora"], [name for name in options.methods if name != "mora"]):
        swept = [_trial(options, first, name, rate, 1) for name in methods for rate in options.rates]
        run_all(swept, lambda trial: _run(trial, options), options.jobs)
    best = {name: _best(options, first, name) for name in options.methods}
    for methods in (["mora"], [name for name in options.methods if name != "mora"]):
        repeats = list(_repeats(options, methods, best | {"mora": _best(options, first, "mora")}))
        run_all(repeats, lambda trial: _run(trial, options), options.jobs)
    _report(options, best)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("out/bench_options"), help="folder for everything")
    parser.add_argument("--steps", type=int, default=150, help=f"steps of {ROWS} x {SEQ_LEN} tokens")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method and architecture")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2], help="learning rates to sweep")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), metavar="NAME")
    json_flag(parser)
    return parser.parse_args()


def _check(options: argparse.Namespace) -> None:
    for flag, known in (("methods", METHODS), ("architectures", ARCHITECTURES)):
        for name in getattr(options, flag):
            if name not in known:
                raise UserError(unknown(f"--{flag}", name, known))
    if min(options.steps - 10, options.seeds, options.jobs) < 1:
        raise UserError("--steps must be more than 10; --seeds and --jobs at least 1")


# -- the runs ----------------------------------------------------------------------------------------------------------


def _warm(architecture: str, work: Path) -> None:
    """A base that knows prose, in WORK/ARCHITECTURE/warm/merged."""
    root, texts = work / architecture, work / "texts"
    if (root / "warm" / "merged").is_dir():
        return
    print(f"warm start of {architecture} on prose", flush=True)
    corpus = load_corpus([str(texts / f"{name}_train.jsonl") for name in (PROSE, *DOMAINS)])
    pieces = load_tokenizer(train_sentencepiece(corpus.texts(), VOCABULARY, work / "tokenizer"))
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(ARCHITECTURES[architecture]), encoding="utf-8")
    create_base(root / "config.json", root / "start", 42, pieces, len(pieces))
    settings = {
        **_common(work, root / "warm"), "model_name_or_path": root / "start", "adapter": "full",
        "train_files": [texts / f"{PROSE}_train.jsonl"], "max_steps": WARM_STEPS, "learning_rate": 3e-3,
        "warmup_steps": 20, "weight_decay": 0.01, "export_merged": True,
    }  # fmt: skip
    pretrain_alone(settings, root / "warm.log")


def _common(work: Path, output: Path) -> dict[str, Any]:
    texts = work / "texts"
    return {
        "seq_len": SEQ_LEN, "per_device_train_batch_size": ROWS, "per_device_eval_batch_size": 16,
        "eval_files": [f"{name}={texts / name}_eval.jsonl" for name in (PROSE, *DOMAINS)],
        "cache_dir": work / "tokens", "output_dir": output, "overwrite_output_dir": True,
        "lr_scheduler_type": "cosine", "min_lr_ratio": 0.1, "logging_steps": 30, "eval_on_start": False,
    }  # fmt: skip


def _trial(options: argparse.Namespace, architecture: str, method: str, rate: float, seed: int) -> Trial:
    folder = options.work / architecture / "runs" / f"{options.steps}-{method}-{rate:g}-{seed}"
    return Trial(architecture, method, rate, seed, folder)


def _repeats(options: argparse.Namespace, methods: Sequence[str], best: dict[str, float]) -> Iterator[Trial]:
    for architecture in options.architectures:
        for name in methods:
            for seed in range(1, options.seeds + 1):
                yield _trial(options, architecture, name, best[name], seed)


def _run(trial: Trial, options: argparse.Namespace) -> None:
    if (trial.folder / "summary.json").is_file():
        return
    texts, root = options.work / "texts", options.work / trial.architecture
    settings = {
        **_common(options.work, trial.folder), "model_name_or_path": root / "warm" / "merged",
        "train_files": [f"{name}={texts / name}_train.jsonl:1" for name in DOMAINS], "mora_rank": 8,
        "r_hat_multiple": 1,  # as many parameters as LoRA
        "max_steps": options.steps, "warmup_steps": 10, "learning_rate": trial.rate, "seed": trial.seed,
        **METHODS[trial.method],
    }  # fmt: skip
    if trial.method == "budget":
        rate = _best(options, options.architectures[0], "mora")
        mora = next(
            each
            for each in (_trial(options, trial.architecture, "mora", one, 1) for one in (rate, *options.rates))
            if (each.folder / "summary.json").is_file()
        )
        settings["trainable_budget"] = mora.summary()["trainable_params"]
    trial.folder.parent.mkdir(parents=True, exist_ok=True)
    pretrain_alone(settings, trial.folder.with_name(f"{trial.folder.name}.log"))


def _best(options: argparse.Namespace, architecture: str, method: str) -> float:
    """The rate that learned most."""
    return min(options.rates, key=lambda rate: _trial(options, architecture, method, rate, 1).domains())


# -- the table ---------------------------------------------------------------------------------------------------------


def _report(options: argparse.Namespace, best: dict[str, float]) -> None:
    cells = [["model, method", "trained", "learning rate", *DOMAINS, "all three", "±", PROSE]]
    for architecture in options.architectures:
        for method in options.methods:
            trials = [_trial(options, architecture, method, best[method], seed) for seed in range(1, options.seeds + 1)]
            after = [trial.summary()["perplexity_after"] for trial in trials]
            means = {name: sum(each[name] for each in after) / len(after) for name in (PROSE, *DOMAINS)}
            domains = [trial.domains() for trial in trials]
            mean, spread = mean_and_spread(domains)
            trainable = trials[0].summary()["trainable_params"]
            shown = [f"{means[name]:.1f}" for name in DOMAINS]
            cells.append(
                [f"{architecture}, {method}", f"{trainable:,}", f"{best[method]:g}", *shown, f"{mean:.1f}",
                 f"{spread:.1f}", f"{means[PROSE]:.1f}"]
            )  # fmt: skip
    report = Report(options)
    seeds = f"mean of {options.seeds} seed(s), and the largest deviation of one from the mean of all three"
    report.say(f"Perplexity after {options.steps} steps of {ROWS} x {SEQ_LEN} tokens, {seeds}.")
    report.show("options", cells)
    report.write()


if __name__ == "__main__":
    cli.run(main)
