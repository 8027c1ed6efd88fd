"""Loads a tokenizer (the model's own, or a SentencePiece `.model` file), checks it, and encodes documents with it.

load_tokenizer(folder | hub name | file.model)      ->  a transformers tokenizer
train_sentencepiece(corpus.texts(), N, folder)      ->  folder/tokenizer.model, for load_tokenizer
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mora_ds.common.errors import UserError
from mora_ds.common.untrusted import expanded
from mora_ds.data.readers import CHUNK_CHARACTERS, Document
from mora_ds.data.sentencepiece import wrap_sentencepiece

PIECE_CHARACTERS = 1 << 18
"""A text of more than `CHUNK_CHARACTERS` (a record of JSON or a table) is tokenised in pieces of about this size: a
tokenizer takes about 200 bytes of memory for each character of a text."""

_OVERLAP = 1 << 12
"""Characters that two neighbouring pieces have in common."""

AUTO, NOTHING = "auto", "none"
"""What may stand before every document in place of a named token: BOS where the tokenizer puts it, or nothing."""

_AGREEING = 8
"""Tokens on both sides of a cut that must be the same in both pieces."""


@dataclass(frozen=True)
class Encoder:
    """Turns a batch of documents into tokens and the offsets at which documents end. Pickled to worker processes."""

    tokenizer: PreTrainedTokenizerBase
    start_id: int | None
    """Put before every document; None for nothing."""
    eos_id: int
    """Put after every document."""
    dtype: str
    """Of the tokens: `<u2` for vocabularies of up to 65,536 ids, else `<u4`."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, start: str = AUTO) -> Encoder:
        """`start`: as in `start_id`. Raises `UserError` for another one, and where there is no end-of-text token."""
        eos_id = end_of_text_id(tokenizer)
        dtype = "<u2" if largest_id(tokenizer)[1] < 1 << 16 else "<u4"
        return cls(tokenizer, start_id(tokenizer, start), eos_id, dtype)

    def __call__(self, batch: list[Document]) -> tuple[np.ndarray, np.ndarray]:
        rows = self.rows(batch)
        ends = np.cumsum([len(row) for row in rows], dtype="<i8")[[document.ends for document in batch]]
        return np.concatenate(rows), ends

    def rows(self, batch: list[Document]) -> list[np.ndarray]:
        """The tokens of each document or chunk, with the start token and EOS where a document begins and ends."""
        in_pieces = getattr(self.tokenizer, "is_fast", False)  # others do not say where in the text their tokens are
        is_long = [in_pieces and len(document.text) > CHUNK_CHARACTERS for document in batch]
        texts = [document.text for document, long in zip(batch, is_long, strict=True) if not long]
        short = iter(self._encoded(texts)["input_ids"] if texts else [])
        encoded = [
            self._in_pieces(document.text) if long else next(short)
            for document, long in zip(batch, is_long, strict=True)
        ]
        start = [] if self.start_id is None else [self.start_id]
        rows = []
        for document, ids in zip(batch, encoded, strict=True):
            parts = (start if document.begins else [], ids, [self.eos_id] if document.ends else [])
            rows.append(np.concatenate([np.asarray(part, self.dtype) for part in parts]))
        return rows

    def _encoded(self, texts: list[str], offsets: bool = False) -> Any:
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False,
            return_offsets_mapping=offsets,
        )  # fmt: skip

    def _in_pieces(self, text: str) -> np.ndarray:
        """The tokens that the whole text has, from pieces that overlap, cut where both neighbours have the same tokens.
        A text without such a place (one letter a million times) is cut between any two tokens."""
        ids: list[np.ndarray] = []
        piece, end = self._piece(text, 0), PIECE_CHARACTERS
        while end + _OVERLAP < len(text):
            following = self._piece(text, end)
            cut = _common_cut(piece, following, end + _OVERLAP // 2)
            if cut is None:
                cut = (int(np.searchsorted(piece.starts, end)), 0)
                end = int(piece.starts[cut[0]]) if cut[0] < len(piece.starts) else end
                following = self._piece(text, end)
            ids.append(piece.ids[: cut[0]])
            piece = _Piece(following.ids[cut[1] :], following.starts[cut[1] :])
            end += PIECE_CHARACTERS
        return np.concatenate([*ids, piece.ids])

    def _piece(self, text: str, start: int) -> _Piece:
        encoded = self._encoded([text[start : start + PIECE_CHARACTERS + _OVERLAP]], offsets=True)
        starts = np.array([begin for begin, _ in encoded["offset_mapping"][0]], np.int64)
        return _Piece(np.array(encoded["input_ids"][0], self.dtype), starts + start)


@dataclass(frozen=True)
class _Piece:
    """The tokens of a part of a text."""

    ids: np.ndarray
    starts: np.ndarray
    """The character of the whole text at which each token begins, ascending."""


def _common_cut(one: _Piece, other: _Piece, wanted: int) -> tuple[int, int] | None:
    """(index in `one`, index in `other`) of a token from which on `other` goes on for `one`: the first that begins at
    character `wanted` or later with `_AGREEING` tokens before and after it that are the same in both."""
    for index in range(int(np.searchsorted(other.starts, wanted)), len(other.ids)):
        at = int(np.searchsorted(one.starts, other.starts[index]))
        if at + _AGREEING > len(one.ids):
            return None
        here, there = slice(at - _AGREEING, at + _AGREEING), slice(index - _AGREEING, index + _AGREEING)
        if index >= _AGREEING <= at and _same(one, here, other, there):
            return at, index
    return None


def _same(one: _Piece, here: slice, other: _Piece, there: slice) -> bool:
    return np.array_equal(one.ids[here], other.ids[there]) and np.array_equal(one.starts[here], other.starts[there])


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tekken.json", "*.model")
"""A folder with none of these has no tokenizer (transformers would make an empty one for some model types)."""


def load_tokenizer(
    name_or_path: str | Path, *, trust_remote_code: bool = False, flag: str = "--tokenizer_name"
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub model, or a SentencePiece `.model` file as a transformers tokenizer.

    Raises `UserError`, which names `flag`, where there is none, or where it has code that is not trusted.
    """
    path = expanded(name_or_path, flag)
    if path.suffix == ".model" or path.is_file():
        if not path.is_file():
            raise UserError(f"{flag}: there is no file {path}")
        return wrap_sentencepiece(path)
    if path.is_dir() and not any(next(path.glob(name), None) for name in _TOKENIZER_FILES):
        raise UserError(
            f"{flag}: the folder {path} holds no tokenizer ({', '.join(_TOKENIZER_FILES)}); "
            "give one with --tokenizer_name, or train one with --train_tokenizer_vocab"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path if path.is_dir() else name_or_path), trust_remote_code=trust_remote_code
        )
        tokenizer("a")  # which is where some of its settings are first read
        return tokenizer
    except Exception as error:  # the tokenizers library raises plain ones, for merges of unknown tokens for example
        untrusted = not trust_remote_code and "trust_remote_code" in str(error)
        hint = " (--trust_remote_code runs its code)" if untrusted else ""
        raise UserError(f"{flag}: no tokenizer can be loaded from {str(name_or_path)!r}{hint}: {error}") from error


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, flag: str = "--tokenizer_name") -> None:
    """Raises `UserError` when the tokenizer has ids beyond the model's `vocab_size` embeddings."""
    token, largest = largest_id(tokenizer)
    if largest >= vocab_size:
        raise UserError(
            f"{flag}: the tokenizer does not fit the model: its token {token!r} has id {largest}, "
            f"the model has embeddings for ids 0 to {vocab_size - 1} only; take the model's own tokenizer"
        )


def check_reload(tokenizer: PreTrainedTokenizerBase, model_type: str, flag: str = "--train_tokenizer_vocab") -> None:
    """Raises `UserError` when transformers would load the tokenizer, saved with a model of this type, as another one.

    Needed for tokenizers that are not the model's own: transformers (5.24) reads the tokenizer in the folder of a
    "qwen2" model, for example, as that model's byte-level tokenizer, without a warning.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": model_type}))
        again = load_tokenizer(folder, flag=flag)
    if tokenizer_fingerprint(again) != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"{flag}: transformers loads any tokenizer in the folder of a {model_type!r} model as "
            f"{type(again).__name__}, which would give other ids than this one; take the model's own tokenizer"
        )


def largest_id(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """(token, id) of the largest id, added tokens included. Not `len(tokenizer)`: ids may have gaps."""
    return max(tokenizer.get_vocab().items(), key=lambda item: item[1])


def wants_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts BOS before a text by default."""
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] != bare[:1]


def start_id(tokenizer: PreTrainedTokenizerBase, start: str = AUTO) -> int | None:
    """The id of what stands before every document: for auto BOS, where the tokenizer puts it before a text; nothing for
    none; else the token `start`. Raises `UserError` where the tokenizer does not have it."""
    if start == NOTHING:
        return None
    if start == AUTO:
        return tokenizer.bos_token_id if wants_bos(tokenizer) else None
    if (found := tokenizer.get_vocab().get(start)) is None:
        special = ", ".join(map(repr, tokenizer.all_special_tokens)) or "none"
        raise UserError(f"--document_start {start!r} is no token of the tokenizer, whose special tokens are {special}")
    return int(found)


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the end-of-text token. Raises `UserError` where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path or ''} has no end-of-text token to put between documents: "
            'set "eos_token" in its tokenizer_config.json (for a .model file: train it with an eos_id), '
            "or give another --tokenizer_name"
        )
    return int(tokenizer.eos_token_id)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides the ids. It is the same in every process and after saving and loading."""
    facts: dict[str, Any] = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    facts["split_special_tokens"] = tokenizer.split_special_tokens
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        facts["backend"] = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
    else:
        facts["class"] = type(tokenizer).__name__
        facts["vocabulary"] = tokenizer.get_vocab()
        facts["settings"] = {key: str(value) for key, value in tokenizer.init_kwargs.items() if "file" not in key}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
