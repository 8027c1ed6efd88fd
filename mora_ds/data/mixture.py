"""Mixes one or several named sources into batches with exact proportions, as a pure
function of step and batch size.

    sample i  --SampleSchedule-->  (source, number n among its samples)  --order of the source-->  block

The order of each source is drawn from (seed, name, epoch), so adding a source does not
reorder the others.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from mora_ds.common.errors import UserError
from mora_ds.common.files import JsonObject
from mora_ds.data.documents import Batch
from mora_ds.data.packing import Block, PackedDataset, stack
from mora_ds.data.stream_source import StreamSource

LONGEST_PERIOD = 1 << 16
"""Weights whose common denominator is larger are rounded to multiples of 1 / this."""


Phases = Sequence[tuple[int, Sequence[float]]]
"""(first sample or step of the phase, sampling weights of all sources)."""


class SampleSchedule:
    """Assigns samples to K sources by the weights of phases, up to caps.

    `caps[k]`: the maximum number of samples of source k; None for no limit. The
    schedule ends when all sources with a weight are used up. `limit`: its length in
    samples; None if it is endless.
    """

    def __init__(self, phases: Phases, caps: Sequence[int | None]) -> None:
        """`phases`: counted in samples; the first phase starts at sample 0."""
        self._segments: list[_Segment] = []
        self.limit = self._build_segments(phases, caps)
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

    def _build_segments(self, phases: Phases, caps: Sequence[int | None]) -> int | None:
        """Fill `_segments`: a new one starts with each phase, and whenever a source is
        used up. Returns the limit."""
        first = 0
        before = np.zeros(len(caps), dtype=np.int64)
        ends = [*(next_first for next_first, _ in phases[1:]), None]
        for (_, phase_weights), end in zip(phases, ends, strict=True):
            while end is None or first < end:
                weights = [
                    weight if cap is None or count < cap else 0.0
                    for weight, cap, count in zip(
                        phase_weights, caps, before, strict=True
                    )
                ]
                if not any(weights):
                    return first
                segment = _Segment(first, integer_weights(weights), before)
                self._segments.append(segment)
                stops = [
                    segment.sample_after(k, cap)
                    for k, cap in enumerate(caps)
                    if cap is not None and weights[k]
                ]
                if end is not None:
                    stops.append(end)
                if not stops:
                    return None
                first = min(stops)
                before = segment.counts(first)
        raise AssertionError("the last phase has no end")


@dataclass(frozen=True)
class _Segment:
    """Samples from `first` on, in periods of `sum(weights)` samples."""

    first: int
    weights: tuple[int, ...]
    before: np.ndarray
    """(K,): number of samples of each source before `first`."""

    def locate(self, sample: int) -> tuple[int, int]:
        order, number = _period(self.weights)
        periods, index = divmod(sample - self.first, len(order))
        source = int(order[index])
        before = int(self.before[source]) + periods * self.weights[source]
        return source, before + int(number[index])

    def counts(self, samples: int) -> np.ndarray:
        order, _ = _period(self.weights)
        periods, remainder = divmod(samples - self.first, len(order))
        within = np.bincount(order[:remainder], minlength=len(self.weights))
        return self.before + periods * np.array(self.weights, dtype=np.int64) + within

    def sample_after(self, source: int, count: int) -> int:
        """The first sample number after the `count`-th sample of `source`."""
        order, _ = _period(self.weights)
        periods, number = divmod(
            count - int(self.before[source]) - 1, self.weights[source]
        )
        index = int(np.flatnonzero(order == source)[number])
        return self.first + periods * len(order) + index + 1


def integer_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest integers in the proportions of `weights`, taken as exact decimals
    (0.1 is 1/10).

    If their sum would exceed `LONGEST_PERIOD`, they are rounded to that sum (largest
    remainder method; at least 1 each), which changes a fraction by less than 1/65,536.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    exact = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(weight.denominator for weight in exact))
    if period <= LONGEST_PERIOD:
        return tuple(int(weight * period) for weight in exact)
    scaled = [weight * LONGEST_PERIOD for weight in exact]
    rounded = [max(int(weight), 1) if weight else 0 for weight in scaled]
    while (missing := LONGEST_PERIOD - sum(rounded)) != 0:
        sign = 1 if missing > 0 else -1
        adjustable = [
            k for k, count in enumerate(rounded) if count > (0 if missing > 0 else 1)
        ]
        rounded[max(adjustable, key=lambda k: sign * (scaled[k] - rounded[k]))] += sign
    return tuple(rounded)


@lru_cache(maxsize=64)
def _period(weights: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(order, number), each (period,): for every sample its source, and its number among
    the source's samples. In every prefix, the count of each source differs from its
    exact proportion by less than one sample."""
    active = [source for source, weight in enumerate(weights) if weight]
    active_weights = np.array([weights[source] for source in active], dtype=np.int64)
    period = sum(weights)
    order = np.empty(period, dtype=np.int64)
    number = np.empty(period, dtype=np.int64)
    drawn = np.zeros_like(active_weights)
    # Tijdeman's rule for the chairman assignment problem (1980). The deficit of a source
    # is its exact number of samples minus the number drawn. Among the K sources with a
    # deficit of at least 1 / (2 K - 2), draw the one whose deficit would be the first to
    # exceed 1 - 1 / (2 K - 2). Then no deficit ever exceeds that.
    slack = max(2 * len(active) - 2, 1)
    for sample in range(period):
        deficit = (sample + 1) * active_weights - drawn * period
        # Integers far below 2^53, divided once: the comparison is exact.
        deadline = (slack * (period - deficit) - period) / active_weights
        deadline[slack * deficit < period] = np.inf
        pick = int(np.argmin(deadline))
        order[sample] = active[pick]
        number[sample] = drawn[pick]
        drawn[pick] += 1
    return order, number


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
        source, number_in_source = self.schedule.locate(number)
        return self.sources[source].sample(number_in_source)

    def _samples(self, step: int) -> range:
        return range(step * self.global_batch_size, (step + 1) * self.global_batch_size)

    def _draw(self) -> None:
        """Draw all samples of streams in the next global batch. Every rank does this, so
        that all streams stay at the same position."""
        self._previous_states = self._states()
        self._drawn = {}
        for sample in self._samples(self._next_step):
            source, _ = self.schedule.locate(sample)
            if isinstance(self.sources[source], StreamSource):
                self._drawn[sample] = self.sample(sample)
        self._next_step += 1

    def _states(self) -> JsonObject:
        return {
            "step": self._next_step,
            "sources": {name: stream.state() for name, stream in self._streams.items()},
        }
