"""A stream of documents as blocks of tokens: those that a token cache would give.

    documents  --batches, each tokenised by one of the ranks-->  tokens in a queue  --T at a time-->  block

Only a few batches of documents are read ahead. The saved state is the position of the
first document whose tokens are still needed, and how many of its tokens are not; on
resuming that document is tokenised again.
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
"""(work, count) -> [work(0), ..., work(count - 1)] on every rank, each computed by one
of them. All ranks call it at the same moments. (`runtime.ranks.Ranks` is one.)"""


def map_in_this_process(work: Callable[[int], Any], count: int) -> list[Any]:
    """The `MapOverRanks` of a single rank."""
    return [work(number) for number in range(count)]


@dataclass
class _QueuedDocument:
    """The tokens of a document (or chunk); the first `used` are no longer needed."""

    position: StreamPosition
    tokens: np.ndarray
    ends: bool
    used: int = 0


class StreamSource:
    """One streamed source, read forward only."""

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
        """`share`: how the `ranks` tokenise together, each a batch of documents at a
        time. `block_start`: as in `pack`."""
        self.documents = documents
        self.encoder = encoder
        self.seq_len = seq_len
        self.document_mask = document_mask
        self.content_id = content_id
        self.map_over_ranks = map_over_ranks
        self.ranks = ranks
        self.block_start = block_start
        self._probes: list[Block] = []
        self.restore({"place": StreamPosition().to_json(), "offset": 0, "samples": 0})

    def state(self) -> JsonObject:
        """The position, as JSON for a checkpoint."""
        position = self._position
        offset = self._offset
        if self._queue:
            position = self._queue[0].position
            offset = self._queue[0].used
        return {"place": position.to_json(), "offset": offset, "samples": self._samples}

    def restore(self, state: JsonObject) -> None:
        """Goes on from `state`; nothing is read before it is needed."""
        self._samples = state["samples"]
        self._start(StreamPosition.from_json(state["place"]), state["offset"])

    def sample(self, number: int) -> Block:
        """The next block, of the next epoch where one ends. Raises `UserError` for a
        source without text."""
        assert number == self._samples, "a stream is read in order"
        while True:
            while self._available <= self.seq_len and self._fill():
                pass
            if self._available > 1:
                self._samples += 1
                return self._next_block()
            self._next_epoch()

    def probe(self, index: int) -> Block:
        """Sequence `index` of the stream's start, read by every rank for itself. The
        stream stays where it is."""
        if index >= len(self._probes):
            again = StreamSource(
                self.documents,
                self.encoder,
                self.seq_len,
                self.document_mask,
                None,
                block_start=self.block_start,
            )
            self._probes = [again.sample(number) for number in range(index + 1)]
        return self._probes[index]

    def _start(self, position: StreamPosition, offset: int) -> None:
        self._position = position
        self._offset = offset
        is_start = position == StreamPosition(epoch=position.epoch)
        self._at_epoch_start = is_start and offset == 0
        self._queue: deque[_QueuedDocument] = deque()
        self._available = 0
        documents = self.documents.epoch(position)
        self._batches: Iterator[list[tuple[Document, StreamPosition]]] = batched(
            documents, lambda item: len(item[0].text)
        )

    def _next_epoch(self) -> None:
        if self._at_epoch_start:
            name = self.documents.name
            raise UserError(
                f"source {name!r} holds no text to train on: every document is empty"
            )
        self._start(StreamPosition(epoch=self._position.epoch + 1), 0)

    def _fill(self) -> bool:
        """Tokenise the next documents, a batch a rank; False at the end of the
        epoch."""
        batches = list(islice(self._batches, self.ranks))

        def encode(number: int) -> list[np.ndarray]:
            return self.encoder.rows([document for document, _ in batches[number]])

        encoded = self.map_over_ranks(encode, len(batches))
        for batch, rows in zip(batches, encoded, strict=True):
            for (document, position), tokens in zip(batch, rows, strict=True):
                queued = _QueuedDocument(position, tokens, document.ends, self._offset)
                self._queue.append(queued)
                self._available += len(tokens) - self._offset
                self._offset = 0
        return bool(batches)

    def _next_block(self) -> Block:
        """The first T + 1 tokens of the queue. The last one is a label only, and stays
        there as the first input of the next block."""
        wanted = min(self._available, self.seq_len + 1)
        slices: list[np.ndarray] = []
        ends: list[int] = []
        size = 0
        while size < wanted:
            queued = self._queue[0]
            tokens = queued.tokens[queued.used : queued.used + wanted - size]
            slices.append(tokens)
            size += len(tokens)
            queued.used += len(tokens)
            if queued.ends and queued.used == len(queued.tokens):
                ends.append(size)
            if size == wanted:
                queued.used -= 1  # the label that is the next input
            if queued.used == len(queued.tokens):
                self._queue.popleft()
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
