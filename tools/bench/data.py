"""The loader alone against training, and the first batch after a resume at step 10^6:
cached mixture and streaming. The start of mixtures of many sources with `epochs`, the
memory of a shuffled order, and token caches: built by 1 and more workers, after a kill,
and with one more file.

    python tools/bench/data.py [--megabytes 20] [--steps 30]

Three sources of Python's own code in JSON lines, 70 : 25 : 5, and the demo's small
Llama with MoRA matrices (forward, backward and AdamW in one process, no DeepSpeed: a
real step is slower). Loader and training steps take turns; medians. A resume opens
everything anew, as another process would (its imports and its tokenizer apart).
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

# A bare checkout, not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
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
    cache,
    domain_documents,
    load_corpus,
    load_tokenizer,
    train_sentencepiece,
)
from mora_ds.data.mixture import SampleSchedule
from mora_ds.data.order import shuffled
from mora_ds.data.packing import ORDER_CHUNK
from mora_ds.models.loss import token_nll
from mora_ds.runtime import cli
from mora_ds.train.demo import MODEL_CONFIG
from tools.bench.measuring import adamw_step
from tools.bench.report import Report, bench_parser

WEIGHTS = {"a": 0.70, "b": 0.25, "c": 0.05}
"""Source -> its share of the text and of every batch."""
SEQ_LEN = 512
ROWS = 16
"""Sequences per step."""
FAR = 10**6
VOCABULARY = 4000
TOKENIZER_DOCUMENTS = 200
SHUFFLE_BUFFER = 10_000
SOURCES = (25, 100, 400, 1000)
SEQUENCES = (10**6, 10**8, 2 * 10**9)
FILES = 8
"""Of the corpus whose cache is built."""
FILE_MEGABYTES = 1.2
"""The least; smaller files would share a part of the cache."""


def main() -> None:
    numbers = {"megabytes": (20.0, "text of all sources"), "steps": (30, "turns")}
    options = bench_parser(__doc__, numbers).parse_args()
    report = Report(options)
    report.show("starts", _starts())
    report.show("orders", _orders())
    with tempfile.TemporaryDirectory(prefix="bench_data-") as folder:
        _measure(Path(folder), options, report)
    report.write()


def _measure(folder: Path, options: argparse.Namespace, report: Report) -> None:
    corpora = _corpora(folder, options.megabytes)
    sample = islice(corpora["a"].texts(), TOKENIZER_DOCUMENTS)
    tokenizer = load_tokenizer(
        train_sentencepiece(sample, VOCABULARY, folder / "tokenizer")
    )

    report.show("caches", _caches(folder, options.megabytes))

    def mixture(
        sources: dict[str, Any], states: dict[str, Any] | None = None
    ) -> Mixture:
        weights = tuple(WEIGHTS.values())
        epochs = [None] * len(WEIGHTS)
        return Mixture(sources, [(0, weights)], epochs, SEQ_LEN, ROWS, states)

    def cached() -> Mixture:
        sources = {
            name: PackedDataset(
                build_cache(corpus, tokenizer, folder / "cache"), SEQ_LEN, f"0/{name}"
            )
            for name, corpus in corpora.items()
        }
        return mixture(sources)

    def streamed(states: dict[str, Any] | None = None) -> Mixture:
        sources = {}
        for name, corpus in corpora.items():
            reader = DocumentStream(name, corpus, SHUFFLE_BUFFER, f"0/{name}")
            encoder = Encoder.of(tokenizer)
            sources[name] = StreamSource(reader, encoder, SEQ_LEN, True, None)
        return mixture(sources, states)

    ways = {"cached": cached(), "streaming": streamed()}
    train = _training()
    train()
    seconds: dict[str, list[float]] = {name: [] for name in (*ways, "training")}
    for step in range(options.steps):
        for name, data in ways.items():
            seconds[name].append(_seconds_of(partial(data.batch, step)))
        seconds["training"].append(_seconds_of(train))
    size = ROWS * SEQ_LEN
    step_s = median(seconds["training"])
    report.say(f"{ROWS} x {SEQ_LEN} tokens a step, {options.megabytes:g} MB of text")

    far = _far(ways["streaming"])
    resumed = {
        "cached": _seconds_of(lambda: cached().batch(FAR)),
        "streaming": _seconds_of(lambda: streamed(far).batch(FAR)),
    }
    rows = [["loader", "tokens/s", "against training", f"first batch at step {FAR:,}"]]
    for name in ways:
        # The mean: a stream tokenizes in bursts
        rate = size * options.steps / sum(seconds[name])
        against = f"{rate * step_s / size:,.0f} x"
        rows.append([name, f"{rate:,.0f}", against, f"{resumed[name]:.3f} s"])
    report.show("loaders", rows)


def _caches(folder: Path, megabytes: float) -> list[list[str]]:
    """Builds of a token cache, and what they tokenize of `FILES` files."""
    size = max(megabytes / FILES, FILE_MEGABYTES)
    for number in range(FILES):
        _write(folder / "text" / f"{number}.jsonl", size)
    rows = [["build", "files tokenized", "seconds", "tokens a CPU second"]]
    workers = 1
    while workers <= (os.cpu_count() or 1):
        name = f"{workers} worker{'s' * (workers > 1)}"
        rows.append([name, *_built(folder, f"cache-{workers}", workers)])
        workers *= 2
    builder = get_context("spawn").Process(target=_build, args=(folder, "killed", 1))
    builder.start()
    while builder.is_alive() and len(_parts(folder / "killed")) < FILES // 2:
        time.sleep(0.01)
    builder.kill()
    builder.join()
    kept = len(_parts(folder / "killed"))
    rows.append([f"killed after {kept} files, continued", *_built(folder, "killed", 1)])
    _write(folder / "text" / "added.jsonl", size)
    rows.append(["one file added", *_built(folder, "killed", 1)])
    return rows


def _built(folder: Path, place: str, workers: int) -> tuple[str, str, str]:
    """Files that a build tokenizes, its seconds, and tokens a CPU second."""
    before = _parts(folder / place)
    cpu_before = _cpu_seconds()
    seconds = _seconds_of(partial(_build, folder, place, workers))
    cpu_seconds = _cpu_seconds() - cpu_before
    new = _parts(folder / place) - before
    metas = [json.loads((part / "meta.json").read_text()) for part in new]
    tokens = sum(meta["tokens"] for meta in metas)
    return str(len(new)), f"{seconds:.1f}", f"{tokens / cpu_seconds:,.0f}"


def _build(folder: Path, place: str, workers: int) -> None:
    """Build the cache of folder/text in folder/place."""
    cache.PARALLEL_BYTES = 0
    corpus = load_corpus([str(folder / "text")])
    tokenizer = load_tokenizer(folder / "tokenizer")
    build_cache(corpus, tokenizer, folder / place, num_proc=workers)


def _parts(cache_dir: Path) -> set[Path]:
    """The folders of the parts that are complete."""
    metas = cache_dir.glob("*/meta.json")
    return {meta.parent for meta in metas if "partial" not in meta.parent.name}


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    own = os.times()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.user + own.system + children.ru_utime + children.ru_stime


def _starts() -> list[list[str]]:
    """Seconds until the order of a mixture is known, by its number of sources, each of
    which is used up."""
    rows = [["sources with epochs", "start"]]
    for count in SOURCES:
        random = np.random.RandomState(count)
        weights = random.rand(count).tolist()
        caps = random.randint(1, 10**6, count).tolist()
        seconds = _seconds_of(partial(SampleSchedule, [(0, weights)], caps))
        rows.append([f"{count:,}", f"{seconds:.3f} s"])
    return rows


def _orders() -> list[list[str]]:
    """Memory of a shuffled order, by the sequences of its epoch."""
    rows = [["sequences an epoch", "memory of the order"]]
    for size in SEQUENCES:
        tracemalloc.start()
        shuffled(0, 0, size, np.arange(ORDER_CHUNK))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        rows.append([f"{size:,}", f"{peak / 1024:.0f} KiB"])
    return rows


def _seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _far(stream: Mixture) -> dict[str, Any]:
    """The position of the stream now, as a run would have it that came there at step
    10^6."""
    states = stream.states_at(stream._next_step) or {}
    return {**states, "step": FAR}


def _corpora(folder: Path, megabytes: float) -> dict[str, Corpus]:
    """The sources, by their share of the text."""
    corpora = {}
    for name, weight in WEIGHTS.items():
        path = folder / f"{name}.jsonl"
        _write(path, megabytes * weight)
        corpora[name] = load_corpus([str(path)])
    return corpora


def _write(path: Path, megabytes: float) -> None:
    """A file of so much text."""
    path.parent.mkdir(exist_ok=True)
    texts = [document.text for document in domain_documents()]
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(cycle(texts)):
            # The number keeps documents of different sources apart
            document = {"text": f"# {path.stem} {number}\n{text}"}
            size += file.write(json.dumps(document) + "\n")
            if size > megabytes * 1e6:
                break


def _training() -> Callable[[], None]:
    """A training step."""
    config = AutoConfig.from_pretrained(str(MODEL_CONFIG))
    config.vocab_size = VOCABULARY
    model = AutoModelForCausalLM.from_config(config)
    inject(model, MoRAConfig(rank=8))
    ids = torch.randint(3, VOCABULARY, (ROWS, SEQ_LEN))
    positions = torch.arange(SEQ_LEN).expand_as(ids)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    return adamw_step(model, partial(token_nll, model, batch))


if __name__ == "__main__":
    cli.run(main)
