"""What a run reads: files -> tokenizer -> token caches -> packed data, checked against the model's config."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mora_ds.checkpoint.layout import TOKENIZER_FOLDER
from mora_ds.checkpoint.state import TrainerState
from mora_ds.config.arguments import Arguments
from mora_ds.config.data import DataArguments
from mora_ds.config.mixture import HELD_OUT, PLAIN, MixturePlan, SourcePlan, mixture_plan
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
    build_cache,
    hashes_of,
    is_saved_dataset,
    load_corpus,
    resolve_files,
    stream_dataset,
    tokenizer_fingerprint,
)
from mora_ds.errors import UserError
from mora_ds.runtime.nodes import Followers
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.tokenizer import _begin_tokenizer, _save_tokenizer, _tokenizer


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


EVAL_FLAG = "--eval_files"


@dataclass(frozen=True)
class RunData:
    """Open caches, packed, and the tokenizer that made them."""

    tokenizer: Any
    tokenizer_folder: Path
    train: TrainData
    evaluation: dict[str, PackedDataset]


def load_data(
    arguments: Arguments,
    model_config: Any,
    model_folder: Path | None,
    followers: Followers,
    rows_per_step: int,
    checkpoint: Path | None,
    say: Callable[..., None],
) -> RunData:
    """All text of a run, tokenised. `model_folder` has the model's own tokenizer, if there is a model; a run that
    resumes from `checkpoint` goes on with the tokenizer that lies there.

    Raises `UserError` for files, tokenizers and lengths that do not fit, before anything is tokenised where possible.
    """
    data, ranks = arguments.data, followers.ranks
    plan = mixture_plan(data)
    corpora = load_sources(data, plan)
    evaluation = {
        name: load_corpus([path], text_column=data.text_column, flag=EVAL_FLAG) for name, path in _eval_sets(data)
    }
    held_out = held_out_sets(data, corpora)
    if twice := sorted(set(held_out) & set(evaluation)):
        raise UserError(f"{EVAL_FLAG}: {twice[0]} is the name of what --held_out_share holds out; take another")
    corpora = filtered(data, corpora, evaluation)
    _check_positions(model_config, data.seq_len)
    target = followers.folder / TOKENIZER_FOLDER
    ranks.on_first(lambda: _begin_tokenizer(target, checkpoint))
    tokenizer = _tokenizer(arguments, model_folder, model_config, target, whole(corpora), followers)
    ranks.on_first(lambda: _save_tokenizer(tokenizer, target))
    say(f"tokens of the training corpus: {_cache_folder(data)}")

    def tokenise(corpus: Corpus) -> TokenCache:
        return _tokenise(corpus, tokenizer, data, ranks)

    state = None if checkpoint is None else TrainerState.read(checkpoint).stream
    tokenising = Tokenising(tokenizer, tokenise, ranks, say, partial(_warn, ranks.rank))
    train = train_data(data, plan, corpora, tokenising, arguments.training.seed, rows_per_step, state)
    train.check_batch_size(rows_per_step)
    packed = {}
    for name, part in {**evaluation, **held_out}.items():
        say(f"tokens of {name}: {_cache_folder(data)}")
        packed[name] = PackedDataset(tokenise(part), data.seq_len, 0, data.document_mask, shuffle=False)
    return RunData(tokenizer, target, train, packed)


def _warn(rank: int, text: str) -> None:
    print(f"[rank {rank}] {text}", file=sys.stderr, flush=True)


def _eval_sets(data: DataArguments) -> list[tuple[str, str]]:
    """(name, path) of each evaluation set: a pattern without a name stands for one set a file."""
    sets: list[tuple[str, str]] = []
    for name, path in data.named_eval_files():
        unnamed = name == Path(path).stem
        if unnamed and glob.has_magic(path):
            sets += [(file.stem, str(file)) for file in resolve_files([path], EVAL_FLAG)]
        else:
            sets.append((name, path))
    names = [name for name, _ in sets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{EVAL_FLAG}: {', '.join(twice)} would name two sets; write NAME=PATH")
    return sets


def _check_positions(model_config: Any, seq_len: int) -> None:
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise UserError(
            f"--seq_len {seq_len} is longer than the model's {longest} positions "
            "(max_position_embeddings in its config.json)"
        )


# -- caches ----------------------------------------------------------------------------------------------------------
def _cache_folder(data: DataArguments) -> Path:
    if data.cache_dir is not None:
        return Path(data.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mora_ds" / "tokens"


def _tokenise(corpus: Corpus, tokenizer: Any, data: DataArguments, ranks: Ranks) -> TokenCache:
    return ranks.agree(
        lambda: build_cache(
            corpus,
            tokenizer,
            _cache_folder(data),
            num_proc=data.preprocessing_workers,
            is_builder=ranks.is_local_first,
            barrier=ranks.barrier,
            progress=ranks.is_first,
        )
    )
