"""The training text of a run: its sources as corpora, what is left out of them, and the data they make together.

DataArguments -> MixturePlan -> {name: Corpus} -> (documents held out, or of --eval_files, left out) -> TrainData
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mora_ds.config.data import DataArguments
from mora_ds.config.mixture import PLAIN, MixturePlan, SourcePlan
from mora_ds.data import (
    CachedSource,
    Corpus,
    DocumentFilter,
    DocumentStream,
    Encoder,
    Mixture,
    PackedDataset,
    Share,
    Source,
    StreamMixture,
    StreamSettings,
    StreamSource,
    TokenCache,
    TrainData,
    hashes_of,
    is_saved_dataset,
    load_corpus,
    stream_dataset,
    tokenizer_fingerprint,
)

HELD_OUT = "held_out"
"""Name of the evaluation set that --held_out_share makes; of a mixture, with the source's name behind it."""


def load_sources(data: DataArguments, plan: MixturePlan | None) -> dict[str, Corpus]:
    """The corpus of every source by its name. Raises `UserError` for one that is missing or empty, naming it."""
    if plan is None:
        return {PLAIN: load_corpus(data.train_files, dataset_name=data.dataset_name, text_column=data.text_column)}
    corpora = {}
    for source in plan.sources:
        flag = "--train_files" if plan_is_plain(plan) else f"source {source.name!r}"
        column = source.text_column or data.text_column
        if source.streaming and source.dataset is not None and not is_saved_dataset(Path(source.dataset)):
            corpora[source.name] = stream_dataset(source.dataset, column, flag)
            continue
        corpora[source.name] = load_corpus(source.files, dataset_name=source.dataset, text_column=column, flag=flag)
    return corpora


def plan_is_plain(plan: MixturePlan) -> bool:
    return [source.name for source in plan.sources] == [PLAIN]


def filtered(data: DataArguments, corpora: Mapping[str, Corpus], evaluation: Mapping[str, Corpus]) -> dict[str, Corpus]:
    """The sources without the documents that are not to be trained on."""
    if not (data.held_out_share or data.exclude_eval_documents):
        return dict(corpora)
    excluded: frozenset[int] = frozenset()
    if data.exclude_eval_documents:
        excluded = excluded.union(*(hashes_of(corpus) for corpus in evaluation.values()))
    keep = DocumentFilter(data.held_out_share, excluded=excluded)
    return {name: replace(corpus, keep=keep) for name, corpus in corpora.items()}


def held_out_sets(data: DataArguments, corpora: Mapping[str, Corpus]) -> dict[str, Corpus]:
    """The other side of --held_out_share, an evaluation set a source."""
    if not data.held_out_share:
        return {}
    keep = DocumentFilter(data.held_out_share, takes_held_out=True)
    only = len(corpora) == 1
    return {HELD_OUT if only else f"{HELD_OUT}_{name}": replace(part, keep=keep) for name, part in corpora.items()}


def whole(corpora: Mapping[str, Corpus]) -> Corpus:
    """All sources as one corpus, for training a tokenizer."""
    first, *others = corpora.values()
    return replace(first, parts=first.parts + tuple(part for other in others for part in other.parts))


@dataclass(frozen=True)
class Tokenising:
    """How text becomes tokens in this run."""

    tokenizer: Any
    cached: Callable[[Corpus], TokenCache]
    """A corpus through the cache."""
    share: Share
    """The ranks, which tokenise a stream together."""
    say: Callable[[str], None]
    warn: Callable[[str], None]
    """Heard from every rank: each reads a stream by itself."""


def train_data(
    data: DataArguments,
    plan: MixturePlan | None,
    corpora: Mapping[str, Corpus],
    tokenising: Tokenising,
    seed: int,
    rows_per_step: int,
    stream_state: dict[str, Any] | None,
) -> TrainData:
    """Packed sources, mixed where the plan says so; streams go on from `stream_state`, where there is one."""
    say = tokenising.say
    if plan is None:
        cache = tokenising.cached(corpora[PLAIN])
        _tell_left_out(PLAIN, cache, say)
        return PackedDataset(cache, data.seq_len, seed, data.document_mask)
    sources: dict[str, Source] = {}
    for source in plan.sources:
        own_seed = f"{seed}/{source.name}"
        if source.streaming:
            sources[source.name] = _stream(data, source, corpora[source.name], tokenising, own_seed)
            continue
        cache = tokenising.cached(corpora[source.name])
        _tell_left_out(source.name, cache, say)
        sources[source.name] = CachedSource(PackedDataset(cache, data.seq_len, own_seed, data.document_mask))
    epochs = [source.epochs for source in plan.sources]
    mixture = (
        StreamMixture(sources, plan.phases, epochs, data.seq_len, rows_per_step, states=stream_state)
        if plan.streams
        else Mixture(sources, plan.phases, epochs, data.seq_len, rows_per_step)
    )
    for line in _table(plan, mixture):
        say(line)
    return mixture


def _stream(data: DataArguments, source: SourcePlan, corpus: Corpus, tokenising: Tokenising, seed: str) -> StreamSource:
    settings = StreamSettings(data.shuffle_buffer, seed, data.stream_retry_s)
    facts = {
        "files": [(Path(part.label).name, part.size_bytes()) for part in corpus.parts],
        "text_column": corpus.text_column,
        "left_out": None if corpus.keep is None else corpus.keep.identity,
        "tokenizer": tokenizer_fingerprint(tokenising.tokenizer),
    }
    identity = {
        "text": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32],
        "shuffle_buffer": data.shuffle_buffer,
    }
    documents = DocumentStream(source.name, corpus, settings, tokenising.warn, tokenising.say)
    encoder = Encoder.of(tokenising.tokenizer)
    return StreamSource(documents, encoder, data.seq_len, data.document_mask, identity, tokenising.share, source.epochs)


def _tell_left_out(name: str, cache: TokenCache, say: Callable[[str], None]) -> None:
    if "filter" in cache.meta:
        read = cache.meta["documents_read"]
        say(
            f"{name}: {read - cache.n_documents:,} of {read:,} documents are not trained on: held out by their hash, "
            "in --eval_files, or empty"
        )


def _table(plan: MixturePlan, mixture: Mixture) -> list[str]:
    """What is mixed, for the run's log."""
    lines = []
    for index, (name, source) in enumerate(zip(mixture.names, mixture.sources, strict=True)):
        weights = [(step, part[index] / sum(part)) for step, part in plan.phases]
        shares = ", ".join(f"{100 * weight:.4g}%" + (f" from step {step}" if step else "") for step, weight in weights)
        size = "a stream" if source.n_blocks is None else f"{source.n_blocks:,} sequences an epoch"
        limit = plan.sources[index].epochs
        lines.append(f"source {name}: {shares} of the batches; {size}" + (f", {limit:g} epochs" if limit else ""))
    return lines
