"""The index of a corpus of token files, in place of a copy: where the selected documents
start in the files.

    <cache_dir>/<key>/documents.bin    as of a token cache
    <cache_dir>/<key>/starts.bin       int64 (documents,): where each starts in the files, one after another
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mora_ds.common.files import JsonObject, sha256_file
from mora_ds.data.corpus import Corpus
from mora_ds.data.held_out import HASHED_CHARACTERS, DocumentFilter
from mora_ds.data.readers import batched
from mora_ds.data.token_files import TokenFile
from mora_ds.data.tokenizer import Encoder
from mora_ds.data.workers import ordered_map

DOCUMENTS = "documents.bin"
STARTS = "starts.bin"

_HASHED_TOKENS = 4 * HASHED_CHARACTERS
"""A character has at most four tokens."""


@dataclass(frozen=True)
class TokensInPlace:
    """The tokens of documents in memory-mapped files, as one array of N tokens."""

    files: list[np.ndarray]
    starts: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, window: slice) -> np.ndarray:
        positions = np.arange(*window.indices(len(self)))
        document = np.searchsorted(self.ends, positions, side="right")
        begins = np.where(document > 0, self.ends[document - 1], 0)
        offsets = self.starts[document] + positions - begins
        file_ends = np.cumsum([len(file) for file in self.files])
        file_of = np.searchsorted(file_ends, offsets, side="right")
        return np.concatenate(
            [
                # A negative place is counted from the end of the file
                self.files[number][offsets[file_of == number] - file_ends[number]]
                for number in np.unique(file_of)
            ]
        )


def write_index(
    corpus: Corpus, encoder: Encoder, folder: Path, num_proc: int
) -> JsonObject:
    """Check all tokens of a corpus of token files, and write its index to `folder`.
    Returns the counts, dtypes and hashes for meta.json."""
    first = 0
    n_tokens = 0
    n_documents = 0
    dtypes = []
    with (
        (folder / DOCUMENTS).open("wb") as ends_file,
        (folder / STARTS).open("wb") as starts_file,
    ):
        for file in corpus.members:
            assert isinstance(file, TokenFile)
            tokens, starts, ends = file.documents(encoder)
            if corpus.keep is not None:
                texts = _without_ends(tokens, starts, ends, encoder)
                takes = partial(_takes, encoder.tokenizer, corpus.keep)
                batches = ordered_map(
                    takes, batched(texts, len), num_proc, lambda _: corpus
                )
                is_kept = np.fromiter(chain.from_iterable(batches), bool)
                starts = starts[is_kept]
                ends = ends[is_kept]
            stream_ends = n_tokens + np.cumsum(ends - starts)
            ends_file.write(stream_ends.data)
            starts_file.write((first + starts).data)
            first += len(tokens)
            n_tokens = int(stream_ends.max(initial=n_tokens))
            n_documents += len(ends)
            dtypes.append(tokens.dtype.str)
    return {
        "tokens": n_tokens,
        "documents": n_documents,
        "dtypes": dtypes,
        "sha256": {name: sha256_file(folder / name) for name in (DOCUMENTS, STARTS)},
    }


def _without_ends(
    tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray, encoder: Encoder
) -> Iterator[list[int]]:
    """The first tokens of every document, without start token and end-of-text."""
    skipped = 0 if encoder.start_id is None else 1
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        first = start + skipped
        yield tokens[first : min(end - 1, first + _HASHED_TOKENS)].tolist()


def _takes(
    tokenizer: Any, keep: DocumentFilter, documents: list[list[int]]
) -> list[bool]:
    """Whether documents are selected: their text decides, as in other files."""
    return [keep.takes(tokenizer.decode(tokens)) for tokens in documents]
