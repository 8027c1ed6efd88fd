"""Documents of a corpus too large to cache: read while training, shuffled in windows, entered again at any of them.

    parts of an epoch  ->  windows of `buffer` documents, each shuffled  ->  documents, each with its `Place`

A window's order is drawn from (seed, epoch, window), so a place in the stream is a few numbers: where its window begins
in the files, and how many of its documents are done. To go on from there one window is read again.
A document that comes in pieces is too long for a window: it is one of its own, and passed on piece by piece.
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from mora_ds.data.corpus import Corpus
from mora_ds.data.packing import epoch_order
from mora_ds.data.readers import START, Document, Mark
from mora_ds.errors import RunError, UserError

IN_ORDER_WINDOW = 1024
"""Documents of a window that is not shuffled: what is read again when a run goes on."""

WINDOW_CHARACTERS = 1 << 28
"""A window is full with so much text, however few documents that is."""

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0


@dataclass(frozen=True)
class Place:
    """Before which document (or piece) of the stream one stands."""

    epoch: int = 0
    window: int = 0
    part: int = 0
    """Where the window begins: the part in the epoch's order, and the mark in it."""
    mark: Mark = START
    done: int = 0
    """Documents and pieces of the window that come before."""

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "mark": vars(self.mark)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Place:
        return cls(**{**content, "mark": Mark(**content["mark"])})


@dataclass(frozen=True)
class StreamSettings:
    """How a stream is read."""

    buffer: int = 10_000
    """Documents shuffled together; 0 keeps the order of the files."""
    seed: int | str = 0
    retry_s: float = 120.0
    """How long a part that cannot be read is tried again."""


@dataclass
class _Tally:
    """Of documents, since an epoch was begun or entered again."""

    read: int = 0
    left_out: int = 0


def _silent(text: str) -> None:
    del text


class DocumentStream:
    """The documents of `corpus` from any place on, epoch by epoch."""

    def __init__(
        self,
        name: str,
        corpus: Corpus,
        settings: StreamSettings,
        warn: Callable[[str], None] = _silent,
        say: Callable[[str], None] = _silent,
    ) -> None:
        """`say`: where it tells how many documents it leaves out."""
        self.name, self.corpus, self.settings, self.warn, self.say = name, corpus, settings, warn, say

    def quiet(self) -> DocumentStream:
        """The same documents, read apart."""
        return DocumentStream(self.name, self.corpus, self.settings, self.warn)

    def epoch(self, place: Place) -> Iterator[tuple[Document, Place]]:
        """The documents from `place` to the end of its epoch, each with its own place. Empty ones are left out.

        Raises `UserError` for a record that is no document, `RunError` for a part that stays unreadable.
        """
        opening, done = replace(place, done=0), place.done
        tally = _Tally()
        read = _Read(self._documents(opening, tally), opening)
        windows = 0
        while (window := self._window(read)) is not None:
            windows += 1
            if windows & (windows - 1) == 0:  # after 1, 2, 4, ... windows: an epoch may be longer than any run
                self._tell(tally, "so far")
            begins = read.opening
            for number, document in enumerate(window):
                if number >= done:
                    yield document, replace(begins, done=number)
            done = 0
            read.next_window()
        self._tell(tally, f"of epoch {place.epoch + 1}")

    def _tell(self, tally: _Tally, which: str) -> None:
        if self.corpus.keep is not None:
            self.say(
                f"{self.name}: {tally.left_out:,} of {tally.read:,} documents {which} are not trained on: held out by "
                "their hash, in --eval_files, or empty"
            )

    def _window(self, read: _Read) -> Iterator[Document] | None:
        """The documents of the window at which `read` stands, in their order; None at the epoch's end."""
        documents: list[Document] = []
        characters = 0
        for document in read:
            if not document.ends:
                if documents:
                    read.put_back(document)
                    break
                return chain([document], read.rest_of_document())
            documents.append(document)
            characters += len(document.text)
            if len(documents) >= (self.settings.buffer or IN_ORDER_WINDOW) or characters >= WINDOW_CHARACTERS:
                break
        if not documents:
            return None
        if not self.settings.buffer:
            return iter(documents)
        seed = f"{self.settings.seed}/{read.opening.epoch}"
        return (documents[index] for index in epoch_order(seed, read.opening.window, len(documents)))

    def _documents(self, place: Place, tally: _Tally) -> Iterator[tuple[Document, Place]]:
        """(document, the place behind it) of the parts from `place` on."""
        parts = self._parts(place.epoch)
        mark = place.mark
        for number in range(place.part, len(parts)):
            for document, behind in self._filtered(self._patiently(parts[number], mark), tally):
                yield document, replace(place, part=number, mark=behind)
            mark = START

    def _parts(self, epoch: int) -> list[Any]:
        parts = list(self.corpus.parts)
        if not self.settings.buffer:
            return parts
        return [parts[index] for index in epoch_order(f"{self.settings.seed}/parts", epoch, len(parts))]

    def _filtered(self, documents: Iterator[tuple[Document, Mark]], tally: _Tally) -> Iterator[tuple[Document, Mark]]:
        keep, passes = self.corpus.keep, True
        for document, mark in documents:
            if document.begins:
                passes = bool(document.text or not document.ends) and (keep is None or keep.keeps(document.text))
                tally.read += 1
                tally.left_out += not passes
            if passes:
                yield document, mark

    def _patiently(self, part: Any, mark: Mark) -> Iterator[tuple[Document, Mark]]:
        """What `part` reads, opened again behind the last good record after a hiccup (an OSError, a lost connection),
        for `retry_s` in all without a new record."""
        waited, wait, pieces = 0.0, FIRST_WAIT_S, 0
        while True:
            try:
                for document, behind in islice(part.marked(mark), pieces, None):
                    yield document, behind
                    mark, pieces = (behind, 0) if document.ends else (mark, pieces + 1)
                    waited, wait = 0.0, FIRST_WAIT_S
                return
            except Exception as error:
                if not _is_hiccup(error):
                    raise self._named(error) from error
                if waited >= self.settings.retry_s:
                    raise RunError(
                        f"source {self.name!r}: {part.label} cannot be read behind record {mark.record}, tried for "
                        f"{waited:.0f} s (--stream_retry_s): {error}"
                    ) from error
                wait = min(wait, self.settings.retry_s - waited)
                self.warn(
                    f"source {self.name!r}: {part.label}, behind record {mark.record}: {error}; again in {wait:.0f} s"
                )
            time.sleep(wait)
            waited, wait = waited + wait, min(2 * wait, LONGEST_WAIT_S)

    def _named(self, error: Exception) -> Exception:
        return UserError(f"source {self.name!r}: {error}") if isinstance(error, UserError) else error


class _Read:
    """A reader that knows where the present window began and where the next one will."""

    def __init__(self, documents: Iterator[tuple[Document, Place]], opening: Place) -> None:
        self._documents, self.opening = documents, opening
        self._behind = opening
        self._held: tuple[Document, Place] | None = None

    def __iter__(self) -> Iterator[Document]:
        while (pair := self._held or next(self._documents, None)) is not None:
            self._held = None
            document, behind = pair
            self._last, self._behind_before = pair, self._behind
            self._behind = behind
            yield document

    def put_back(self, document: Document) -> None:
        """The window ends before `document`, the last one read."""
        assert self._last[0] is document
        self._held, self._behind = self._last, self._behind_before

    def rest_of_document(self) -> Iterator[Document]:
        for document in self:
            yield document
            if document.ends:
                return

    def next_window(self) -> None:
        self.opening = replace(self._behind, window=self.opening.window + 1, done=0)


def _is_hiccup(error: BaseException) -> bool:
    """What may be gone a moment later: errors of disk and network, also where a reader has put them into its words.
    Not a compressed file that is damaged."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, gzip.BadGzipFile):
            return False
        if isinstance(found, OSError) or type(found).__module__.split(".")[0] in ("httpx", "httpcore"):
            return True
        found = found.__cause__ if isinstance(found, UserError) else None
    return False
