"""Loads tokenizers, checks them against a model, and encodes documents.

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
from mora_ds.common.fetched import local
from mora_ds.common.files import JsonObject, json_digest
from mora_ds.data.readers import Document

AUTO = "auto"
NOTHING = "none"
"""Values of --document_start that are not tokens: the tokenizer's BOS if it uses one,
or no token."""


@dataclass(frozen=True)
class Encoder:
    """Encodes a batch of documents to tokens and the offsets where documents end."""

    tokenizer: PreTrainedTokenizerBase
    start_id: int | None
    """The token before every document; None for none."""
    eos_id: int
    """The token after every document."""
    dtype: str
    """numpy dtype of tokens: `<u2` for vocabularies of up to 65,536 ids, else `<u4`."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, start: str = AUTO) -> Encoder:
        """`start`: as in `start_id`. Raises `UserError` if the tokenizer has no such
        token or no end-of-text token."""
        eos_id = end_of_text_id(tokenizer)
        dtype = "<u2" if largest_id(tokenizer)[1] < 1 << 16 else "<u4"
        return cls(tokenizer, start_id(tokenizer, start), eos_id, dtype)

    def __call__(self, batch: list[Document]) -> tuple[np.ndarray, np.ndarray]:
        token_lists = self.encode(batch)
        ends = np.cumsum([len(tokens) for tokens in token_lists], dtype="<i8")
        is_last_chunk = [document.ends for document in batch]
        return np.concatenate(token_lists), ends[is_last_chunk]

    def encode(self, batch: list[Document]) -> list[np.ndarray]:
        """The tokens of each document or chunk, with the start token before a
        document's first chunk and EOS after its last one."""
        encoded = self.tokenizer(
            [document.text for document in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        start = [] if self.start_id is None else [self.start_id]
        token_lists = []
        for document, ids in zip(batch, encoded["input_ids"], strict=True):
            before = start if document.begins else []
            after = [self.eos_id] if document.ends else []
            token_lists.append(np.asarray([*before, *ids, *after], self.dtype))
        return token_lists


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "*.model",
)
"""A folder without any of these has no tokenizer, although transformers may create an
empty one for it."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has files of a tokenizer, valid or not."""
    return any(next(folder.glob(name), None) for name in _TOKENIZER_FILES)


def load_tokenizer(
    name_or_path: str | Path,
    *,
    trust_remote_code: bool = False,
    flag: str = "--tokenizer_name",
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or a Hub model. Raises `UserError` that names
    `flag` if there is none, or if it needs remote code that is not trusted."""
    path = local(name_or_path, flag)
    if path.is_dir() and not has_tokenizer(path):
        files = ", ".join(_TOKENIZER_FILES)
        raise UserError(f"{flag}: the folder {path} holds no tokenizer ({files})")
    name = str(path if path.is_dir() else name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code
        )
        # Some settings are read on the first call only.
        tokenizer("a")
        return tokenizer
    # The tokenizers library raises plain `Exception`, such as for unknown merges.
    except Exception as error:
        raise UserError(
            f"{flag}: no tokenizer can be loaded from {str(name_or_path)!r}: {error}"
        ) from error


def load_as_of_model(
    folder: Path, model_type: str, flag: str
) -> PreTrainedTokenizerBase:
    """Load the tokenizer in `folder` as transformers does in the folder of a model of
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
    """Raise `UserError` for a tokenizer with ids beyond the `vocab_size` rows of the
    model's embeddings."""
    token, largest = largest_id(tokenizer)
    if largest >= vocab_size:
        raise UserError(
            f"{flag}: the tokenizer does not fit the model: its token {token!r} has id {largest}, "
            f"the model has embeddings for ids 0 to {vocab_size - 1} only; use the model's own tokenizer"
        )


def check_reload(
    tokenizer: PreTrainedTokenizerBase,
    model_type: str,
    flag: str,
) -> None:
    """Raise `UserError` if transformers would load the tokenizer differently from the
    folder of a model of this type.

    Needed for tokenizers that are not the model's own: for example, transformers (5.24)
    loads any tokenizer in the folder of a "qwen2" model as that model's byte-level
    tokenizer, without a warning.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        again = load_as_of_model(Path(folder), model_type, flag)
    if tokenizer_fingerprint(again) != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"{flag}: transformers loads any tokenizer in the folder of a {model_type!r} model as "
            f"{type(again).__name__}, which would give other ids than this one; use the model's own tokenizer"
        )


def largest_id(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """(token, id) of the largest id, including added tokens. Ids may have gaps."""
    return max(tokenizer.get_vocab().items(), key=lambda item: item[1])


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts BOS before a text by default."""
    first = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
    first_of_text = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
    bos = tokenizer.bos_token_id
    return bos is not None and first == [bos] and first != first_of_text


def start_id(tokenizer: PreTrainedTokenizerBase, start: str = AUTO) -> int | None:
    """The id of the token before every document. `start`: "auto" for BOS if the
    tokenizer puts it before a text, "none" for no token, or a token. Raises `UserError`
    if the tokenizer has no such token."""
    if start == NOTHING:
        return None
    if start == AUTO:
        return tokenizer.bos_token_id if adds_bos(tokenizer) else None
    token_id = tokenizer.get_vocab().get(start)
    if token_id is None:
        special = ", ".join(map(repr, tokenizer.all_special_tokens)) or "none"
        raise UserError(
            f"--document_start {start!r} is not a token of the tokenizer; its special tokens are {special}"
        )
    return int(token_id)


def block_start(
    tokenizer: PreTrainedTokenizerBase, start: str, model_type: str
) -> int | None:
    """The token that every packed sequence starts with: `start_id` for Gemma, None for
    other models.

    Gemma 3 270M had perplexities of 43 and 34 on two texts in sequences of 512 tokens,
    and of 32 and 27 if each sequence starts with BOS. A small Llama trained this way
    did not learn better, and needed BOS from then on.
    """
    return start_id(tokenizer, start) if "gemma" in model_type else None


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the end-of-text token. Raises `UserError` if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path or ''} has no end-of-text token to put between documents: "
            'set "eos_token" in its tokenizer_config.json, or give another --tokenizer_name'
        )
    return int(tokenizer.eos_token_id)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all settings that determine token ids. Equal in every process, and after
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
