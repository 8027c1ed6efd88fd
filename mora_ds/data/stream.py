"""The documents of a corpus that is read during training, in shuffled windows.

    members of an epoch  ->  windows of `buffer` documents, each shuffled  ->  documents, each with its `StreamPosition`

A stream of enough files has shards, each a stream of its own: of S shards, shard k has
the members k, k + S, k + 2 S, ... (`DocumentStream.shards`). S depends on the files
alone, so any number of ranks reads the same.

A stream can start at any position. The order of a window is drawn from
(seed, epoch, window), so a position is a few numbers: the file position where the window
starts, and the number of its completed documents. Resuming reads one window again. A
document in chunks is too long for a window; it is a separate window, passed on chunk by
chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from huggingface_hub.errors import HTTPError

from mora_ds.common.errors import RunError, UserError, reason
from mora_ds.common.files import JsonObject
from mora_ds.data.corpus import Corpus
from mora_ds.data.members import Member
from mora_ds.data.order import shuffled
from mora_ds.data.readers import START, Document, Mark, MarkedDocuments

IN_ORDER_WINDOW = 1024
"""Documents of a window without shuffling: the maximum that a resume reads again."""

WINDOW_CHARACTERS = 1 << 28
"""A window is complete when it has this much text, even with fewer documents."""

MAX_SHARDS = 64
SHARD_BYTES = 64 << 20
"""The least that the files of a shard have on average: each epoch of each shard ends with
a padded sequence."""


@dataclass(frozen=True)
class StreamPosition:
    """A position before a document (or chunk) of the stream. Saved in checkpoints."""

    epoch: int = 0
    window: int = 0
    member: int = 0
    """The member where the window starts, counted in the epoch's order of members."""
    mark: Mark = START
    """The position in that member where the window starts."""
    done: int = 0
    """Documents and chunks of the window before this position."""

    def to_json(self) -> JsonObject:
        return {**vars(self), "mark": vars(self.mark)}

    @classmethod
    def from_json(cls, content: JsonObject) -> StreamPosition:
        return cls(**{**content, "mark": Mark(**content["mark"])})


@dataclass(frozen=True)
class DocumentStream:
    """The documents of `corpus` from any position on, epoch by epoch."""

    name: str
    """The source's name, for messages."""
    corpus: Corpus
    buffer: int = 10_000
    """Documents that are shuffled together; 0 keeps the order of the files."""
    seed: int | str = 0
    window_characters: int = field(default_factory=lambda: WINDOW_CHARACTERS)

    def shards(self) -> list[DocumentStream]:
        """The stream in parts that can be read apart, or itself if there are few files,
        little text or an order to keep. Their number is a power of 2. Together their
        windows take as much memory as one of the stream."""
        members = self.corpus.members
        most = 1
        if self.buffer and len(members) > 1:
            most = min(
                MAX_SHARDS, len(members), self.corpus.size_bytes() // SHARD_BYTES
            )
        count = 1 << max(most.bit_length() - 1, 0)
        if count == 1:
            return [self]
        return [
            replace(
                self,
                corpus=replace(self.corpus, members=members[number::count]),
                buffer=-(-self.buffer // count),
                seed=f"{self.seed}/{number}",
                window_characters=self.window_characters // count,
            )
            for number in range(count)
        ]

    def epoch(
        self, position: StreamPosition
    ) -> Iterator[tuple[Document, StreamPosition]]:
        """The documents from `position` to the end of its epoch, without empty ones,
        each with its position. Raises `UserError` for a record that is not a document,
        and `RunError` for a member that can no longer be read."""
        done = position.done
        for opening, window in self._windows(replace(position, done=0)):
            for index, document in enumerate(window):
                if index >= done:
                    yield document, replace(opening, done=index)
            done = 0

    def _windows(
        self, opening: StreamPosition
    ) -> Iterator[tuple[StreamPosition, Iterable[Document]]]:
        """(start position, documents) of each window. Consume the documents before the
        next window."""
        documents = self._documents(opening)
        end = opening
        window: list[Document] = []
        characters = 0

        def chunks(first: Document) -> Iterator[Document]:
            nonlocal end
            yield first
            for chunk, after in documents:
                end = after
                yield chunk
                if chunk.ends:
                    return

        for document, after in documents:
            if document.ends:
                window.append(document)
                characters += len(document.text)
                end = after
            has_all = len(window) >= (self.buffer or IN_ORDER_WINDOW)
            is_full = has_all or characters >= self.window_characters
            if window and (is_full or not document.ends):
                yield opening, self._shuffled(window, opening)
                opening = replace(end, window=opening.window + 1)
                window = []
                characters = 0
            if not document.ends:
                end = after
                yield opening, chunks(document)
                opening = replace(end, window=opening.window + 1)
        if window:
            yield opening, self._shuffled(window, opening)

    def _shuffled(
        self, window: list[Document], opening: StreamPosition
    ) -> Iterable[Document]:
        if not self.buffer:
            return window
        seed = f"{self.seed}/{opening.epoch}"
        positions = np.arange(len(window))
        order = shuffled(seed, opening.window, len(window), positions)
        return (window[index] for index in order)

    def _documents(
        self, position: StreamPosition
    ) -> Iterator[tuple[Document, StreamPosition]]:
        """(document, position after it) from `position` on, without empty documents."""
        members: list[Member] = list(self.corpus.members)
        if self.buffer:
            count = len(members)
            seed = f"{self.seed}/parts"
            order = shuffled(seed, position.epoch, count, np.arange(count))
            members = [members[index] for index in order]
        mark = position.mark
        for number in range(position.member, len(members)):
            for document, after in self._read(members[number], mark):
                if not document.is_empty:
                    yield document, replace(position, member=number, mark=after)
            mark = START

    def _read(self, member: Member, mark: Mark) -> MarkedDocuments:
        """The documents of `member` after `mark`, each with the position after it.
        `datasets` itself retries network errors, for about two minutes."""
        try:
            yield from member.documents_after(mark)
        except UserError as error:
            # Errors of a disk or network, which have an errno, may go away: a run may
            # resume. Damage in a file has none.
            cause = error.__cause__
            fails = isinstance(cause, OSError) and cause.errno is not None
            kind = RunError if fails else UserError
            raise kind(f"source {self.name!r}: {error}") from error
        except (OSError, HTTPError) as error:
            raise RunError(
                f"source {self.name!r}: {member.label} cannot be read: {reason(error)}"
            ) from error
