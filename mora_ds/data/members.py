"""The members of a corpus: one file, one `datasets` dataset, or one streamed dataset.

Each has

    label                    the name for messages
    documents_after(mark)    iterates over the documents after a position, each with the position after it
    content_hash()           a hash of the contents, independent of the path
    stat_signature()         size and time of a file, or a fingerprint: the hash is recomputed only if this changes
    size_bytes()             on disk (compressed size of a compressed file); 0 if unknown
"""

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mora_ds.common.errors import UserError
from mora_ds.common.files import JsonObject, sha256_file
from mora_ds.data.readers import (
    ROWS_PER_BATCH,
    Mark,
    MarkedDocuments,
    file_kind,
    in_chunks,
    is_compressed,
    read_file,
    read_rows,
    text_field,
)


@dataclass(frozen=True)
class FileMember:
    """A file of text, JSON lines or Parquet."""

    path: Path
    text_column: str

    @property
    def label(self) -> str:
        return str(self.path)

    def documents_after(self, mark: Mark) -> MarkedDocuments:
        return read_file(self.path, self.text_column, mark)

    def content_hash(self) -> str:
        kind = f"{file_kind(self.path)} {is_compressed(self.path)}"
        content = f"{kind} {self.sha256()}"
        return hashlib.sha256(content.encode()).hexdigest()

    def sha256(self) -> str:
        return sha256_file(self.path)

    def stat_signature(self) -> JsonObject:
        status = self.path.stat()
        return {
            "path": str(self.path.resolve()),
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
        }

    def size_bytes(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True)
class DatasetMember:
    """A map-style `datasets.Dataset`, read from disk batch by batch."""

    label: str
    dataset: Any
    text_column: str

    def documents_after(self, mark: Mark) -> MarkedDocuments:
        rows = self.dataset.select_columns([self.text_column])
        if mark.record == len(rows) > 0:  # `select` raises for this start
            return iter(())
        tables = rows.with_format("arrow").select(range(mark.record, len(rows)))
        columns = (table.column(0) for table in tables.iter(batch_size=ROWS_PER_BATCH))
        return read_rows(self.label, columns, mark.record)

    def content_hash(self) -> str:
        return hashlib.sha256(self.dataset._fingerprint.encode()).hexdigest()

    def stat_signature(self) -> JsonObject:
        return {"dataset": self.label, "fingerprint": self.dataset._fingerprint}

    def size_bytes(self) -> int:
        return int(self.dataset.data.nbytes)


@dataclass(frozen=True)
class StreamedDatasetMember:
    """A `datasets.IterableDataset`. A mark holds its state, available after any row."""

    label: str
    dataset: Any
    text_column: str

    def documents_after(self, mark: Mark) -> MarkedDocuments:
        # Copy, because two readers of one dataset would share its state.
        rows = copy.deepcopy(self.dataset)
        rows.load_state_dict(mark.state)
        number = mark.record
        for row in rows:
            number += 1
            text = text_field(row, self.text_column, f"{self.label}, row {number}")
            after = Mark(number, 0, rows.state_dict())
            yield from in_chunks(text, mark, after)
            mark = after
        if number == 0:
            raise UserError(f"{self.label} is empty: it has no rows")

    def content_hash(self) -> str:
        raise AssertionError("the contents of a streamed dataset are unknown")

    def stat_signature(self) -> JsonObject:
        return {"dataset": self.label}

    def size_bytes(self) -> int:
        return 0


Member = FileMember | DatasetMember | StreamedDatasetMember
"""One file or dataset of a corpus."""
