"""Finds equal documents by a hash of the normalised text, and similar ones by MinHash signatures.

    text -> CanonicalHash: NFC, lower case, runs of white space as one space -> SHA-256      duplicate or not
                                                                             -> held out or not
    text -> words -> runs of 5 words -> MinHash (NUM_PERM,) -> LSH                           near duplicate or not

Signatures and their index are those of `datasketch` (extra `[corpus]`). A document may come in chunks everywhere, so
it may be longer than memory.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np

from mora_ds.common.errors import UserError

NUM_PERM = 128
"""Numbers in a signature. The similarity estimated from them has a standard deviation of at most 0.045."""

SHINGLE_WORDS = 5
"""Words in a run (shingle)."""

_RUNS_AT_ONCE = 4096
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
"""A word. In scripts without spaces between words each character counts as one."""

_SPACE = re.compile(r"\s+")


class CanonicalHash:
    """The hash of a text, whatever its spacing, its case and the chunks that it comes in.

    (A letter and its accent must be in one chunk: readers cut at line ends where there are any.)
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._space_pending = False
        self._begun = False

    def add(self, chunk: str) -> None:
        """The text's next chunk."""
        text = _SPACE.sub(" ", unicodedata.normalize("NFC", chunk).lower())
        bare = text.strip(" ")
        if not bare:
            self._space_pending = self._space_pending or bool(text)
            return
        if self._begun and (self._space_pending or text.startswith(" ")):
            self._hash.update(b" ")
        self._hash.update(bare.encode())
        self._begun, self._space_pending = True, text.endswith(" ")

    def digest(self) -> bytes:
        """SHA-256 of the chunks so far, 32 bytes."""
        return self._hash.digest()


def canonical_digest(text: str) -> bytes:
    """The SHA-256 of the normalised text."""
    canonical = CanonicalHash()
    canonical.add(text)
    return canonical.digest()


def is_held_out(document: str | bytes, percent: float) -> bool:
    """Whether a document (its text, or its digest) belongs to the held-out split.

    The answer depends on the text alone, so the same document is on the same side in every corpus. A larger `percent`
    holds out more documents and still those of any smaller one.
    """
    digest = canonical_digest(document) if isinstance(document, str) else document
    return int.from_bytes(digest[:8], "big") < percent / 100 * 2**64


# -- near duplicates -----------------------------------------------------------------------------------------------


def signature(text: str) -> np.ndarray:
    """(NUM_PERM,) MinHash of a text's runs of words; a text shorter than a run is one run itself.

    The signature of a document in chunks is the elementwise minimum of theirs (runs across a cut are not counted).
    """
    words = _WORD.findall(unicodedata.normalize("NFC", text).lower())
    last = max(len(words) - SHINGLE_WORDS + 1, 1)
    runs = (" ".join(words[i : i + SHINGLE_WORDS]).encode() for i in range(last))
    minhash = _empty_minhash().copy()
    while batch := list(islice(runs, _RUNS_AT_ONCE)):
        minhash.update_batch(batch)
    return minhash.hashvalues


class NearDuplicates:
    """The signatures of the documents so far, to ask whether a similar one was among them.

    Memory: a document's signature and its entry in each band of the index, about 5 KB a document in all.
    """

    def __init__(self, threshold: float) -> None:
        """`threshold`: estimated Jaccard similarity of two documents' runs of words, above 0 and at most 1, from which
        on they count as near duplicates. Raises `UserError` where `datasketch` is missing."""
        if not 0 < threshold <= 1:
            raise UserError(f"--near_duplicates must be above 0 and at most 1 (or 0 to leave it out), got {threshold}")
        library = _datasketch()
        # These weights prefer a candidate too many, which is then compared, to one too few.
        self._index: Any = library.MinHashLSH(threshold=min(threshold, 0.99), num_perm=NUM_PERM, weights=(0.2, 0.8))
        self._threshold = threshold
        self._signatures: list[np.ndarray] = []

    def seen(self, values: np.ndarray) -> bool:
        """Whether an earlier document is similar to the one with this signature; if none is, this one is added."""
        minhash = _empty_minhash().copy()
        minhash.hashvalues = values
        for number in self._index.query(minhash):
            if np.count_nonzero(self._signatures[number] == values) >= self._threshold * NUM_PERM:
                return True
        self._index.insert(len(self._signatures), minhash, check_duplication=False)
        self._signatures.append(values)
        return False


@lru_cache(maxsize=1)
def _empty_minhash() -> Any:
    """A signature to be copied: drawing its permutations takes longer than most documents."""
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
