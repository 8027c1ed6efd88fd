"""A folder that `prepare_corpus` has written: token caches that are memory-mapped instead of files to tokenise.

prepared/prepared.json         settings, report, and the key of each split
prepared/train/<key>/          a token cache (see `cache`)
prepared/held_out/<key>/       another, with documents that are not in the first
prepared/held_out.jsonl        the text of the held-out documents
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mora_ds.common.errors import UserError
from mora_ds.common.files import malformed, read_json, require_format
from mora_ds.data.parts import Part
from mora_ds.data.readers import Document, Mark

PREPARED_JSON = "prepared.json"
TRAIN, HELD_OUT = "train", "held_out"


@dataclass(frozen=True)
class PreparedPart(Part):
    """One split of a prepared folder. It is the only part of its corpus."""

    cache: Path
    """Folder of the token cache."""

    @property
    def label(self) -> str:  # type: ignore[override]
        return str(self.cache.parent)

    def documents(self) -> Iterator[Document]:
        raise UserError(f"{self.label} holds tokens, not text; name the text files themselves where text is needed")

    def marked(self, mark: Mark) -> Iterator[tuple[Document, Mark]]:
        raise UserError(f"{self.label} is prepared and is memory-mapped: leave --streaming out")

    def content_hash(self) -> str:
        return self.cache.name

    def stamp(self) -> dict[str, Any]:
        return {"prepared": self.cache.name}

    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.cache.glob("*"))  # of none where it is missing


def is_prepared(folder: Path) -> bool:
    """Whether this is a prepared folder, or the folder of one of its splits."""
    split = folder.name in (TRAIN, HELD_OUT) and (folder.parent / PREPARED_JSON).is_file()
    return split or (folder / PREPARED_JSON).is_file()


def open_prepared(folder: Path) -> PreparedPart:
    """The training split of a prepared folder, or the split in whose folder `folder` is.

    Raises `UserError` for a damaged folder, or an empty split.
    """
    root, split = (folder, TRAIN) if (folder / PREPARED_JSON).is_file() else (folder.parent, folder.name)
    content = read_json(root / PREPARED_JSON)
    require_format(root / PREPARED_JSON, content)
    with malformed(root / PREPARED_JSON):
        key = content["splits"][split]
    if key is None:
        raise UserError(f"{root} has no document in its split {split!r}")
    return PreparedPart(root / split / str(key))
