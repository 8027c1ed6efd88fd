"""The loader alone against training, and the first batch after a resume at step 10^6:
cached mixture and streaming.

    python tools/bench/data.py [--megabytes 20] [--seq_len 512] [--rows 16] [--steps 30]
    [--folder /tmp/bench_data]

Three sources of Python's own code in JSON lines, 70 : 25 : 5, and the demo's small Llama
with MoRA matrices (forward, backward and AdamW in one process, no DeepSpeed: a real step is
slower). Loader and training steps take turns; medians. A resume opens everything anew, as
another process would (its imports and its tokenizer apart).
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

# A bare checkout, not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mora_ds import MoRAConfig, inject
from mora_ds.data import (
    Corpus,
    DocumentStream,
    Encoder,
    Mixture,
    PackedDataset,
    StreamSource,
    build_cache,
    domain_documents,
    load_corpus,
    load_tokenizer,
    train_sentencepiece,
)
from mora_ds.models.loss import token_nll
from mora_ds.runtime import cli
from tools.bench.measuring import ROOT, seconds_of
from tools.bench.report import Report, bench_parser

WEIGHTS = (0.70, 0.25, 0.05)
FAR = 10**6
VOCABULARY = 4000
SHUFFLE_BUFFER = 10_000
MODEL = ROOT / "configs" / "models" / "tiny_llama.json"


def main() -> None:
    options = _parser().parse_args()
    report = Report(options)
    folder = Path(options.folder or tempfile.mkdtemp(prefix="bench_data-"))
    corpora = _corpora(folder, options.megabytes)
    tokenizer = load_tokenizer(
        train_sentencepiece(
            _sample(corpora["a"]),
            VOCABULARY,
            folder / "tokenizer",
        )
    )
    started = time.perf_counter()
    caches = {
        name: build_cache(corpus, tokenizer, folder / "cache")
        for name, corpus in corpora.items()
    }
    built = time.perf_counter() - started
    tokens = sum(cache.n_tokens for cache in caches.values())
    report.say(
        f"{tokens:,} tokens; cached in {built:.1f} s ({tokens / built:,.0f} tokens/s in one process)"
    )

    def cached() -> Mixture:
        sources: dict[str, Any] = {
            name: PackedDataset(
                build_cache(corpus, tokenizer, folder / "cache"),
                options.seq_len,
                f"0/{name}",
            )
            for name, corpus in corpora.items()
        }
        return Mixture(sources, [(0, WEIGHTS)], [None] * 3, options.seq_len, options.rows)

    def streamed(states: dict[str, Any] | None = None) -> Mixture:
        sources: dict[str, Any] = {}
        for name, corpus in corpora.items():
            reader = DocumentStream(name, corpus, SHUFFLE_BUFFER, f"0/{name}")
            sources[name] = StreamSource(
                reader, Encoder.of(tokenizer), options.seq_len, True, None
            )
        return Mixture(
            sources, [(0, WEIGHTS)], [None] * 3, options.seq_len, options.rows, states
        )

    train = _training(options)
    stream = streamed()
    train()
    ways: dict[str, Mixture] = {"cached": cached(), "streaming": stream}
    seconds: dict[str, list[float]] = {name: [] for name in (*ways, "training")}
    for step in range(options.steps):
        for name, data in ways.items():
            seconds[name].append(seconds_of(lambda data=data, step=step: data.batch(step)))  # type: ignore[misc]
        seconds["training"].append(train())
    size = options.rows * options.seq_len
    step_s = median(seconds["training"])
    # A stream tokenises in bursts
    rates = {name: size * options.steps / sum(seconds[name]) for name in ways}
    resumed = {
        "cached": seconds_of(lambda: cached().batch(FAR)),
        "streaming": seconds_of(lambda: streamed(_far(stream, options.rows)).batch(FAR)),
    }
    report.say(
        f"training: {size / step_s:,.0f} tokens/s ({options.rows} x {options.seq_len} tokens a step)"
    )
    rows = [
        [
            name,
            f"{rates[name]:,.0f}",
            f"{rates[name] * step_s / size:,.0f} x",
            f"{resumed[name]:.3f} s",
        ]
        for name in ways
    ]
    titles = ["loader", "tokens/s", "against training", f"first batch at step {FAR:,}"]
    report.show("loaders", [titles, *rows])
    report.write()
    if options.folder is None:
        shutil.rmtree(folder)


def _far(stream: Mixture, rows: int) -> dict[str, Any]:
    """Where the stream stands now, as a run would have it that came there at step 10^6."""
    states = stream.states_at(stream._next_step) or {}
    for name, count in zip(stream.names, stream.schedule.counts(FAR * rows), strict=True):
        states["sources"][name]["samples"] = int(count)
    return {**states, "step": FAR}


def _corpora(folder: Path, megabytes: float) -> dict[str, Corpus]:
    """Three sources of four shards each, by their share of the text."""
    texts = [document.text for document in domain_documents()]
    corpora = {}
    for name, weight in zip("abc", WEIGHTS, strict=True):
        lines: list[str] = []
        size = 0
        while size < megabytes * 1e6 * weight:
            text = f"# {name} {len(lines)}\n{texts[len(lines) % len(texts)]}"
            lines.append(json.dumps({"text": text}) + "\n")
            size += len(text)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for shard in range(4):
            (folder / name / f"{shard}.jsonl").write_text(
                "".join(lines[shard::4]), encoding="utf-8"
            )
        corpora[name] = load_corpus([str(folder / name / "*.jsonl")])
    return corpora


def _sample(corpus: Corpus) -> Any:
    size = 0
    for text in corpus.texts():
        yield text
        size += len(text)
        if size > 2_000_000:
            return


def _training(options: argparse.Namespace) -> Callable[[], float]:
    """A training step; returns its seconds."""
    config = AutoConfig.from_pretrained(str(MODEL))
    config.vocab_size = max(config.vocab_size, VOCABULARY)
    model = AutoModelForCausalLM.from_config(config)
    inject(model, MoRAConfig(rank=8))
    optimizer = torch.optim.AdamW(
        [value for value in model.parameters() if value.requires_grad], lr=1e-4
    )
    ids = torch.randint(3, VOCABULARY, (options.rows, options.seq_len))
    positions = torch.arange(options.seq_len).expand_as(ids)

    def step() -> float:
        started = time.perf_counter()
        token_nll(
            model, {"input_ids": ids, "labels": ids, "position_ids": positions}
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def _parser() -> argparse.ArgumentParser:
    numbers = {
        "megabytes": (20.0, "text of all sources"),
        "seq_len": (512, "tokens of a sequence"),
        "rows": (16, "sequences a step"),
        "steps": (30, "turns"),
    }
    parser = bench_parser(__doc__, numbers)
    parser.add_argument(
        "--folder", help="for texts and caches; default: one that goes again"
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
