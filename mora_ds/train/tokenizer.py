"""The tokenizer of a run: the model's, a named one, or one trained on the run's
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
    has_tokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from mora_ds.runtime.nodes import write_on_rank0
from mora_ds.train.setup import RunContext


def _restore(target: Path, checkpoint: Path | None) -> None:
    """Replace `target` with the (verified) tokenizer of the checkpoint; delete `target`
    if there is no checkpoint. A checkpoint of full training has no tokenizer: keep
    `target`."""
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
    context: RunContext,
) -> Any:
    """Return the tokenizer of the checkpoint or of the flags, and save it in the run's
    folder. Collective. Raises `UserError` that names the flag if the tokenizer does not
    fit the model.

    `corpora`: the text for --train_tokenizer_vocab.
    """
    ranks = context.ranks
    target = context.folder / TOKENIZER_FOLDER
    ranks.run_on_rank0(
        "folder of the tokenizer", lambda: _restore(target, context.checkpoint)
    )
    flag = tokenizer_flag(model)
    if model.train_tokenizer_vocab:

        def train_once() -> None:
            if not has_tokenizer(target):
                texts = chain.from_iterable(
                    corpus.texts() for corpus in corpora.values()
                )
                with disk_errors(target):
                    train_sentencepiece(texts, model.train_tokenizer_vocab, target)

        write_on_rank0(ranks, "training of the tokenizer", target, train_once)
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

    ranks.run_on_rank0("copy of the tokenizer", check_and_save)
    return tokenizer


def load_named_tokenizer(model: ModelArguments, model_folder: str | Path | None) -> Any:
    """Load the tokenizer of --tokenizer_name, or else the model's."""
    source = model_folder if model.tokenizer_name is None else model.tokenizer_name
    assert source is not None, (
        "a model without a folder needs --tokenizer_name or --train_tokenizer_vocab"
    )
    flag = tokenizer_flag(model)
    return load_tokenizer(source, trust_remote_code=model.trust_remote_code, flag=flag)


def tokenizer_flag(model: ModelArguments) -> str:
    """The flag that selects the tokenizer of a run."""
    if model.train_tokenizer_vocab:
        return "--train_tokenizer_vocab"
    return (
        "--model_name_or_path" if model.tokenizer_name is None else "--tokenizer_name"
    )
