"""The tokenizer of a run: the model's, a named one, or one that the run trains once on its corpus."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mora_ds.checkpoint.layout import tokenizer_of
from mora_ds.common.files import copy_folder, disk_errors
from mora_ds.config.data import ModelArguments
from mora_ds.data import (
    Corpus,
    check_reload,
    check_vocabulary,
    load_tokenizer,
    train_sentencepiece,
)
from mora_ds.runtime.ranks import Ranks


def begin_tokenizer(target: Path, checkpoint: Path | None) -> None:
    """Put the checkpoint's (verified) tokenizer into `target`; without a checkpoint, empty `target`.

    Checkpoints of full training hold no tokenizer: `target` then stays as it is.
    """
    saved = tokenizer_of(checkpoint)
    if checkpoint is not None and saved is None:
        return
    shutil.rmtree(target, ignore_errors=True)
    if saved is not None:
        copy_folder(saved, target)


def load_or_train_tokenizer(
    model: ModelArguments,
    model_folder: Path | None,
    model_config: Any,
    target: Path,
    corpus: Corpus,
    ranks: Ranks,
) -> Any:
    """The tokenizer that the flags ask for. Collective.

    One that is trained on the corpus or named must fit the model: `UserError` naming the flag.
    """
    flag = tokenizer_flag(model)
    if model.train_tokenizer_vocab:
        path = target / "tokenizer.model"

        def train_once() -> None:
            if not path.exists():
                with disk_errors(target):
                    train_sentencepiece(corpus.texts(), model.train_tokenizer_vocab, target)

        ranks.on_first("training of the tokenizer", train_once, long=True)
        tokenizer = load_tokenizer(path, flag=flag)
    else:
        tokenizer = load_named_tokenizer(model, model_folder)
    if model_folder is not None:
        check_vocabulary(tokenizer, model_config.get_text_config().vocab_size, flag)
    if flag != "--model_name_or_path":
        ranks.on_first(
            "reload of the tokenizer",
            lambda: check_reload(tokenizer, model_config.model_type, flag),
        )
    return tokenizer


def load_named_tokenizer(model: ModelArguments, model_folder: str | Path | None) -> Any:
    """Load the tokenizer of --tokenizer_name, or else that of the model."""
    source = model_folder if model.tokenizer_name is None else model.tokenizer_name
    assert source is not None, "validated: a model without a folder has a tokenizer named or trained"
    return load_tokenizer(source, trust_remote_code=model.trust_remote_code, flag=tokenizer_flag(model))


def tokenizer_flag(model: ModelArguments) -> str:
    """The flag that says which tokenizer a run has."""
    if model.train_tokenizer_vocab:
        return "--train_tokenizer_vocab"
    return "--model_name_or_path" if model.tokenizer_name is None else "--tokenizer_name"


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save the tokenizer unless the folder has one."""
    if not (folder / "tokenizer_config.json").exists():
        with disk_errors(folder):
            tokenizer.save_pretrained(folder)
