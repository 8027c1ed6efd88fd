"""Which documents say the same: exactly, by a hash of the normalised text, or nearly, by MinHash signatures.

    text -> Canonical: NFC, lower case, runs of white space as one space -> SHA-256      the same text, or not
                                                                         -> held out, or not
    text -> words -> runs of 5 words -> MinHash (NUM_PERM,) uint32 -> LSH      nearly the same, or not

Signatures and their index are those of `datasketch` (extra `[corpus]`). Everything here takes a document in pieces, so
one longer than memory is like any other.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np

from mora_ds.errors import UserError

NUM_PERM = 128
"""Numbers of a signature. The similarity estimated from them has a standard deviation of at most 0.045."""

SHINGLE_WORDS = 5
_AT_ONCE = 4096
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
"""Where words are written without spaces each character counts as one."""

_SPACE = re.compile(r"\s+")


class Canonical:
    """The hash of a text that is the same however it is cut into pieces, spaced, or written in capitals.

    (A letter and its accent must come in one piece: readers cut at line ends where there are any.)
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._gap = False
        self._begun = False

    def add(self, piece: str) -> None:
        text = _SPACE.sub(" ", unicodedata.normalize("NFC", piece).lower())
        bare = text.strip(" ")
        if not bare:
            self._gap = self._gap or bool(text)
            return
        if self._begun and (self._gap or text.startswith(" ")):
            self._hash.update(b" ")
        self._hash.update(bare.encode())
        self._begun, self._gap = True, text.endswith(" ")

    def digest(self) -> bytes:
        """(32,) bytes."""
        return self._hash.digest()


def canonical_digest(text: str) -> bytes:
    """The SHA-256 of the normalised text."""
    canonical = Canonical()
    canonical.add(text)
    return canonical.digest()


def is_held_out(document: str | bytes, percent: float) -> bool:
    """Whether a document (its text, or its digest) belongs to the held-out split: a pure function of the text, so the
    same document is on the same side in every corpus, at any time. A larger `percent` holds out more, never others."""
    digest = canonical_digest(document) if isinstance(document, str) else document
    return int.from_bytes(digest[:8], "big") < percent / 100 * 2**64


# -- nearly the same ---------------------------------------------------------------------------------------------------


def signature(text: str) -> np.ndarray:
    """(NUM_PERM,): the MinHash of a text's runs of words; a text shorter than a run is one run itself.

    Of a document in pieces it is the elementwise minimum of theirs (runs across a cut are not counted).
    """
    words = _WORD.findall(unicodedata.normalize("NFC", text).lower())
    last = max(len(words) - SHINGLE_WORDS + 1, 1)
    runs = (" ".join(words[i : i + SHINGLE_WORDS]).encode() for i in range(last))
    minhash = _empty_minhash().copy()
    while batch := list(islice(runs, _AT_ONCE)):
        minhash.update_batch(batch)
    return minhash.hashvalues


class NearDuplicates:
    """Documents so far, by their signatures: has one like this been seen?

    Memory: a document's signature (512 bytes) and its place in each band of the index, about 5 KB a document in all.
    """

    def __init__(self, threshold: float) -> None:
        """`threshold`: Jaccard similarity of two documents' runs of words, estimated, from which on they are nearly
        the same; above 0, at most 1. Raises `UserError` where `datasketch` is missing."""
        if not 0 < threshold <= 1:
            raise UserError(f"--near_duplicates must be above 0 and at most 1 (or 0 to leave it out), got {threshold}")
        library = _datasketch()
        # weights: rather one candidate too many, which is then compared, than one too few
        self._index: Any = library.MinHashLSH(threshold=min(threshold, 0.99), num_perm=NUM_PERM, weights=(0.2, 0.8))
        self._threshold = threshold
        self._kept: list[np.ndarray] = []

    def seen(self, values: np.ndarray) -> bool:
        """Whether a document that was added is nearly this one; where none is, this one is added."""
        minhash = _empty_minhash().copy()
        minhash.hashvalues = values
        for number in self._index.query(minhash):
            if np.count_nonzero(self._kept[number] == values) >= self._threshold * NUM_PERM:
                return True
        self._index.insert(len(self._kept), minhash, check_duplication=False)
        self._kept.append(values)
        return False


@lru_cache(maxsize=1)
def _empty_minhash() -> Any:
    """To be copied: drawing its permutations takes longer than most documents."""
    return _datasketch().MinHash(num_perm=NUM_PERM, seed=1)


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError as error:
        raise UserError(
            "near-duplicate removal needs the package datasketch: pip install -e '.[corpus]', "
            f"or leave it out with --near_duplicates 0 ({error})"
        ) from error
    return datasketch
