"""Splits documents into training and held-out ones.

    --held_out_share 0.01           documents with a hash in the lowest 1% are only evaluated on

The hash of a document decides, so the split of a document is the same in every source,
file, run and process.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mora_ds.common.files import JsonObject
from mora_ds.data.readers import Document

HASHED_CHARACTERS = 1 << 16
"""Only this many first characters of a document are hashed. No first chunk of a longer
document has fewer."""


def document_hash(text: str) -> int:
    """A 64-bit hash of the document that starts with `text`, independent of case and
    white space."""
    words = unicodedata.normalize("NFC", text[:HASHED_CHARACTERS]).lower().split()
    digest = hashlib.sha256(" ".join(words).encode()).digest()
    return int.from_bytes(digest[:8], "big")


@dataclass(frozen=True)
class DocumentFilter:
    """Selects either the training documents or the held-out ones."""

    held_out_share: float
    takes_held_out: bool = False
    """Whether to select the held-out documents."""

    def __call__(self, documents: Iterable[Document]) -> Iterator[Document]:
        passes = True
        for document in documents:
            if document.begins:  # the first chunk decides for the document
                passes = self.takes(document.text)
            if passes:
                yield document

    def takes(self, text: str) -> bool:
        """Whether the document that starts with `text` is selected."""
        is_held_out = document_hash(text) < self.held_out_share * 2.0**64
        return is_held_out == self.takes_held_out

    def __str__(self) -> str:
        return f"--held_out_share {self.held_out_share}"

    @property
    def identity(self) -> JsonObject:
        """The settings that determine the selection; part of a token cache's key."""
        return {"share": self.held_out_share, "held_out": self.takes_held_out}
