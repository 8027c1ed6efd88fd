"""The tokenizer of a run: the model's, a named one, or one that it trains on its
text."""

import shutil
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from mora_ds.checkpoint.layout import TOKENIZER_FOLDER, tokenizer_of
from mora_ds.checkpoint.storage import local_copy
from mora_ds.common.files import copy_folder, disk_errors
from mora_ds.config.data import ModelArguments
from mora_ds.data import (
    Corpus,
    check_reload,
    check_vocabulary,
    holds_tokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from mora_ds.train.setup import Start


def _begin(target: Path, checkpoint: Path | None) -> None:
    """Put the checkpoint's (verified) tokenizer into `target`; without a checkpoint,
    empty `target`. Checkpoints of full training hold no tokenizer: `target` then
    stays."""
    saved = None if checkpoint is None else tokenizer_of(local_copy(checkpoint))
    if checkpoint is not None and saved is None:
        return
    shutil.rmtree(target, ignore_errors=True)
    if saved is not None:
        copy_folder(saved, target)


def settle_tokenizer(
    model: ModelArguments,
    model_folder: Path | None,
    model_config: Any,
    corpora: Mapping[str, Corpus],
    start: Start,
) -> Any:
    """The tokenizer that the flags ask for, or that of the checkpoint; it is in the
    run's folder afterwards. Collective. Raises `UserError` naming the flag where it
    does not fit the model.

    `corpora`: the text on which --train_tokenizer_vocab trains one.
    """
    ranks = start.ranks
    target = start.folder / TOKENIZER_FOLDER
    ranks.on_first("folder of the tokenizer", lambda: _begin(target, start.checkpoint))
    flag = tokenizer_flag(model)
    if model.train_tokenizer_vocab:

        def train_once() -> None:
            if not holds_tokenizer(target):
                texts = chain.from_iterable(
                    corpus.texts() for corpus in corpora.values()
                )
                with disk_errors(target):
                    train_sentencepiece(texts, model.train_tokenizer_vocab, target)

        ranks.on_first("training of the tokenizer", train_once, long=True)
        tokenizer = load_tokenizer(target, flag=flag)
    else:
        tokenizer = load_named_tokenizer(model, model_folder)
    if model_folder is not None:
        check_vocabulary(tokenizer, model_config.get_text_config().vocab_size, flag)

    def check_and_save() -> None:
        if flag != "--model_name_or_path":
            check_reload(tokenizer, model_config.model_type, flag)
        if not (target / "tokenizer_config.json").exists():
            with disk_errors(target):
                tokenizer.save_pretrained(target)

    ranks.on_first("copy of the tokenizer", check_and_save)
    return tokenizer


def load_named_tokenizer(model: ModelArguments, model_folder: str | Path | None) -> Any:
    """Load the tokenizer of --tokenizer_name, or else that of the model."""
    source = model_folder if model.tokenizer_name is None else model.tokenizer_name
    assert source is not None, (
        "a model without a folder has a tokenizer named or trained"
    )
    flag = tokenizer_flag(model)
    return load_tokenizer(source, trust_remote_code=model.trust_remote_code, flag=flag)


def tokenizer_flag(model: ModelArguments) -> str:
    """The flag that says which tokenizer a run has."""
    if model.train_tokenizer_vocab:
        return "--train_tokenizer_vocab"
    return (
        "--model_name_or_path" if model.tokenizer_name is None else "--tokenizer_name"
    )
