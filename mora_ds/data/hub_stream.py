"""A `datasets` name as a part of a streamed corpus: rows come, over the network or from a folder, as needed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mora_ds.data.corpus import Corpus
from mora_ds.data.readers import START, Document, Mark, text_field
from mora_ds.errors import UserError


@dataclass(frozen=True)
class IterablePart:
    """A `datasets.IterableDataset`; its own state, after any row, is the mark behind it."""

    label: str
    dataset: Any
    text_column: str

    def documents(self) -> Iterator[Document]:
        return (document for document, _ in self.marked(START))

    def marked(self, mark: Mark) -> Iterator[tuple[Document, Mark]]:
        rows = copy.deepcopy(self.dataset)  # two readers of one dataset would share its state
        rows.load_state_dict(mark.state)
        number = mark.record
        for row in rows:
            number += 1
            where = f"{self.label}, row {number}"
            yield Document(text_field(row, self.text_column, where), where), Mark(number, 0, rows.state_dict())
        if number == 0:
            raise UserError(f"{self.label} is empty: it holds no row")

    def content_hash(self) -> str:
        raise AssertionError("a stream is not hashed")

    def stamp(self) -> dict[str, Any]:
        return {"dataset": self.label}

    def size_bytes(self) -> int:
        return 0


def stream_dataset(name: str, text_column: str, flag: str, split: str = "train") -> Corpus:
    """The rows of a `datasets` name. Raises `UserError`, which names `flag`, where there is none, or no text in it."""
    import datasets  # here, not above: it is slow to import and most runs read files

    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{flag}: {name!r} (split {split!r}) cannot be streamed: {error}") from error
    part = IterablePart(name, rows, text_column)
    corpus = Corpus((part,), text_column, flag)
    next(corpus.documents_of(part))
    return corpus
