"""Writes the two splits of a prepared folder: the tokens and document ends of each, and the held-out text."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from mora_ds.common.files import sha256_file
from mora_ds.data.cache import DOCUMENTS, META, TOKENS, key_of
from mora_ds.data.prepared import HELD_OUT, TRAIN

_IN_MEMORY = 1 << 24
"""Bytes of an unfinished document that are kept in memory; more of it is on disk."""


class Split:
    """The files tokens.bin and documents.bin of one split."""

    def __init__(self, folder: Path, dtype: str, files: ExitStack) -> None:
        folder.mkdir()
        self.folder = folder
        self._itemsize = np.dtype(dtype).itemsize
        self.stream: IO[bytes] = files.enter_context((folder / TOKENS).open("wb"))
        self._ends: IO[bytes] = files.enter_context((folder / DOCUMENTS).open("wb"))
        self.documents = 0

    @property
    def tokens(self) -> int:
        return self.stream.tell() // self._itemsize

    def end_document(self) -> None:
        """Records that a document ends with the last token written."""
        self._ends.write(np.array([self.tokens], "<i8").tobytes())
        self.documents += 1


class SplitWriter(ExitStack):
    """Writes documents, which may come in chunks, into one of the splits. A context manager that closes its files."""

    def __init__(self, folder: Path, dtype: str) -> None:
        super().__init__()
        self.splits = {name: Split(folder / name, dtype, self) for name in (TRAIN, HELD_OUT)}
        self._text = self.enter_context((folder / f"{HELD_OUT}.jsonl").open("wb"))
        self._pending_tokens, self._pending_text = (
            self.enter_context(tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=str(folder)))  # noqa: SIM115
            for _ in range(2)
        )

    def add(self, tokens: np.ndarray, text: str) -> None:
        """The next chunk of the present document. `text` is only needed where the document may be held out."""
        self._pending_tokens.write(tokens.data.cast("B"))
        self._pending_text.write(json.dumps(text, ensure_ascii=False)[1:-1].encode())

    def end_document(self, name: str | None) -> None:
        """Writes the document into the split of that name, or drops it for None."""
        if name is not None:
            self._pending_tokens.seek(0)
            shutil.copyfileobj(self._pending_tokens, self.splits[name].stream)
            self.splits[name].end_document()
        if name == HELD_OUT:
            self._pending_text.seek(0)
            self._text.write(b'{"text": "')
            shutil.copyfileobj(self._pending_text, self._text)
            self._text.write(b'"}\n')
        for file in (self._pending_tokens, self._pending_text):
            file.seek(0)
            file.truncate()

    def seal(self, settings: dict[str, Any], filters: dict[str, Any]) -> dict[str, str | None]:
        """Closes all files and makes each split a token cache; returns the splits' keys, None for an empty one."""
        counts = {name: {"tokens": split.tokens, "documents": split.documents} for name, split in self.splits.items()}
        self.close()
        return {name: _seal(self.splits[name].folder, counts[name], settings, filters) for name in self.splits}


def _seal(folder: Path, counts: dict[str, int], settings: dict[str, Any], filters: dict[str, Any]) -> str | None:
    if not counts["documents"]:
        return None
    digests = {name: sha256_file(folder / name) for name in (TOKENS, DOCUMENTS)}
    contents = [hashlib.sha256(json.dumps([filters, digests], sort_keys=True).encode()).hexdigest()]
    key = key_of(settings, contents)
    (folder / key).mkdir()
    for name in digests:
        (folder / name).rename(folder / key / name)
    meta = {**settings, **counts, "sha256": digests, "key": key, "contents": contents}
    (folder / key / META).write_text(json.dumps(meta, indent=2) + "\n")
    return key
