"""A folder that `prepare_corpus` has written: tokens that are mapped as they lie, in place of files to tokenise.

prepared/prepared.json         settings, report, and the key of each split
prepared/train/<key>/          a token cache (see `cache`)
prepared/held_out/<key>/       another: no document of it is in the first
prepared/held_out.jsonl        its text
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mora_ds.data.readers import Document, Mark
from mora_ds.errors import UserError
from mora_ds.files import malformed, read_json, require_format

PREPARED_JSON = "prepared.json"
TRAIN, HELD_OUT = "train", "held_out"


@dataclass(frozen=True)
class PreparedPart:
    """One split, as a part of a corpus; it is that corpus' only one."""

    cache: Path
    """Folder of the token cache."""

    @property
    def label(self) -> str:
        return str(self.cache.parent)

    def documents(self) -> Iterator[Document]:
        raise UserError(f"{self.label} holds tokens, not text; name the text files themselves where text is needed")

    def marked(self, mark: Mark) -> Iterator[tuple[Document, Mark]]:
        raise UserError(f"{self.label} is prepared: it is mapped as it lies, leave --streaming out")

    def content_hash(self) -> str:
        return self.cache.name

    def stamp(self) -> dict[str, Any]:
        return {"prepared": self.cache.name}

    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.cache.iterdir())


def is_prepared(folder: Path) -> bool:
    """Whether this is a prepared folder, or that of one of its splits."""
    split = folder.name in (TRAIN, HELD_OUT) and (folder.parent / PREPARED_JSON).is_file()
    return split or (folder / PREPARED_JSON).is_file()


def open_prepared(folder: Path) -> PreparedPart:
    """The training split of a prepared folder, or the split whose own folder this is.

    Raises `UserError` for one that is damaged, or has nothing in that split.
    """
    place, split = (folder, TRAIN) if (folder / PREPARED_JSON).is_file() else (folder.parent, folder.name)
    content = read_json(place / PREPARED_JSON)
    require_format(place / PREPARED_JSON, content)
    with malformed(place / PREPARED_JSON):
        key = content["splits"][split]
    if key is None:
        raise UserError(f"{place} has no document in its split {split!r}")
    return PreparedPart(place / split / str(key))
