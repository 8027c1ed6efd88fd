"""The tokenizer of a run: the model's, a given one, or one trained once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mora_ds.checkpoint.layout import TOKENIZER_FOLDER
from mora_ds.config.arguments import Arguments
from mora_ds.config.data import ModelArguments
from mora_ds.data import (
    Corpus,
    check_reload,
    check_vocabulary,
    load_tokenizer,
    train_sentencepiece,
)
from mora_ds.files import copy_folder, disk_errors
from mora_ds.runtime.nodes import Followers


# -- tokenizer -------------------------------------------------------------------------------------------------------
def _begin_tokenizer(target: Path, checkpoint: Path | None) -> None:
    """That of the checkpoint, whose files were verified; none for a new run. Full training keeps its own."""
    saved = None if checkpoint is None else checkpoint / TOKENIZER_FOLDER
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
