"""Token files of other tools, as members of a corpus. They are read in place.

    NAME.bin + NAME.idx          Megatron: an index of sequences and documents
    NAME.ds + NAME.ds.index      datatrove: where documents end
    NAME.npy                     OLMo: ids alone, without a header

Their tokens must be those that a token cache would have: ids of the run's tokenizer, the
start token (if any) before every document, end-of-text after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mora_ds.common.errors import UserError
from mora_ds.common.files import JsonObject, malformed
from mora_ds.data.members import FileMember
from mora_ds.data.readers import Mark, MarkedDocuments
from mora_ds.data.tokenizer import Encoder, largest_id

_INDICES = {".bin": ".idx", ".ds": ".ds.index", ".npy": None}

CHUNK = 1 << 22
"""Tokens that are checked at once."""
_INDEX_BYTES = 10
"""Bytes of an index for a byte of tokens, at most: 20 for a document of one token of 16
bits."""


@dataclass(frozen=True)
class TokenFile(FileMember):
    """A file of tokens, and its index if it has one."""

    @property
    def index(self) -> FileMember | None:
        """The file that says where documents end."""
        suffix = _INDICES[self.path.suffix.lower()]
        if suffix is None:
            return None
        return FileMember(self.path.with_suffix(suffix), self.text_column)

    def documents_after(self, mark: Mark) -> MarkedDocuments:
        raise UserError(
            f"{self.path} holds tokens: it is no text for --streaming, nor to train or extend a tokenizer"
        )

    def content_hash(self) -> str:
        of_index = "" if self.index is None else self.index.content_hash()
        return super().content_hash() + of_index

    def stat_signature(self) -> JsonObject:
        of_index = None if self.index is None else self.index.stat_signature()
        return {**super().stat_signature(), "index": of_index}

    def tokens(self, dtype: str) -> np.ndarray:
        """(N,) tokens, memory-mapped."""
        return np.memmap(self.path, dtype, mode="r")

    def documents(self, encoder: Encoder) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, starts, ends): the memory-mapped tokens, and where each document
        that is not empty starts and ends, int64. Reads every token. Raises `UserError`
        for what does not fit the tokenizer or the index."""
        with malformed(self.path):
            dtype, ends = _bounds(self, encoder)
            tokens = self.tokens(dtype)
            with_eos = _checked(tokens, encoder)
            ends = with_eos if ends is None else ends
            starts = np.append(0, ends[:-1])
            if (ends < starts).any() or ends.max(initial=0) != len(tokens):
                raise UserError(
                    f"the documents do not end with the last of {len(tokens):,} tokens: the file is truncated, or the "
                    "index is wrong"
                )
            starts = starts[ends > starts]
            ends = np.append(starts[1:], len(tokens))
            _require(tokens, ends - 1, encoder.eos_id, "end")
            if encoder.start_id is not None:
                verb = "begin, without --document_start none,"
                _require(tokens, starts, encoder.start_id, verb)
            return tokens, starts, ends


def _bounds(file: TokenFile, encoder: Encoder) -> tuple[str, np.ndarray | None]:
    """(dtype of the tokens, where documents end in them; None without an index)."""
    if file.index is None:
        # A file of fewer bytes gives none
        if np.lib.format.MAGIC_PREFIX in np.fromfile(file.path, "S6", 1):
            raise UserError("numpy.save wrote it; write ids alone (numpy's tofile)")
        return encoder.dtype, None
    path = file.index.path
    if path.stat().st_size > 64 + _INDEX_BYTES * file.size_bytes():
        raise UserError(f"{path} is larger than the index of so few tokens can be")
    if path.suffix == ".idx":
        return _megatron_bounds(path)
    ends = np.fromfile(path, "<i8")
    width = file.size_bytes() / ends[-1]
    if width not in (2, 4):
        raise UserError(f"{width:g} bytes for each of the tokens in {path}, not 2 or 4")
    return f"<u{width:.0f}", ends


_HEADER = np.dtype("S9, <u8, u1, <u8, <u8")
"""Magic, version, dtype code, sequences, borders of documents (one more than those)."""
_DTYPES = {4: "<u4", 8: "<u2"}
"""Code -> dtype of ids: int32, whose negative numbers are no ids, and uint16."""


def _megatron_bounds(path: Path) -> tuple[str, np.ndarray]:
    """As written by megatron/core/datasets/indexed_dataset.py: after the header int32
    lengths of all sequences, their byte offsets, which follow from the lengths, and
    int64 borders of documents."""
    content = np.fromfile(path, np.uint8)
    header = content[: _HEADER.itemsize].view(_HEADER)
    magic, version, code, sequences, borders = header[0].tolist()
    if magic != b"MMIDIDX" or version != 1 or code not in _DTYPES:
        raise UserError(
            f"{path} is read if it is of version 1 and dtype code 4 (int32) or 8 (uint16), not {version} and {code}"
        )
    sizes = (_HEADER.itemsize, 4 * sequences, 8 * sequences, 8 * borders)
    _, lengths, _, documents, _ = np.split(content, np.cumsum(sizes))
    starts = np.append(0, np.cumsum(lengths.view("<i4"), dtype=np.int64))
    return _DTYPES[code], starts[documents.view("<i8")[1:]]


def _checked(tokens: np.ndarray, encoder: Encoder) -> np.ndarray:
    """The places after every end-of-text token. Raises `UserError` for an id that the
    tokenizer does not have."""
    largest = largest_id(encoder.tokenizer)[1]
    # Of ids that have 32 bits, read as such of 16 bits
    is_wide = len(tokens) > 3 and not tokens[1:CHUNK:2].any()
    ends = []
    for start in range(0, len(tokens), CHUNK):
        chunk = tokens[start : start + CHUNK]
        ends.append(start + np.flatnonzero(chunk == encoder.eos_id) + 1)
        if chunk.max() > largest or is_wide:
            raise UserError(
                f"ids up to {chunk.max()} in {tokens.dtype}, the tokenizer has 0 to {largest} in {encoder.dtype}: "
                "written with another tokenizer, or not a file of this format"
            )
    return np.concatenate(ends)


def _require(
    tokens: np.ndarray, positions: np.ndarray, token_id: int, verb: str
) -> None:
    wrong = positions[tokens[positions] != token_id]
    if len(wrong):
        raise UserError(
            f"documents must {verb} with token {token_id} of this tokenizer, not {tokens[wrong[0]]} as at {wrong[0]:,}"
        )
