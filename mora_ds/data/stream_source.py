"""A stream of documents as blocks of tokens: of a single shard the same blocks as from a
token cache.

    documents of a shard  --batches-->  tokens in a queue  --T + 1 at a time, T used up-->  block

The shards take turns: each that still has text in this epoch gives its next block. When
none has, the next epoch starts, with the first shard. A shard is read and tokenized by
one rank, which tells the others its blocks. A stream without shards is read by all ranks,
and each tokenizes a part of the batches. So the ranks do not change the blocks.

Only a few batches of documents are read ahead. The saved state of a shard is the position
of the first document that is not used up, and the number of its used tokens. A resume
tokenizes that document again.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle, islice
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


Cut = list[np.ndarray]
"""Tokens of a block, up to T + 1, and where documents end in them."""


@dataclass(eq=False)
class Shard:
    """The tokens of a shard, cut into blocks."""

    documents: DocumentStream
    encoder: Encoder
    seq_len: int
    map_over_ranks: MapOverRanks
    """Splits batches of documents over the ranks, which tokenize them."""
    ranks: int

    def __post_init__(self) -> None:
        self.start(StreamPosition())

    def start(self, position: StreamPosition, offset: int = 0) -> None:
        """Continue after `offset` tokens of the document at `position`. Reads nothing
        yet."""
        self._position = position
        self._offset = offset
        self.queue: deque[_QueuedDocument] = deque()
        self._available = 0
        documents = self.documents.epoch(position)
        self._batches: Iterator[list[tuple[Document, StreamPosition]]] = batched(
            documents, lambda item: len(item[0].text)
        )

    def state(self) -> JsonObject:
        position = self._position
        offset = self._offset
        if self.queue:
            position = self.queue[0].position
            offset = self.queue[0].used
        return {"place": position.to_json(), "offset": offset}

    def restore(self, state: JsonObject) -> None:
        self.start(StreamPosition.from_json(state["place"]), state["offset"])

    def cuts(self, count: int) -> list[Cut]:
        """The next `count` blocks; fewer at the end of the epoch."""
        cuts: list[Cut] = []
        while len(cuts) < count:
            while self._available <= self.seq_len and self._fill():
                pass
            if self._available <= 1:
                break
            cuts.append(self._next_cut())
        return cuts

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

    def _next_cut(self) -> Cut:
        """The first T + 1 tokens of the queue. The last one is only a label and stays in
        the queue as the first input of the next block."""
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
        return [np.concatenate(slices), np.array(ends, np.int64)]


@dataclass(eq=False)
class StreamSource:
    """A streamed source, which can only be read forward."""

    n_blocks = None

    documents: DocumentStream
    encoder: Encoder
    seq_len: int
    document_mask: bool
    content_id: Any
    map_over_ranks: MapOverRanks = map_in_this_process
    """Splits shards, or else batches of documents, over the ranks."""
    ranks: int = 1
    block_start: int | None = None
    """As in `pack`."""

    def __post_init__(self) -> None:
        self._first_blocks: list[Block] = []
        streams = self.documents.shards()
        over_ranks = (self.map_over_ranks, self.ranks)
        if len(streams) > 1:
            over_ranks = (map_in_this_process, 1)
        self.shards = [
            Shard(stream, self.encoder, self.seq_len, *over_ranks) for stream in streams
        ]
        self._start_epoch(0)

    def state(self) -> JsonObject:
        """The position as JSON, for a checkpoint."""
        return {
            "epoch": self.epoch,
            "turns": list(self._turns),
            "shards": list(self._states),
        }

    def restore(self, state: JsonObject) -> None:
        """Continue from `state`, unless it is of other files. Reads nothing yet."""
        if len(state.get("shards", [])) != len(self.shards):
            return
        self._states = list(state["shards"])
        self.epoch = state["epoch"]
        self._turns = deque(state["turns"])
        self._has_text = True
        for shard, own_state in zip(self.shards, self._states, strict=True):
            shard.restore(own_state)

    def take(self, count: int) -> list[Block]:
        """The next `count` blocks; starts the next epoch if necessary. Raises
        `UserError` for a source without text. Collective if there are ranks."""
        blocks: list[Block] = []
        cuts: dict[int, deque[Cut]] = defaultdict(deque)
        while len(blocks) < count:
            if not self._turns:
                self._next_epoch()
            # How many each shard gives if none of them ends
            turns = Counter(islice(cycle(self._turns), count - len(blocks)))
            wanted = {number: turns[number] - len(cuts[number]) for number in turns}
            ended = self._read(wanted, cuts)
            while len(blocks) < count and self._turns:
                number = self._turns[0]
                if cuts[number]:
                    blocks.append(self._packed(*cuts[number].popleft()))
                    self._turns.rotate(-1)
                    self._has_text = True
                elif number in ended:
                    self._turns.popleft()
                else:
                    break
        return blocks

    def peek(self, index: int) -> Block:
        """Sequence `index` from the start of the stream, without moving the stream. Not
        collective."""
        if index >= len(self._first_blocks):
            copy = replace(self, map_over_ranks=map_in_this_process, ranks=1)
            # Each copy reads from the start: twice as much for the next indices
            self._first_blocks = copy.take(max(index + 1, 2 * len(self._first_blocks)))
        return self._first_blocks[index]

    def _start_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self._turns = deque(range(len(self.shards)))
        self._has_text = False
        for shard in self.shards:
            shard.start(StreamPosition(epoch=epoch))
        self._states = [shard.state() for shard in self.shards]

    def _next_epoch(self) -> None:
        if not self._has_text:
            name = self.documents.name
            raise UserError(
                f"source {name!r} has no text to train on: every document is empty"
            )
        self._start_epoch(self.epoch + 1)

    def _read(self, wanted: dict[int, int], cuts: dict[int, deque[Cut]]) -> set[int]:
        """Append the next `wanted[k]` blocks of shard k to `cuts[k]`. Returns the shards
        that have fewer in this epoch."""

        def read(number: int) -> tuple[list[Cut], JsonObject]:
            shard = self.shards[number]
            return shard.cuts(wanted.get(number, 0)), shard.state()

        if len(self.shards) == 1:
            results = [read(0)]
        else:
            results = self.map_over_ranks(read, len(self.shards))
        ended = set()
        for number, (new, state) in enumerate(results):
            cuts[number] += new
            self._states[number] = state
            if len(new) < wanted.get(number, 0):
                ended.add(number)
        return ended

    def _packed(self, tokens: np.ndarray, ends: np.ndarray) -> Block:
        return pack(
            tokens.astype(np.int64),
            ends,
            self.seq_len,
            self.encoder.eos_id,
            self.document_mask,
            self.block_start,
        )
