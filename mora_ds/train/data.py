"""What a run reads: files -> tokenizer -> token caches -> packed data, checked against the model's config."""

from __future__ import annotations

import glob
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mora_ds.checkpoint.folder import TrainerState
from mora_ds.config.arguments import Arguments
from mora_ds.config.data import DataArguments, ModelArguments
from mora_ds.config.mixture import mixture_plan
from mora_ds.data import (
    Corpus,
    PackedDataset,
    TokenCache,
    TrainData,
    build_cache,
    check_reload,
    check_vocabulary,
    load_corpus,
    load_tokenizer,
    resolve_files,
    train_sentencepiece,
)
from mora_ds.errors import UserError
from mora_ds.files import copy_folder, disk_errors
from mora_ds.runtime.nodes import Followers
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.run_sources import Tokenising, filtered, held_out_sets, load_sources, train_data, whole

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
    target = followers.folder / "tokenizer"
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


# -- tokenizer -------------------------------------------------------------------------------------------------------


def _begin_tokenizer(target: Path, checkpoint: Path | None) -> None:
    """That of the checkpoint, whose files were verified; none for a new run. Full training keeps its own."""
    saved = None if checkpoint is None else checkpoint / "tokenizer"
    if saved is not None and not saved.is_dir():
        return
    shutil.rmtree(target, ignore_errors=True)
    if saved is not None:
        copy_folder(saved, target)


def _tokenizer(
    arguments: Arguments,
    model_folder: Path | None,
    model_config: Any,
    target: Path,
    corpus: Corpus,
    followers: Followers,
) -> Any:
    """Trained on the corpus, named, or the model's own; the first two must fit a model that they do not come from."""
    model, ranks = arguments.model, followers.ranks
    if model.train_tokenizer_vocab:
        flag, path = "--train_tokenizer_vocab", target / "tokenizer.model"
        ranks.on_first(lambda: _train_once(corpus, model, path))
        followers.share(target)
        tokenizer = load_tokenizer(path, flag=flag)
    elif model.tokenizer_name is not None:
        flag = "--tokenizer_name"
        tokenizer = load_tokenizer(model.tokenizer_name, trust_remote_code=model.trust_remote_code, flag=flag)
    else:
        assert model_folder is not None, "validated: a model without a folder has a tokenizer named or trained"
        flag = "--model_name_or_path"
        tokenizer = load_tokenizer(model_folder, trust_remote_code=model.trust_remote_code, flag=flag)
    if model_folder is not None:
        check_vocabulary(tokenizer, model_config.get_text_config().vocab_size, flag)
    if flag != "--model_name_or_path":
        ranks.on_first(lambda: check_reload(tokenizer, model_config.model_type, flag))
    return tokenizer


def _train_once(corpus: Corpus, model: ModelArguments, path: Path) -> None:
    if not path.exists():
        with disk_errors(path.parent):
            train_sentencepiece(
                corpus.texts(), model.train_tokenizer_vocab, path.parent, algorithm=model.train_tokenizer_type
            )


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Once a run: checkpoints hold hard links of these files."""
    if not (folder / "tokenizer_config.json").exists():
        with disk_errors(folder):
            tokenizer.save_pretrained(folder)


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
