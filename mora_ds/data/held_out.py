"""Which documents are trained on, decided by a hash of each, so that the same document is on the same side in every
source, file, run and process.

    --held_out_share 0.01           documents whose hash is below 1% of all hashes are evaluated on, never trained on
    --exclude_eval_documents        documents of --eval_files are not trained on
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mora_ds.data.readers import Document

HASHED_CHARACTERS = 1 << 16
"""How many of a document's first characters are hashed; the first chunk of a long document has at least these."""


def document_hash(text: str) -> int:
    """Return a 64-bit hash of the document that begins with `text`, white space and case ignored."""
    words = unicodedata.normalize("NFC", text[:HASHED_CHARACTERS]).lower().split()
    digest = hashlib.sha256(" ".join(words).encode()).digest()
    return int.from_bytes(digest[:8], "big")


@dataclass(frozen=True)
class DocumentFilter:
    """Passes the documents of one side, held out or trained on. Pickled to worker processes."""

    held_out_share: float = 0.0
    takes_held_out: bool = False
    """Whether the held-out documents pass instead of those to train on."""
    excluded: frozenset[int] = frozenset()
    """Hashes of further documents that must not be trained on."""

    def keeps(self, text: str) -> bool:
        """Whether the document that begins with `text` passes."""
        value = document_hash(text)
        held_out = value < self.held_out_share * 2.0**64
        return held_out if self.takes_held_out else not (held_out or value in self.excluded)

    def __call__(self, documents: Iterable[Document]) -> Iterator[Document]:
        keeps = True
        for document in documents:
            if document.begins:
                keeps = self.keeps(document.text)
            if keeps:
                yield document

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which documents pass; part of a token cache's key."""
        excluded = hashlib.sha256(",".join(map(str, sorted(self.excluded))).encode()).hexdigest()
        return {"share": self.held_out_share, "held_out": self.takes_held_out, "excluded": excluded}


def hashes_of(documents: Iterable[Document]) -> frozenset[int]:
    """The hash of every document that is not empty."""
    return frozenset(document_hash(document.text) for document in documents if document.begins and document.text)
