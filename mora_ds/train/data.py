"""The data of a run: files -> tokenizer -> token caches or streams -> packed training data
and evaluation sets.
"""

import hashlib
import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from mora_ds.common.errors import UserError
from mora_ds.common.untrusted import expanded
from mora_ds.config.data import DataArguments, ModelArguments
from mora_ds.config.mixture import (
    HELD_OUT,
    PLAIN,
    MixturePlan,
    SourcePlan,
    mixture_plan,
)
from mora_ds.config.training import TrainingArguments
from mora_ds.data import (
    AUTO,
    Corpus,
    DocumentFilter,
    DocumentStream,
    Encoder,
    Mixture,
    PackedDataset,
    Source,
    StreamSource,
    TokenCache,
    build_cache,
    load_corpus,
    start_id,
    tokenizer_fingerprint,
)
from mora_ds.models.rope import longest_row
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.setup import Start
from mora_ds.train.tokenizer import load_named_tokenizer, settle_tokenizer

logger = logging.getLogger(__name__)

EVAL_FLAG = "--eval_files"

Corpora: TypeAlias = dict[str, Corpus]
"""The text of sources or evaluation sets, by their names."""


@dataclass(frozen=True)
class RunData:
    """The tokenizer, and the data that it made."""

    tokenizer: Any
    train: Mixture
    evaluation: dict[str, PackedDataset]


def load_data(
    model: ModelArguments,
    data: DataArguments,
    training: TrainingArguments,
    model_folder: Path | None,
    model_config: Any,
    start: Start,
) -> RunData:
    """Read and tokenize all text of a run. Collective.

    `model_folder` has the model's own tokenizer, where there is a model; a run that resumes
    uses the tokenizer of its checkpoint. Raises `UserError` for files, tokenizers and
    lengths that do not fit, where possible before anything is tokenized.
    """
    plan = mixture_plan(data)
    ranks = start.ranks
    corpora, evaluation = _text(data, plan)
    _check_positions(model_config, data.seq_len)
    first, *remaining = corpora.values()
    joined = replace(
        first,
        members=first.members
        + tuple(member for corpus in remaining for member in corpus.members),
    )
    tokenizer = settle_tokenizer(model, model_folder, model_config, joined, start)
    if start_id(tokenizer, data.document_start) is None and data.document_start == AUTO:
        logger.info(
            "nothing stands before a document, as this tokenizer has it: --document_start names a token for it"
        )
    tokenization = _Tokenization(tokenizer, data, ranks)
    sources: dict[str, Source] = {}
    for source in plan.sources:
        seed = training.seed if plan.is_plain else f"{training.seed}/{source.name}"
        corpus = corpora[source.name]
        if source.streaming:
            sources[source.name] = tokenization.stream(source, corpus, seed)
        else:
            sources[source.name] = tokenization.pack(corpus, seed)
    epochs = [source.epochs for source in plan.sources]
    state = None if start.state is None else start.state.stream
    rows = training.rows_per_step(ranks.world)
    train = Mixture(sources, plan.phases, epochs, data.seq_len, rows, state)
    train.check_batch_size()
    _log_mixture(plan, train)
    packed = {name: tokenization.pack(corpus) for name, corpus in evaluation.items()}
    ranks.same(
        "tokenizer and text",
        {
            "tokenizer (digest)": tokenizer_fingerprint(tokenizer),
            "training text": train.identity,
            "evaluation sets": [
                (name, dataset.content_id) for name, dataset in packed.items()
            ],
        },
    )
    return RunData(tokenizer, train, packed)


def fill_token_cache(
    model: ModelArguments, data: DataArguments, progress: bool
) -> list[tuple[str, TokenCache]]:
    """Tokenize the text of a run ahead of it, in this process. A run with the same settings
    finds the tokens.

    Returns the token cache of every source that is not streamed and of every evaluation
    set, with its name. Raises `UserError` for a tokenizer that only the run makes, and for
    what `load_data` refuses.
    """
    if model.train_tokenizer_vocab:
        raise UserError(
            "--train_tokenizer_vocab: the run trains its tokenizer when it starts; name one with --tokenizer_name"
        )
    plan = mixture_plan(data)
    streamed = {source.name for source in plan.sources if source.streaming}
    corpora, evaluation = _text(data, plan)
    tokenizer = load_named_tokenizer(model, model.model_name_or_path)
    cached = [(name, corpus) for name, corpus in corpora.items() if name not in streamed]
    caches = []
    for name, corpus in [*cached, *evaluation.items()]:
        cache = build_cache(
            corpus,
            tokenizer,
            _cache_folder(data),
            document_start=data.document_start,
            num_proc=data.preprocessing_workers,
            progress=progress,
        )
        caches.append((name, cache))
    return caches


# -- sources and evaluation sets ---------------------------------------------------------------------------------------


def _text(data: DataArguments, plan: MixturePlan) -> tuple[Corpora, Corpora]:
    """The corpus of every source, without the documents that are held out of training, and
    of every evaluation set.
    """
    corpora = _sources(data, plan)
    evaluation = {
        name: load_corpus([path], text_column=data.text_column, flag=EVAL_FLAG)
        for name, path in data.named_eval_files()
    }
    held_out: Corpora = {}
    if data.held_out_share:  # one evaluation set per source
        held_out_only = DocumentFilter(data.held_out_share, takes_held_out=True)
        for name, corpus in corpora.items():
            set_name = HELD_OUT if len(corpora) == 1 else f"{HELD_OUT}_{name}"
            held_out[set_name] = replace(corpus, keep=held_out_only)
    if duplicates := sorted(set(held_out) & set(evaluation)):
        raise UserError(
            f"{EVAL_FLAG}: {duplicates[0]} is the name of what --held_out_share holds out; choose another name"
        )
    if data.held_out_share:
        trained = DocumentFilter(data.held_out_share)
        corpora = {name: replace(corpus, keep=trained) for name, corpus in corpora.items()}
    return corpora, {**evaluation, **held_out}


def _sources(data: DataArguments, plan: MixturePlan) -> Corpora:
    """The corpus of every source by its name. Raises `UserError` naming one that is missing
    or empty.
    """
    is_plain = [source.name for source in plan.sources] == [PLAIN]
    corpora = {}
    for source in plan.sources:
        flag = source.flag if is_plain else f"source {source.name!r}"
        column = source.text_column or data.text_column
        corpora[source.name] = load_corpus(
            source.files,
            dataset_name=source.dataset,
            streaming=source.streaming,
            text_column=column,
            flag=flag,
        )
    return corpora


def _check_positions(model_config: Any, seq_len: int) -> None:
    longest = longest_row(model_config)
    if longest is not None and seq_len > longest:
        raise UserError(
            f"--seq_len {seq_len} is longer than the model's {longest} positions "
            "(max_position_embeddings in its config.json): --rope_scaling makes more of them"
        )


# -- tokens ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tokenization:
    """How the text of this run becomes packed tokens; its methods are collective."""

    tokenizer: Any
    data: DataArguments
    ranks: Ranks

    def cache(self, corpus: Corpus) -> TokenCache:
        """The tokens of a corpus, from the cache folder or made now by the first process of
        each node.
        """

        def build() -> TokenCache:
            return build_cache(
                corpus,
                self.tokenizer,
                _cache_folder(self.data),
                document_start=self.data.document_start,
                num_proc=self.data.preprocessing_workers,
                progress=self.ranks.is_first,
            )

        name = f"token cache of {corpus.flag}"
        self.ranks.agree(
            f"building of the {name}",
            lambda: build() if self.ranks.is_local_first else None,
            long=True,
        )
        return self.ranks.agree(name, build)  # which is there now

    def pack(self, corpus: Corpus, seed: int | str = 0) -> PackedDataset:
        return PackedDataset(
            self.cache(corpus), self.data.seq_len, seed, self.data.document_mask
        )

    def stream(self, source: SourcePlan, corpus: Corpus, seed: int | str) -> StreamSource:
        """A training source that is tokenized while training."""
        data = self.data
        encoder = Encoder.of(self.tokenizer, data.document_start)
        facts = {
            "files": [
                (Path(member.label).name, member.size_bytes()) for member in corpus.members
            ],
            "text_column": corpus.text_column,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            **(
                {}
                if encoder.start_id == start_id(self.tokenizer)
                else {"start": encoder.start_id}
            ),
        }
        identity = {
            "text": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[
                :32
            ],
            "shuffle_buffer": data.shuffle_buffer,
        }
        documents = DocumentStream(source.name, corpus, data.shuffle_buffer, seed)
        stream = StreamSource(
            documents,
            encoder,
            data.seq_len,
            data.document_mask,
            identity,
            share=self.ranks,
            ranks=self.ranks.world,
        )
        # A source without text must not end a run that has begun.
        self.ranks.on_first(
            f"start of source {source.name!r}", lambda: bool(stream.probe(0)), long=True
        )
        return stream


def _log_mixture(plan: MixturePlan, mixture: Mixture) -> None:
    if plan.is_plain:
        return
    for index, (name, source) in enumerate(
        zip(mixture.names, mixture.sources, strict=True)
    ):
        weights = ", ".join(
            f"{weights[index]:g} from step {step}" for step, weights in plan.phases
        )
        size = (
            "a stream"
            if source.n_blocks is None
            else f"{source.n_blocks:,} sequences an epoch"
        )
        logger.info(f"source {name}: weight {weights}; {size}")


def _cache_folder(data: DataArguments) -> Path:
    """The folder of the token cache (--cache_dir)."""
    if data.cache_dir is not None:
        return expanded(data.cache_dir, "--cache_dir")
    return (
        expanded(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "XDG_CACHE_HOME")
        / "mora_ds"
        / "tokens"
    )
