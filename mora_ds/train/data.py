"""The data of a run: files -> tokenizer -> token caches or streams -> packed
sequences."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from mora_ds.common.errors import UserError
from mora_ds.common.fetched import users_cache
from mora_ds.common.files import JsonObject, json_digest
from mora_ds.common.untrusted import expanded
from mora_ds.config.data import DataArguments, ModelArguments
from mora_ds.config.mixture import (
    HELD_OUT,
    PLAIN,
    MixtureConfig,
    SourcePlan,
    mixture_config,
)
from mora_ds.config.training import TrainingArguments
from mora_ds.data import (
    AUTO,
    Corpus,
    DocumentFilter,
    DocumentStream,
    Encoder,
    JoinedCache,
    Mixture,
    PackedDataset,
    Source,
    StreamSource,
    TokenCache,
    block_start,
    build_cache,
    load_corpus,
    start_id,
    tokenizer_fingerprint,
)
from mora_ds.models.rope import max_positions
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.setup import RunContext
from mora_ds.train.tokenizer import load_named_tokenizer, settle_tokenizer

logger = logging.getLogger(__name__)

EVAL_FLAG = "--eval_files"

Corpora: TypeAlias = dict[str, Corpus]
"""The text of sources or evaluation sets, by their names."""


@dataclass(frozen=True)
class RunData:
    """The tokenizer and the tokenized data of a run."""

    tokenizer: Any
    train: Mixture
    evaluation: dict[str, PackedDataset]


def load_data(
    model: ModelArguments,
    data: DataArguments,
    training: TrainingArguments,
    model_folder: Path | None,
    model_config: Any,
    context: RunContext,
) -> RunData:
    """Read and tokenize all text of a run. Collective.

    `model_folder`: holds the model's tokenizer; None for a model without a folder. A
    resumed run uses the tokenizer of its checkpoint. Raises `UserError` for files,
    tokenizers and lengths that do not fit, if possible before tokenizing.
    """
    config = mixture_config(data)
    ranks = context.ranks
    # Token files at URLs are fetched
    corpora, evaluation = ranks.agree("text", lambda: _text(data, config), long=True)
    _check_positions(model_config, data.seq_len)
    tokenizer = settle_tokenizer(model, model_folder, model_config, corpora, context)
    if start_id(tokenizer, data.document_start) is None and data.document_start == AUTO:
        logger.info(
            "no token separates documents, because this tokenizer adds none: if pretraining used one, name it with "
            "--document_start"
        )
    first = block_start(tokenizer, data.document_start, model_config.model_type)
    tokenization = _Tokenization(tokenizer, data, ranks, first)
    sources: dict[str, Source] = {}
    for source in config.sources:
        seed = training.seed if config.is_plain else f"{training.seed}/{source.name}"
        corpus = corpora[source.name]
        if source.streaming:
            sources[source.name] = tokenization.stream(source, corpus, seed)
        else:
            sources[source.name] = tokenization.pack(corpus, seed)
    epochs = [source.epochs for source in config.sources]
    state = None if context.state is None else context.state.stream
    batch_size = training.global_batch_size(ranks.world)
    train = Mixture(sources, config.phases, epochs, data.seq_len, batch_size, state)
    train.check_batch_size()
    _log_mixture(config, train)
    packed = {name: tokenization.pack(corpus) for name, corpus in evaluation.items()}
    facts = {
        "tokenizer (digest)": tokenizer_fingerprint(tokenizer),
        "training text": train.identity,
        "evaluation sets": [
            (name, dataset.content_id) for name, dataset in packed.items()
        ],
    }
    ranks.same("tokenizer and text", facts)
    return RunData(tokenizer, train, packed)


def fill_token_cache(
    model: ModelArguments, data: DataArguments, progress: bool
) -> list[tuple[str, TokenCache | JoinedCache]]:
    """Tokenize the text of a later run in this process. A run with the same settings
    finds the tokens in the cache.

    Returns (name, token cache) of every source that is not streamed and of every
    evaluation set. Raises `UserError` for a tokenizer that the run itself trains, and
    for everything that `load_data` rejects.
    """
    if model.train_tokenizer_vocab:
        raise UserError(
            "--train_tokenizer_vocab: the run trains its tokenizer when it starts; name one with --tokenizer_name"
        )
    config = mixture_config(data)
    corpora, evaluation = _text(data, config)
    tokenizer = load_named_tokenizer(model, model.model_name_or_path)
    corpora = {
        source.name: corpora[source.name]
        for source in config.sources
        if not source.streaming
    }
    return [
        (name, cached(corpus, tokenizer, data, progress))
        for name, corpus in [*corpora.items(), *evaluation.items()]
    ]


# -- sources and evaluation sets -------------------------------------------------------


def _text(data: DataArguments, config: MixtureConfig) -> tuple[Corpora, Corpora]:
    """Return (corpora for training, corpora for evaluation) by name. With
    --held_out_share, the documents held out of each source become an evaluation set."""
    corpora = _sources(data, config)
    evaluation = {
        name: load_corpus([path], text_column=data.text_column, flag=EVAL_FLAG)
        for name, path in data.named_eval_files()
    }
    if not data.held_out_share:
        return corpora, evaluation
    trained = DocumentFilter(data.held_out_share)
    held_out = DocumentFilter(data.held_out_share, takes_held_out=True)
    for name, corpus in corpora.items():
        set_name = HELD_OUT if len(corpora) == 1 else f"{HELD_OUT}_{name}"
        if set_name in evaluation:
            raise UserError(
                f"{EVAL_FLAG}: the set of --held_out_share is named {set_name}; choose another name"
            )
        evaluation[set_name] = replace(corpus, keep=held_out)
    return {name: replace(corpora[name], keep=trained) for name in corpora}, evaluation


def _sources(data: DataArguments, config: MixtureConfig) -> Corpora:
    """The corpus of every source. Raises `UserError` that names a missing or empty
    source."""
    is_plain = [source.name for source in config.sources] == [PLAIN]
    corpora = {}
    for source in config.sources:
        corpora[source.name] = load_corpus(
            source.files,
            dataset_name=source.dataset,
            streaming=source.streaming,
            text_column=source.text_column or data.text_column,
            flag=source.flag if is_plain else f"source {source.name!r}",
        )
    return corpora


def _check_positions(model_config: Any, seq_len: int) -> None:
    longest = max_positions(model_config)
    if longest is not None and seq_len > longest:
        raise UserError(
            f"--seq_len {seq_len} is longer than the model's {longest} positions "
            "(max_position_embeddings in its config.json): --rope_scaling extends them"
        )


# -- tokens ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tokenization:
    """Turns the text of a run into packed tokens. Its methods are collective."""

    tokenizer: Any
    data: DataArguments
    ranks: Ranks
    block_start: int | None
    """The token that every packed sequence starts with, if any."""

    def cache(self, corpus: Corpus) -> TokenCache | JoinedCache:
        """The tokens of a corpus. Local rank 0 of each node builds those that are
        missing in its cache folder."""
        name = f"token cache of {corpus.flag}"

        def build() -> TokenCache | JoinedCache:
            return cached(corpus, self.tokenizer, self.data, self.ranks.is_rank0)

        def build_first() -> None:
            if self.ranks.is_local_rank0:
                build()

        self.ranks.agree(f"building of the {name}", build_first, long=True)
        return self.ranks.agree(name, build)

    def pack(self, corpus: Corpus, seed: int | str = 0) -> PackedDataset:
        return PackedDataset(
            self.cache(corpus),
            self.data.seq_len,
            seed,
            self.data.document_mask,
            self.block_start,
        )

    def stream(
        self, source: SourcePlan, corpus: Corpus, seed: int | str
    ) -> StreamSource:
        """A training source that is tokenized during training."""
        data = self.data
        encoder = Encoder.of(self.tokenizer, data.document_start)
        files = [
            (Path(member.label).name, member.size_bytes()) for member in corpus.members
        ]
        facts: JsonObject = {
            "files": files,
            "text_column": corpus.text_column,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
        }
        if encoder.start_id != start_id(self.tokenizer):
            facts["start"] = encoder.start_id
        documents = DocumentStream(source.name, corpus, data.shuffle_buffer, seed)
        identity = {
            "text": json_digest(facts)[:32],
            "shuffle_buffer": data.shuffle_buffer,
            "shards": len(documents.shards()),
        }
        stream = StreamSource(
            documents,
            encoder,
            data.seq_len,
            data.document_mask,
            identity,
            map_over_ranks=self.ranks.map,
            ranks=self.ranks.world,
            block_start=self.block_start,
        )
        # Fail on a source without text now, not in the middle of the run.
        check = f"start of source {source.name!r}"
        self.ranks.run_on_rank0(check, lambda: bool(stream.peek(0)), long=True)
        return stream


def _log_mixture(config: MixtureConfig, mixture: Mixture) -> None:
    if config.is_plain:
        return
    for index, source in enumerate(mixture.sources):
        phases = [
            f"{weights[index]:g} from step {step}" for step, weights in config.phases
        ]
        size = "a stream"
        if source.n_blocks is not None:
            size = f"{source.n_blocks:,} sequences an epoch"
        logger.info(
            f"source {mixture.names[index]}: weight {', '.join(phases)}; {size}"
        )


def cache_folder(data: DataArguments) -> Path:
    """--cache_dir, or its default."""
    if data.cache_dir is not None:
        return expanded(data.cache_dir, "--cache_dir")
    return users_cache() / "tokens"


def cached(
    corpus: Corpus, tokenizer: Any, data: DataArguments, progress: bool
) -> TokenCache | JoinedCache:
    """The tokens of a corpus, read from the token cache (--cache_dir) or built now."""
    return build_cache(
        corpus,
        tokenizer,
        cache_folder(data),
        document_start=data.document_start,
        num_proc=data.preprocessing_workers,
        progress=progress,
    )
