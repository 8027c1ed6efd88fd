"""A stream of documents -> tokens -> blocks, the same ones that a cache of these documents would be cut into.

    documents  --batches, each tokenised by one of the ranks-->  tokens in a queue  --T at a time-->  block

What was read but not yet handed out is short: a few batches of documents. A state is the place of the first document
whose tokens are still needed, and how many of them are not; to go on, that document is tokenised again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from mora_ds.data.cache import TokenCache
from mora_ds.data.mixture import Block, Mixture, Source
from mora_ds.data.packing import TokenBlocks, stack
from mora_ds.data.readers import Document
from mora_ds.data.stream import DocumentStream, Place
from mora_ds.data.tokenizer import Encoder
from mora_ds.errors import RunError, UserError

BATCH_CHARACTERS = 1 << 18
"""Text of one batch of documents: what a rank tokenises at a time."""


class Share(Protocol):
    """How work is shared out over the ranks; all of them call it at the same moments."""

    @property
    def width(self) -> int:
        """How many pieces of work are done at a time."""
        ...

    def __call__(self, work: Callable[[int], Any], count: int) -> list[Any]:
        """[work(0), ..., work(count - 1)] on every rank, each done by one of them."""
        ...


class Alone:
    """A `Share` of one process."""

    width = 1

    def __call__(self, work: Callable[[int], Any], count: int) -> list[Any]:
        return [work(number) for number in range(count)]


@dataclass
class _Held:
    """The tokens of a document (or piece) in the queue, of which `taken` are used up."""

    place: Place
    tokens: np.ndarray
    ends: bool
    taken: int = 0


class StreamSource:
    """One streamed source, read forward only. `epochs`: how often it may be read, None for any number."""

    n_blocks = None

    def __init__(
        self,
        documents: DocumentStream,
        encoder: Encoder,
        seq_len: int,
        document_mask: bool,
        identity: Any,
        share: Share | None = None,
        epochs: float | None = None,
    ) -> None:
        self.documents, self.encoder = documents, encoder
        self.seq_len, self.document_mask, self.epochs = seq_len, document_mask, epochs
        self.identity = identity
        self.share = share or Alone()
        self._probes: list[Block] = []
        self.restore({"place": Place().to_json(), "offset": 0, "samples": 0})

    def state(self) -> dict[str, Any]:
        """Where it stands, in plain types."""
        place, offset = (self._queue[0].place, self._queue[0].taken) if self._queue else (self._place, self._offset)
        return {"place": place.to_json(), "offset": offset, "samples": self._samples}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`; nothing is read before it is needed."""
        self._samples = state["samples"]
        self._begin(Place.from_json(state["place"]), state["offset"])

    def sample(self, number: int) -> Block:
        """The next block. Raises `UserError` for a source without text, `RunError` for one whose epochs are over."""
        assert number == self._samples, "a stream is read in order"
        while True:
            while self._available <= self.seq_len and self._fill():
                pass
            if self._available > 1:
                self._samples += 1
                return self._cut()
            self._next_epoch()

    def probe(self, index: int) -> Block:
        """Read apart, by every rank alone, so that the stream itself stays where it is."""
        if index >= len(self._probes):
            apart = StreamSource(self.documents.quiet(), self.encoder, self.seq_len, self.document_mask, None)
            self._probes = [apart.sample(number) for number in range(index + 1)]
        return self._probes[index]

    def _begin(self, place: Place, offset: int) -> None:
        self._place, self._offset = place, offset
        self._from_start = place == Place(epoch=place.epoch) and offset == 0
        self._queue: deque[_Held] = deque()
        self._available = 0
        self._reading: Iterator[tuple[Document, Place]] = self.documents.epoch(place)

    def _next_epoch(self) -> None:
        epoch, name = self._place.epoch, self.documents.name
        if self._from_start:
            raise UserError(f"source {name!r} holds no text to train on: every document is empty or left out")
        if self.epochs is not None and epoch + 1 >= self.epochs:
            raise RunError(
                f"source {name!r} has come to its end after {self.epochs:g} epoch(s) and {self._samples} sequences: "
                "raise its `epochs`, or end the run earlier with --max_steps"
            )
        self._begin(Place(epoch=epoch + 1), 0)

    def _fill(self) -> bool:
        """Tokenise what comes next; False at the epoch's end."""
        batches = [batch for batch in (self._batch() for _ in range(self.share.width)) if batch]
        encoded = self.share(
            lambda number: self.encoder.rows([document for document, _ in batches[number]]), len(batches)
        )
        for batch, rows in zip(batches, encoded, strict=True):
            for (document, place), tokens in zip(batch, rows, strict=True):
                held = _Held(place, tokens, document.ends, taken=self._offset)
                self._offset = 0
                self._queue.append(held)
                self._available += len(tokens) - held.taken
        return bool(batches)

    def _batch(self) -> list[tuple[Document, Place]]:
        batch, size = [], 0
        for document, place in self._reading:
            batch.append((document, place))
            size += len(document.text)
            if size >= BATCH_CHARACTERS:
                break
        return batch

    def _cut(self) -> Block:
        """The block that the queue begins with; its last token stays, as the next one's first."""
        wanted = min(self._available, self.seq_len + 1)
        pieces: list[np.ndarray] = []
        ends: list[int] = []
        size = 0
        for held in self._queue:
            piece = held.tokens[held.taken : held.taken + wanted - size]
            pieces.append(piece)
            size += len(piece)
            if held.ends and held.taken + len(piece) == len(held.tokens):
                ends.append(size)
            if size == wanted:
                break
        cut = TokenCache(Path("stream"), {"eos_id": self.encoder.eos_id}, np.concatenate(pieces), np.array(ends, "<i8"))
        self._drop(wanted - 1)
        self._from_start = False
        return TokenBlocks(cut, self.seq_len, self.document_mask).block(0)

    def _drop(self, count: int) -> None:
        self._available -= count
        while count:
            first = self._queue[0]
            used = min(count, len(first.tokens) - first.taken)
            first.taken, count = first.taken + used, count - used
            if first.taken == len(first.tokens):
                self._queue.popleft()


class StreamMixture(Mixture):
    """A mixture with streams in it: batches come in order, and where it stands is part of a checkpoint."""

    def __init__(self, sources: dict[str, Source], *rest: Any, states: dict[str, Any] | None = None) -> None:
        """`states`: what `states_at` gave, of the step at which the run goes on."""
        super().__init__(sources, *rest)
        self._streams = {name: source for name, source in sources.items() if isinstance(source, StreamSource)}
        self._next_step = (states or {}).get("step", 0)
        for name, stream in self._streams.items():
            if states is not None and name in states["sources"]:
                stream.restore(states["sources"][name])
        self._drawn: dict[int, Block] = {}
        self._before = self._now()

    def batch(self, step: int, global_batch_size: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """As `Mixture.batch`, for the step that was asked for last or a later one. All ranks ask alike."""
        while self._next_step <= step:
            self._draw(self._samples(self._next_step, global_batch_size))
        assert step == self._next_step - 1, "a stream does not go back"
        return stack(
            [
                self._drawn[sample] if sample in self._drawn else self._sample(sample)
                for sample in self._samples(step, global_batch_size)[rows]
            ]
        )

    def states_at(self, step: int) -> dict[str, Any]:
        """What a run that goes on with batch `step` needs: the one drawn last, or the one after it."""
        assert step in (self._next_step - 1, self._next_step)
        return self._now() if step == self._next_step else self._before

    def _now(self) -> dict[str, Any]:
        return {"step": self._next_step, "sources": {name: part.state() for name, part in self._streams.items()}}

    def _draw(self, samples: Sequence[int]) -> None:
        """Every rank holds the streams' part of the whole batch, and so the next one begins at the same place."""
        self._before, self._drawn = self._now(), {}
        for sample in samples:
            source, number = self.shares.locate(sample)
            if isinstance(self.sources[source], StreamSource):
                self._drawn[sample] = self.sources[source].sample(number)
        self._next_step += 1
