"""What a run reads: files -> tokenizer -> token caches -> packed data, checked against the model's config."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mora_ds.arguments import Arguments
from mora_ds.data import (
    Corpus,
    PackedDataset,
    TokenCache,
    build_cache,
    check_reload,
    check_vocabulary,
    load_corpus,
    load_tokenizer,
    resolve_files,
    train_sentencepiece,
)
from mora_ds.data_arguments import DataArguments, ModelArguments
from mora_ds.errors import UserError
from mora_ds.files import copy_folder, disk_errors
from mora_ds.followers import Followers
from mora_ds.ranks import Ranks

EVAL_FLAG = "--eval_files"


@dataclass(frozen=True)
class RunData:
    """Open caches, packed, and the tokenizer that made them."""

    tokenizer: Any
    tokenizer_folder: Path
    train: PackedDataset
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
    corpus = load_corpus(data.train_files, dataset_name=data.dataset_name, text_column=data.text_column)
    eval_corpora = {
        name: load_corpus([path], text_column=data.text_column, flag=EVAL_FLAG) for name, path in _eval_sets(data)
    }
    _check_positions(model_config, data.seq_len)
    target = followers.folder / "tokenizer"
    ranks.on_first(lambda: _begin_tokenizer(target, checkpoint))
    tokenizer = _tokenizer(arguments, model_folder, model_config, target, corpus, followers)
    ranks.on_first(lambda: _save_tokenizer(tokenizer, target))
    packed = {}
    for name, part in {"": corpus, **eval_corpora}.items():
        say(f"tokens of {name or 'the training corpus'}: {_cache_folder(data)}")
        cache = _tokenise(part, tokenizer, data, ranks)
        seed = arguments.training.seed if part is corpus else 0
        packed[name] = PackedDataset(cache, data.seq_len, seed, data.document_mask, shuffle=part is corpus)
        if part is corpus:
            packed[name].check_batch_size(rows_per_step)
    return RunData(tokenizer, target, packed.pop(""), packed)


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
