"""Tokenizers: loaded, checked against a model, and encoding documents.

load_tokenizer(folder | hub name)                   ->  a transformers tokenizer
train_sentencepiece(corpus.texts(), N, folder)      ->  folder, for load_tokenizer
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mora_ds.common.errors import UserError
from mora_ds.common.files import JsonObject, json_digest
from mora_ds.common.untrusted import expanded
from mora_ds.data.readers import Document

AUTO = "auto"
NOTHING = "none"
"""What stands before documents where no token is named: the tokenizer's BOS, or
nothing."""


@dataclass(frozen=True)
class Encoder:
    """Turns a batch of documents into tokens and the offsets at which documents end."""

    tokenizer: PreTrainedTokenizerBase
    start_id: int | None
    """Put before every document; None for nothing."""
    eos_id: int
    """Put after every document."""
    dtype: str
    """Of the tokens: `<u2` for vocabularies of up to 65,536 ids, else `<u4`."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, start: str = AUTO) -> Encoder:
        """`start`: as in `start_id`. Raises `UserError` for one that it does not have,
        and where there is no end-of-text token."""
        eos_id = end_of_text_id(tokenizer)
        dtype = "<u2" if largest_id(tokenizer)[1] < 1 << 16 else "<u4"
        return cls(tokenizer, start_id(tokenizer, start), eos_id, dtype)

    def __call__(self, batch: list[Document]) -> tuple[np.ndarray, np.ndarray]:
        rows = self.rows(batch)
        ends = np.cumsum([len(row) for row in rows], dtype="<i8")
        is_last_chunk = [document.ends for document in batch]
        return np.concatenate(rows), ends[is_last_chunk]

    def rows(self, batch: list[Document]) -> list[np.ndarray]:
        """The tokens of each document or chunk, with the start token where a document
        begins, and EOS where it ends."""
        encoded = self.tokenizer(
            [document.text for document in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        start = [] if self.start_id is None else [self.start_id]
        rows = []
        for document, ids in zip(batch, encoded["input_ids"], strict=True):
            before = start if document.begins else []
            after = [self.eos_id] if document.ends else []
            rows.append(np.asarray([*before, *ids, *after], self.dtype))
        return rows


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "*.model",
)
"""A folder with none of these has no tokenizer, where transformers might make an empty
one."""


def holds_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer in a folder, be it readable or not."""
    return any(next(folder.glob(name), None) for name in _TOKENIZER_FILES)


def load_tokenizer(
    name_or_path: str | Path,
    *,
    trust_remote_code: bool = False,
    flag: str = "--tokenizer_name",
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub model. Raises `UserError`, which names `flag`,
    where there is none, or where it has code that is not trusted."""
    path = expanded(name_or_path, flag)
    if path.is_dir() and not holds_tokenizer(path):
        files = ", ".join(_TOKENIZER_FILES)
        raise UserError(f"{flag}: the folder {path} holds no tokenizer ({files})")
    name = str(path if path.is_dir() else name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code
        )
        # Some of its settings are first read when it encodes.
        tokenizer("a")
        return tokenizer
    # The tokenizers library raises plain ones, such as for merges of unknown tokens.
    except Exception as error:
        raise UserError(
            f"{flag}: no tokenizer can be loaded from {str(name_or_path)!r}: {error}"
        ) from error


def load_as_of_model(
    folder: Path, model_type: str, flag: str
) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder` as transformers loads it in the folder of a model of
    that type."""
    config = folder / "config.json"
    config.write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    try:
        return load_tokenizer(folder, flag=flag)
    finally:
        config.unlink()


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, flag: str = "--tokenizer_name"
) -> None:
    """Raise `UserError` for a tokenizer with ids beyond the model's `vocab_size`
    rows."""
    token, largest = largest_id(tokenizer)
    if largest >= vocab_size:
        raise UserError(
            f"{flag}: the tokenizer does not fit the model: its token {token!r} has id {largest}, "
            f"the model has embeddings for ids 0 to {vocab_size - 1} only; take the model's own tokenizer"
        )


def check_reload(
    tokenizer: PreTrainedTokenizerBase,
    model_type: str,
    flag: str,
) -> None:
    """Raise `UserError` where transformers would load the tokenizer, saved with a model
    of this type, as another one.

    Needed for tokenizers that are not the model's own: transformers (5.24) reads the
    tokenizer in the folder of a "qwen2" model, for example, as that model's byte-level
    tokenizer, without a warning.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        again = load_as_of_model(Path(folder), model_type, flag)
    if tokenizer_fingerprint(again) != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"{flag}: transformers loads any tokenizer in the folder of a {model_type!r} model as "
            f"{type(again).__name__}, which would give other ids than this one; take the model's own tokenizer"
        )


def largest_id(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """(token, id) of the largest id, added tokens included. Ids may have gaps."""
    return max(tokenizer.get_vocab().items(), key=lambda item: item[1])


def wants_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts BOS before a text by default."""
    first = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
    first_of_text = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
    bos = tokenizer.bos_token_id
    return bos is not None and first == [bos] and first != first_of_text


def start_id(tokenizer: PreTrainedTokenizerBase, start: str = AUTO) -> int | None:
    """The id of what stands before every document: for auto BOS, where the tokenizer
    puts it before a text; nothing for none; else the token `start`. Raises `UserError`
    where the tokenizer does not have it."""
    if start == NOTHING:
        return None
    if start == AUTO:
        return tokenizer.bos_token_id if wants_bos(tokenizer) else None
    token_id = tokenizer.get_vocab().get(start)
    if token_id is None:
        special = ", ".join(map(repr, tokenizer.all_special_tokens)) or "none"
        raise UserError(
            f"--document_start {start!r} is no token of the tokenizer, whose special tokens are {special}"
        )
    return int(token_id)


def block_start(
    tokenizer: PreTrainedTokenizerBase, start: str, model_type: str
) -> int | None:
    """What every packed sequence begins with, also one that goes on with a document:
    `start_id` for Gemma, None for other models.

    Gemma 3 270M had a perplexity of 43 and 34 on two texts in sequences of 512 tokens,
    and 32 and 27 where each begins with BOS. A small Llama that was trained so learned
    no more, and then wanted BOS first, too.
    """
    return start_id(tokenizer, start) if "gemma" in model_type else None


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the end-of-text token. Raises `UserError` where the tokenizer has
    none."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path or ''} has no end-of-text token to put between documents: "
            'set "eos_token" in its tokenizer_config.json, or give another --tokenizer_name'
        )
    return int(tokenizer.eos_token_id)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides the ids, the same in every process and after
    saving and loading."""
    facts: JsonObject = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "split_special_tokens": tokenizer.split_special_tokens,
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        for key in ("truncation", "padding"):
            content.pop(key, None)
        facts["backend"] = content
    else:
        settings = tokenizer.init_kwargs.items()
        facts["class"] = type(tokenizer).__name__
        facts["vocabulary"] = tokenizer.get_vocab()
        facts["settings"] = {
            key: str(value) for key, value in settings if "file" not in key
        }
    return json_digest(facts)
