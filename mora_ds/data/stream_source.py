"""A stream of documents as blocks of tokens, the same blocks as from a token cache.

    documents  --batches, each tokenized by one of the ranks-->  tokens in a queue  --T at a time-->  block

Only a few batches of documents are read ahead. The saved state is the position of the
first document that is not used up, and the number of its used tokens. A resume tokenizes
that document again.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from mora_ds.common.errors import UserError
from mora_ds.common.files import JsonObject
from mora_ds.data.packing import Block, pack
from mora_ds.data.readers import Document, batched
from mora_ds.data.stream import DocumentStream, StreamPosition
from mora_ds.data.tokenizer import Encoder

MapOverRanks = Callable[[Callable[[int], Any], int], list[Any]]
"""(work, count) -> [work(0), ..., work(count - 1)] on every rank, each item computed by
one rank. Collective, such as `runtime.ranks.Ranks.map`."""


def map_in_this_process(work: Callable[[int], Any], count: int) -> list[Any]:
    """`MapOverRanks` without other ranks."""
    return [work(number) for number in range(count)]


@dataclass
class _QueuedDocument:
    """The tokens of a document (or chunk), of which the first `used` are used up."""

    position: StreamPosition
    tokens: np.ndarray
    ends: bool
    used: int = 0


class StreamSource:
    """A streamed source, which can only be read forward."""

    n_blocks = None

    def __init__(
        self,
        documents: DocumentStream,
        encoder: Encoder,
        seq_len: int,
        document_mask: bool,
        content_id: Any,
        map_over_ranks: MapOverRanks = map_in_this_process,
        ranks: int = 1,
        block_start: int | None = None,
    ) -> None:
        """`map_over_ranks`: splits batches of documents over the `ranks`, which
        tokenize them. `block_start`: as in `pack`."""
        self.documents = documents
        self.encoder = encoder
        self.seq_len = seq_len
        self.document_mask = document_mask
        self.content_id = content_id
        self.map_over_ranks = map_over_ranks
        self.ranks = ranks
        self.block_start = block_start
        self._first_blocks: list[Block] = []
        self.restore({"place": StreamPosition().to_json(), "offset": 0, "samples": 0})

    def state(self) -> JsonObject:
        """The position as JSON, for a checkpoint."""
        position = self._position
        offset = self._offset
        if self.queue:
            position = self.queue[0].position
            offset = self.queue[0].used
        return {"place": position.to_json(), "offset": offset, "samples": self._samples}

    def restore(self, state: JsonObject) -> None:
        """Continue from `state`. Reads nothing yet."""
        self._samples = state["samples"]
        self._start(StreamPosition.from_json(state["place"]), state["offset"])

    def sample(self, number: int) -> Block:
        """The next block; starts the next epoch if necessary. Raises `UserError` for a
        source without text."""
        assert number == self._samples, "a stream is read in order"
        while True:
            while self._available <= self.seq_len and self._fill():
                pass
            if self._available > 1:
                self._samples += 1
                return self._next_block()
            self._next_epoch()

    def peek(self, index: int) -> Block:
        """Sequence `index` from the start of the stream, without moving the stream. Not
        collective."""
        if index >= len(self._first_blocks):
            copy = StreamSource(
                self.documents,
                self.encoder,
                self.seq_len,
                self.document_mask,
                None,
                block_start=self.block_start,
            )
            self._first_blocks = [copy.sample(number) for number in range(index + 1)]
        return self._first_blocks[index]

    def _start(self, position: StreamPosition, offset: int) -> None:
        self._position = position
        self._offset = offset
        is_start = position == StreamPosition(epoch=position.epoch)
        self._at_epoch_start = is_start and offset == 0
        self.queue: deque[_QueuedDocument] = deque()
        self._available = 0
        documents = self.documents.epoch(position)
        self._batches: Iterator[list[tuple[Document, StreamPosition]]] = batched(
            documents, lambda item: len(item[0].text)
        )

    def _next_epoch(self) -> None:
        if self._at_epoch_start:
            name = self.documents.name
            raise UserError(
                f"source {name!r} has no text to train on: every document is empty"
            )
        self._start(StreamPosition(epoch=self._position.epoch + 1), 0)

    def _fill(self) -> bool:
        """Tokenize the next documents, one batch per rank. Returns False at the end of
        the epoch."""
        batches = list(islice(self._batches, self.ranks))

        def encode(number: int) -> list[np.ndarray]:
            return self.encoder.encode([document for document, _ in batches[number]])

        encoded = self.map_over_ranks(encode, len(batches))
        for batch, token_lists in zip(batches, encoded, strict=True):
            for (document, position), tokens in zip(batch, token_lists, strict=True):
                queued = _QueuedDocument(position, tokens, document.ends, self._offset)
                self.queue.append(queued)
                self._available += len(tokens) - self._offset
                self._offset = 0
        return bool(batches)

    def _next_block(self) -> Block:
        """A block of the first T + 1 tokens of the queue. The last one is only a label
        and stays in the queue as the first input of the next block."""
        wanted = min(self._available, self.seq_len + 1)
        slices: list[np.ndarray] = []
        ends: list[int] = []
        size = 0
        while size < wanted:
            queued = self.queue[0]
            tokens = queued.tokens[queued.used : queued.used + wanted - size]
            slices.append(tokens)
            size += len(tokens)
            queued.used += len(tokens)
            if queued.ends and queued.used == len(queued.tokens):
                ends.append(size)
            if size == wanted:
                queued.used -= 1  # the last label is the next input
            if queued.used == len(queued.tokens):
                self.queue.popleft()
        self._available -= wanted - 1
        self._at_epoch_start = False
        return pack(
            np.concatenate(slices).astype(np.int64),
            np.array(ends, np.int64),
            self.seq_len,
            self.encoder.eos_id,
            self.document_mask,
            self.block_start,
        )
