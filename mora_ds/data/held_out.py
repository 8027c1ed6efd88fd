"""Which documents are trained on, and which are held out.

    --held_out_share 0.01           documents whose hash is below 1% of all hashes are evaluated on, never trained on

A hash of each decides, so that the same document is on the same side in every source,
file, run and process.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mora_ds.common.files import JsonObject
from mora_ds.data.readers import Document

HASHED_CHARACTERS = 1 << 16
"""How many of a document's first characters are hashed: no first chunk has fewer."""


def document_hash(text: str) -> int:
    """A 64-bit hash of the document that begins with `text`, without case and white
    space."""
    words = unicodedata.normalize("NFC", text[:HASHED_CHARACTERS]).lower().split()
    digest = hashlib.sha256(" ".join(words).encode()).digest()
    return int.from_bytes(digest[:8], "big")


@dataclass(frozen=True)
class DocumentFilter:
    """Passes the documents of one side, held out or trained on."""

    held_out_share: float
    takes_held_out: bool = False
    """Whether the held-out documents pass instead of those to train on."""

    def __call__(self, documents: Iterable[Document]) -> Iterator[Document]:
        passes = True
        for document in documents:
            if document.begins:  # its hash decides for all of its chunks
                is_held_out = (
                    document_hash(document.text) < self.held_out_share * 2.0**64
                )
                passes = is_held_out == self.takes_held_out
            if passes:
                yield document

    def __str__(self) -> str:
        return f"--held_out_share {self.held_out_share}"

    @property
    def identity(self) -> JsonObject:
        """What decides which documents pass; part of a token cache's key."""
        return {"share": self.held_out_share, "held_out": self.takes_held_out}
