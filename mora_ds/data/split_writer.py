"""The two splits of a prepared folder, while they are written: tokens and ends of each, and the held-out text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from mora_ds.data.cache import DOCUMENTS, META, TOKENS, key_of
from mora_ds.data.prepared import HELD_OUT, TRAIN
from mora_ds.files import sha256_file

_COPIED_AT_ONCE = 1 << 24
_OPEN, _CLOSE = b'{"text": "', b'"}\n'


class Split:
    """tokens.bin and documents.bin of one split, while they are written."""

    def __init__(self, folder: Path, dtype: str) -> None:
        folder.mkdir()
        self.folder = folder
        self.itemsize = np.dtype(dtype).itemsize
        self.stream: IO[bytes] = (folder / TOKENS).open("w+b")
        self.ends: IO[bytes] = (folder / DOCUMENTS).open("wb")
        self.tokens = self.documents = 0

    def add(self, data: bytes | memoryview) -> None:
        self.stream.write(data)
        self.tokens += len(data) // self.itemsize

    def end_document(self) -> None:
        self.ends.write(np.array([self.tokens], "<i8").tobytes())
        self.documents += 1

    def cut(self, tokens: int) -> None:
        """Back to so many tokens."""
        self.stream.seek(tokens * self.itemsize)
        self.stream.truncate()
        self.tokens = tokens

    def move_from(self, other: Split, start: int) -> None:
        """What `other` has from token `start` on."""
        other.stream.seek(start * self.itemsize)
        while data := other.stream.read(_COPIED_AT_ONCE):
            self.add(data)
        other.cut(start)


class SplitWriter:
    """Both splits and the held-out text."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder = folder
        self.dtype = dtype
        self.splits = {name: Split(folder / name, dtype) for name in (TRAIN, HELD_OUT)}
        self._text: IO[bytes] = (folder / f"{HELD_OUT}.jsonl").open("w+b")
        self._start = self._text_start = 0

    def whole(self, tokens: np.ndarray, text: str, split: str) -> None:
        """A document at once. `text` is only needed of a held-out one."""
        self.splits[split].add(tokens.data.cast("B"))
        self.splits[split].end_document()
        if split == HELD_OUT:
            self._text.write(_OPEN + _escaped(text) + _CLOSE)

    def begin(self) -> None:
        """A document in pieces: written to both sides until its end tells where it belongs."""
        self._start, self._text_start = self.splits[TRAIN].tokens, self._text.tell()
        self._text.write(_OPEN)

    def piece(self, tokens: np.ndarray, text: str) -> None:
        self.splits[TRAIN].add(tokens.data.cast("B"))
        self._text.write(_escaped(text))

    def end(self, split: str | None) -> None:
        """The document in pieces goes into a split, or nowhere."""
        if split == HELD_OUT:
            self._text.write(_CLOSE)
            self.splits[HELD_OUT].move_from(self.splits[TRAIN], self._start)
        else:
            self._text.seek(self._text_start)
            self._text.truncate()
        if split is None:
            self.splits[TRAIN].cut(self._start)
        else:
            self.splits[split].end_document()

    def finish(self, name: str, settings: dict[str, Any], filters: dict[str, Any]) -> str | None:
        """Seals a split as a token cache; returns its key, None for an empty one."""
        split = self.splits[name]
        self._close(split)
        if not split.documents:
            return None
        digests = {each: sha256_file(split.folder / each) for each in (TOKENS, DOCUMENTS)}
        contents = [hashlib.sha256(json.dumps([filters, digests], sort_keys=True).encode()).hexdigest()]
        counts = {"tokens": split.tokens, "documents": split.documents, "sha256": digests}
        key = key_of(settings, contents)
        meta = {**settings, **counts, "key": key, "contents": contents}
        (split.folder / key).mkdir()
        for each in (TOKENS, DOCUMENTS):
            (split.folder / each).rename(split.folder / key / each)
        (split.folder / key / META).write_text(json.dumps(meta, indent=2) + "\n")
        return key

    @staticmethod
    def _close(split: Split) -> None:
        split.stream.close()
        split.ends.close()

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._text.close()
        for split in self.splits.values():
            self._close(split)


def _escaped(text: str) -> bytes:
    """As it stands between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1].encode()
