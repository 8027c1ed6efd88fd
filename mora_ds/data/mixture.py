"""Mixes one or several named sources into batches with exact proportions, as a pure
function of step and batch size, and reads them ahead (`BatchLoader`).

    sample i  --SampleSchedule-->  (source, number n among its samples)  --order of the source-->  block

The order of each source is drawn from (seed, name, epoch), so adding a source does not
reorder the others.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch

from mora_ds.common.errors import UserError
from mora_ds.common.files import JsonObject
from mora_ds.data.documents import Batch
from mora_ds.data.order import LONGEST_PERIOD, integer_weights, source_order
from mora_ds.data.packing import IGNORED, Block, PackedDataset, stack
from mora_ds.data.stream_source import StreamSource

_ENDLESS = np.iinfo(np.int64).max
"""A cap that is never reached, and its place."""

_LARGEST_CAP = _ENDLESS // LONGEST_PERIOD
"""No run reaches a larger one, and its place would not fit int64."""

Phases = Sequence[tuple[int, Sequence[float]]]
"""(first sample or step of the phase, sampling weights of all sources)."""


class SampleSchedule:
    """Assigns samples to K sources by the weights of phases, up to caps.

    `caps[k]`: the maximum number of samples of source k; None for no limit. A source
    that is used up is left out of the order of its phase, so the others keep their
    proportions. The schedule ends when all sources with a weight are used up. `limit`:
    its length in samples; None if it is endless.
    """

    def __init__(self, phases: Phases, caps: Sequence[int | None]) -> None:
        """`phases`: counted in samples; the first phase starts at sample 0."""
        self._segments: list[_Segment] = []
        endless = [
            _ENDLESS if cap is None or cap >= _LARGEST_CAP else cap for cap in caps
        ]
        self.limit = self._build_segments(phases, np.array(endless, dtype=np.int64))
        self._firsts = [segment.first for segment in self._segments]

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, number among the source's samples) of a sample. Raises `IndexError`
        beyond `limit`."""
        if sample < 0 or (self.limit is not None and sample >= self.limit):
            raise IndexError(f"sample {sample} of {self.limit}")
        return self._segment(sample).locate(sample)

    def counts(self, samples: int) -> np.ndarray:
        """(K,) int64: the number of samples of each source among the first
        `samples`."""
        return self._segment(samples).counts(samples)

    def _segment(self, sample: int) -> _Segment:
        return self._segments[max(bisect_right(self._firsts, sample) - 1, 0)]

    def _build_segments(self, phases: Phases, caps: np.ndarray) -> int | None:
        """Fill `_segments`: a new one starts with each phase, and whenever a source is
        used up. Returns the limit."""
        before = np.zeros_like(caps)
        ends = [*(next_first for next_first, _ in phases[1:]), None]
        for (first, phase_weights), end in zip(phases, ends, strict=True):
            left = caps - before
            weights = np.where(left > 0, phase_weights, 0.0)
            if not weights.any():
                return first
            integers = integer_weights(weights.tolist())
            used_up = _places_after(integers, np.where(caps < _ENDLESS, left, 0))
            for position in np.unique([0, *used_up[used_up < _ENDLESS]]).tolist():
                drawn = np.minimum(_counts(integers, position), left)
                sample = first + int(drawn.sum())
                if end is not None and sample >= end:
                    break
                is_active = (weights > 0) & (used_up > position)
                if not is_active.any():
                    return sample
                skipped = int(drawn[is_active].sum())
                known = before + np.where(is_active, 0, drawn)
                segment = _Segment(sample, integers, is_active, known, skipped)
                self._segments.append(segment)
            if end is not None:
                before = self._segments[-1].counts(end)
        return None


@dataclass(frozen=True, eq=False)
class _Segment:
    """Samples from `first` on: those in the order of a phase whose sources are not used
    up."""

    first: int
    weights: tuple[int, ...]
    """Of the phase, of sources that are used up too."""
    is_active: np.ndarray
    """(K,) bool: whether the source is drawn in this segment."""
    before: np.ndarray
    """(K,): number of samples of each source before the phase; of one that is used up,
    all its samples."""
    skipped: int
    """Samples of the active sources in the phase before `first`."""

    def locate(self, sample: int) -> tuple[int, int]:
        position = self._position(sample)
        source = int(source_order(self.weights)[position % sum(self.weights)])
        return source, int(self.counts(sample)[source])

    def counts(self, samples: int) -> np.ndarray:
        return self.before + self.is_active * _counts(
            self.weights, self._position(samples)
        )

    def _position(self, sample: int) -> int:
        """The position in the phase's order of the sample."""
        positions = _active_positions(self)
        periods, index = divmod(self.skipped + sample - self.first, len(positions))
        return periods * sum(self.weights) + int(positions[index])


@lru_cache(maxsize=4)
def _active_positions(segment: _Segment) -> np.ndarray:
    """The positions of one period whose sources are active in the segment."""
    return np.flatnonzero(segment.is_active[source_order(segment.weights)])


def _counts(weights: tuple[int, ...], position: int) -> np.ndarray:
    """(K,): number of samples of each source before a position in the endless order."""
    order = source_order(weights)
    periods, index = divmod(position, len(order))
    within = np.bincount(order[:index], minlength=len(weights))
    return periods * np.array(weights, dtype=np.int64) + within


def _places_after(weights: tuple[int, ...], counts: np.ndarray) -> np.ndarray:
    """(K,): the place after the `counts[k]`-th sample of source k in the endless order.
    `_ENDLESS` for a source without a weight and for a count of 0."""
    order = source_order(weights)
    shares = np.array(weights, dtype=np.int64)
    asked = (shares > 0) & (counts > 0)
    periods, number = np.divmod(counts[asked] - 1, shares[asked])
    starts = (np.cumsum(shares) - shares)[asked]
    positions = np.argsort(order, kind="stable")[starts + number]
    ends = np.full_like(shares, _ENDLESS)
    ends[asked] = periods * len(order) + positions + 1
    return ends


Source = PackedDataset | StreamSource
"""A source of a mixture: packed tokens or a stream."""


class Mixture:
    """Batches of one or several sources. Each rank draws only its own sequences."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        phases: Phases,
        epochs: Sequence[float | None],
        seq_len: int,
        global_batch_size: int,
        states: JsonObject | None = None,
    ) -> None:
        """`phases`: counted in steps; the first phase starts at step 0. `epochs[k]`: the
        maximum number of passes over source k, None for no limit; when a source is used
        up, its weight is distributed over the others. It is taken as an exact decimal:
        0.29 of 100 sequences are 29, not 28.999... `global_batch_size`: sequences per
        step. `states`: the result of `states_at` for the step at which the streams
        continue."""
        self.names = list(sources)
        self.sources = list(sources.values())
        self.seq_len = seq_len
        self.global_batch_size = global_batch_size
        caps: list[int | None] = []
        for source, limit in zip(self.sources, epochs, strict=True):
            if limit is None or source.n_blocks is None:
                caps.append(None)
            else:
                caps.append(int(Fraction(repr(limit)) * source.n_blocks))
        in_samples = [(step * global_batch_size, weights) for step, weights in phases]
        self.schedule = SampleSchedule(in_samples, caps)
        weights_from = {
            f"from_step_{step}": dict(zip(sources, weights, strict=True))
            for step, weights in phases
        }
        self.identity: JsonObject = {
            "mixture": {
                "sources": {
                    name: source.content_id for name, source in sources.items()
                },
                "weights": weights_from,
                "epochs": dict(zip(sources, epochs, strict=True)),
            }
        }
        """Settings that must be equal when a run is resumed."""
        self._streams = {
            name: source
            for name, source in sources.items()
            if isinstance(source, StreamSource)
        }
        states = states or {"step": 0, "sources": {}}
        # The checkpoint may be of another run with other sources; a later check
        # rejects it.
        for name in self._streams.keys() & states["sources"].keys():
            self._streams[name].restore(states["sources"][name])
        self._next_step = states["step"]
        self._drawn: dict[int, Block] = {}
        """The streams' samples of the step before `_next_step`."""
        self._previous_states = self._states()

    @property
    def has_streams(self) -> bool:
        return bool(self._streams)

    @property
    def n_blocks(self) -> int:
        """Sequences of one pass over all sources; streams are not counted."""
        return sum(source.n_blocks or 0 for source in self.sources)

    @property
    def max_steps(self) -> int | None:
        """Number of full batches until all sources are used up; None if one is
        endless."""
        limit = self.schedule.limit
        return None if limit is None else limit // self.global_batch_size

    def check_batch_size(self) -> None:
        """Raise `UserError` if all sources together do not fill one global batch."""
        sequences = (
            self.n_blocks if self.schedule.limit is None else self.schedule.limit
        )
        if sequences < self.global_batch_size and not self._streams:
            raise UserError(
                f"the training text is shorter than one batch: it makes {sequences} sequences of --seq_len "
                f"{self.seq_len}, one global batch takes {self.global_batch_size}; give more text (--train_files) or "
                "more `epochs`, or lower --seq_len, --per_device_train_batch_size or --gradient_accumulation_steps"
            )

    def first_sequences(self, count: int) -> Batch:
        """The first `count` sequences of the first source, the same in every step."""
        return stack([self.sources[0].peek(index) for index in range(count)])

    def batch(self, step: int, part: slice = slice(None)) -> Batch:
        """A part of the global batch of `step`: input_ids, labels, position_ids, each
        int64 (B, T), and their `documents`. Streams: collective, and no step may be
        earlier than that of the last call."""
        while self._streams and self._next_step <= step:
            self._draw()
        samples = self._samples(step)[part]
        return stack(
            [self._drawn.get(sample) or self.sample(sample) for sample in samples]
        )

    def states_at(self, step: int) -> JsonObject | None:
        """The states of all streams for a resume with batch `step`, which must be the
        last batch drawn or the next one. If drawing it failed, the states before it.
        None without streams."""
        if not self._streams:
            return None
        states = self._previous_states
        if step != states["step"]:
            states = self._states()
        assert step == states["step"]
        return states

    def sources_of(self, step: int, part: slice = slice(None)) -> list[int]:
        """The index of the source of each sequence in a part of the global batch."""
        return [self.schedule.locate(sample)[0] for sample in self._samples(step)[part]]

    def tokens(self, steps: int) -> dict[str, int]:
        """The number of tokens of each source in the first `steps` batches."""
        counts = self.schedule.counts(steps * self.global_batch_size) * self.seq_len
        return dict(zip(self.names, counts.tolist(), strict=True))

    def sample(self, number: int) -> Block:
        """Sample `number` of the schedule."""
        index, number_in_source = self.schedule.locate(number)
        source = self.sources[index]
        assert isinstance(source, PackedDataset), "streams are drawn step by step"
        return source.sample(number_in_source)

    def _samples(self, step: int) -> range:
        return range(step * self.global_batch_size, (step + 1) * self.global_batch_size)

    def _draw(self) -> None:
        """Draw all samples of streams in the next global batch. Every rank does this, so
        that all streams stay at the same position."""
        self._previous_states = self._states()
        self._drawn = {}
        samples_of: dict[int, list[int]] = {}
        for sample in self._samples(self._next_step):
            index, _ = self.schedule.locate(sample)
            samples_of.setdefault(index, []).append(sample)
        for index, samples in samples_of.items():
            source = self.sources[index]
            if isinstance(source, StreamSource):
                blocks = source.take(len(samples))
                self._drawn.update(zip(samples, blocks, strict=True))
        self._next_step += 1

    def _states(self) -> JsonObject:
        return {
            "step": self._next_step,
            "sources": {name: stream.state() for name, stream in self._streams.items()},
        }


# -- batches, read ahead of their step --------------------------------------------------


@dataclass(frozen=True)
class MicroBatch:
    """This rank's part of one micro-batch."""

    batch: Batch
    """Tensors on the CPU; in pinned memory if the device is a GPU."""
    labels: list[int]
    """The number of labels of each sequence, without ignored ones."""
    sources: list[int]
    """The source of each sequence in the mixture; empty if there is one source."""


StepBatch = list[MicroBatch]
"""The micro-batches of one optimizer step."""


class BatchLoader:
    """This rank's batches of the steps up to `last_step`.

        take(step)           returns the micro-batches of a step; a thread starts to read the next ones
        next_labels(step)    waits for the thread; returns the number of labels of this rank

    All work on the host happens here, before the copy to the device: packing, this rank's
    part of each sequence, the number of labels, pinned memory. The thread runs only
    between the two calls. So a checkpoint, written after a step, never stores the position
    of a batch that is still being read. An error is raised by the `take` of the batch that
    failed.
    """

    def __init__(
        self,
        data: Mixture,
        slices: Sequence[slice],
        local_part: Callable[[Batch], Batch],
        last_step: int,
        device: torch.device | str,
        world: int,
    ) -> None:
        """`slices`: this replica's micro-batches in every global batch. `local_part`: this
        rank's part of one."""
        self.data = data
        self.slices = slices
        self.local_part = local_part
        self.last_step = last_step
        # Reading a stream is collective (`Ranks.map`), so all ranks must read at the
        # same time.
        self._is_collective = data.has_streams and world > 1
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="mora_ds batches")
        self._device = torch.device(device)
        self.ahead: Future[StepBatch] | None = None
        """The batch that `take` returns next, if its reading was started."""

    def take(self, step: int) -> StepBatch:
        """The micro-batches of the step after `step` completed steps. Raises the error
        of reading them."""
        if self.ahead is None:  # the first step of this process
            self._start(step)
        assert self.ahead is not None, "there is a batch for every step of the run"
        batch = self.ahead.result()
        self.ahead = None
        if not self._is_collective:
            self._start(step + 1)
        return batch

    def next_labels(self, step: int) -> int:
        """This rank's number of labels in the batch that `take(step)` will return; 0 if
        there is no such batch or `take` will raise. Call it when the kernels of the
        previous step are queued."""
        if self.ahead is None:
            self._start(step)
        if self.ahead is None or self.ahead.exception() is not None:
            return 0
        return labels_in(self.ahead.result())

    def _start(self, step: int) -> None:
        if step < self.last_step:
            self.ahead = self._reader.submit(self._read, step)

    def _read(self, step: int) -> StepBatch:
        # A new thread uses device 0, and pinning memory would create a context there.
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        return [self._micro_batch(step, rows) for rows in self.slices]

    def _micro_batch(self, step: int, rows: slice) -> MicroBatch:
        batch = self.local_part(self.data.batch(step, rows))
        # numpy, because torch would start threads that compete with those of the step.
        labels = (batch["labels"].numpy() != IGNORED).sum(axis=1).tolist()
        sources = self.data.sources_of(step, rows) if len(self.data.names) > 1 else []
        if self._device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return MicroBatch(batch, labels, sources)


def labels_in(batch: StepBatch) -> int:
    """The number of labels of a step's batch, without ignored ones."""
    return sum(sum(micro_batch.labels) for micro_batch in batch)
