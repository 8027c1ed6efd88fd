"""One or several named sources -> batches with exact shares, as a pure function of step
and batch size.

    sample i  --SampleSchedule-->  (source, number n among its samples)  --the source's own order-->  block

Each source has an order of its own, drawn from (seed, name, epoch), so that adding a
source does not reorder another.
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
from mora_ds.data.documents import Rows
from mora_ds.data.packing import Block, PackedDataset, stack
from mora_ds.data.stream_source import StreamSource

LONGEST_PERIOD = 1 << 16
"""Weights whose common denominator is larger are rounded to multiples of 1 / this."""


Phases = Sequence[tuple[int, Sequence[float]]]
"""(first sample or step, weights in whose proportion sources are drawn from there
on)."""


class SampleSchedule:
    """Which source each sample comes from, for K sources under phases and caps.

    `caps[k]`: how many samples source k has to give, None for any number. Where every
    source with a weight is used up, the schedule ends: `limit` is its length in
    samples, None for an endless one.
    """

    def __init__(self, phases: Phases, caps: Sequence[int | None]) -> None:
        """`phases`: counted in samples, the first from sample 0 on."""
        self._segments: list[_Segment] = []
        self.limit = self._lay_out(phases, caps)
        self._firsts = [segment.first for segment in self._segments]

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, number among that source's samples) of sample `sample`. Raises
        `IndexError` beyond `limit`."""
        if sample < 0 or (self.limit is not None and sample >= self.limit):
            raise IndexError(f"sample {sample} of {self.limit}")
        return self._segment(sample).locate(sample)

    def counts(self, samples: int) -> np.ndarray:
        """(K,) int64: how many of the first `samples` samples come from each source."""
        return self._segment(samples).counts(samples)

    def _segment(self, sample: int) -> _Segment:
        return self._segments[max(bisect_right(self._firsts, sample) - 1, 0)]

    def _lay_out(self, phases: Phases, caps: Sequence[int | None]) -> int | None:
        """Fill `_segments`: a new one begins with each phase, and where a source is
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
    """(K,): how many samples of each source come before `first`."""

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
        """The sample after the one with which `source` has given `count` samples."""
        order, _ = _period(self.weights)
        periods, number = divmod(
            count - int(self.before[source]) - 1, self.weights[source]
        )
        index = int(np.flatnonzero(order == source)[number])
        return self.first + periods * len(order) + index + 1


def integer_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest integers in the proportion of `weights`, which are read as decimals
    (0.1 is 1/10).

    Where they would add up to more than `LONGEST_PERIOD` they are rounded to add up to
    it (largest remainders; at least 1 each), which moves a share by less than 1/65,536.
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
        able = [
            k for k, count in enumerate(rounded) if count > (0 if missing > 0 else 1)
        ]
        rounded[max(able, key=lambda k: sign * (scaled[k] - rounded[k]))] += sign
    return tuple(rounded)


@lru_cache(maxsize=64)
def _period(weights: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(order, number), each (period,): every sample's source, and its number among that
    source's samples. The source that falls due first is drawn next, so that no prefix
    is off its share by a complete sample."""
    active = [source for source, weight in enumerate(weights) if weight]
    share = np.array([weights[source] for source in active], dtype=np.int64)
    period = sum(weights)
    order = np.empty(period, dtype=np.int64)
    number = np.empty(period, dtype=np.int64)
    drawn = np.zeros_like(share)
    # Tijdeman's rule for the chairman assignment problem (1980): of the K sources that
    # lack at least 1 / (2 K - 2) of a sample, draw the one whose lack would be the
    # first to exceed 1 - 1 / (2 K - 2). No lack then ever exceeds that.
    slack = max(2 * len(active) - 2, 1)
    for sample in range(period):
        lack = (sample + 1) * share - drawn * period
        # Integers far below 2^53, divided once: the comparison is exact.
        due = (slack * (period - lack) - period) / share
        due[slack * lack < period] = np.inf
        pick = int(np.argmin(due))
        order[sample] = active[pick]
        number[sample] = drawn[pick]
        drawn[pick] += 1
    return order, number


Source = PackedDataset | StreamSource
"""One packed source of a mixture."""


class Mixture:
    """Batches of one or several sources. Each rank draws its rows without the
    others."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        phases: Phases,
        epochs: Sequence[float | None],
        seq_len: int,
        rows_per_step: int,
        states: JsonObject | None = None,
    ) -> None:
        """`phases`: counted in steps, the first from step 0 on. `epochs[k]`: how often
        source k may be read, None for any number; where it is used up, the others share
        what it had. It is read as a decimal: 0.29 of 100 sequences are 29, and not
        28.999... `rows_per_step`: the global batch size. `states`: what `states_at`
        returned for the step at which the streams go on."""
        self.names = list(sources)
        self.sources = list(sources.values())
        self.seq_len = seq_len
        self.rows_per_step = rows_per_step
        caps: list[int | None] = []
        for source, limit in zip(self.sources, epochs, strict=True):
            if limit is None or source.n_blocks is None:
                caps.append(None)
            else:
                caps.append(int(Fraction(repr(limit)) * source.n_blocks))
        in_samples = [(step * rows_per_step, weights) for step, weights in phases]
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
        """What must be the same when a run is resumed."""
        self._streams = {
            name: source
            for name, source in sources.items()
            if isinstance(source, StreamSource)
        }
        states = states or {"step": 0, "sources": {}}
        # A checkpoint of another run, which is refused later, may have other sources.
        for name in self._streams.keys() & states["sources"].keys():
            self._streams[name].restore(states["sources"][name])
        self._next_step = states["step"]
        self._drawn: dict[int, Block] = {}
        """The streams' samples of the step before `_next_step`."""
        self._before = self._now()

    @property
    def has_streams(self) -> bool:
        return bool(self._streams)

    @property
    def n_blocks(self) -> int:
        """Sequences of all sources together, each read once; streams are not
        counted."""
        return sum(source.n_blocks or 0 for source in self.sources)

    @property
    def max_steps(self) -> int | None:
        """Complete batches until all sources are used up; None where one is endless."""
        limit = self.schedule.limit
        return None if limit is None else limit // self.rows_per_step

    def check_batch_size(self) -> None:
        """Raises `UserError` when all sources together do not fill one global batch."""
        sequences = (
            self.n_blocks if self.schedule.limit is None else self.schedule.limit
        )
        if sequences < self.rows_per_step and not self._streams:
            raise UserError(
                f"the training text is shorter than one batch: it makes {sequences} sequences of --seq_len "
                f"{self.seq_len}, one global batch takes {self.rows_per_step}; give more text (--train_files) or more "
                "`epochs`, or lower --seq_len, --per_device_train_batch_size or --gradient_accumulation_steps"
            )

    def first_rows(self, count: int) -> Rows:
        """The first `count` sequences of the first source, the same in every step."""
        return stack([self.sources[0].probe(index) for index in range(count)])

    def batch(self, step: int, rows: slice = slice(None)) -> Rows:
        """Rows `rows` of step `step`'s global batch: input_ids, labels, position_ids,
        each int64 (B, T), and their `documents`. With streams all ranks ask for the
        same step, that of the last call or a later one."""
        while self._streams and self._next_step <= step:
            self._draw()
        samples = self._samples(step)[rows]
        return stack(
            [self._drawn.get(sample) or self.sample(sample) for sample in samples]
        )

    def states_at(self, step: int) -> JsonObject | None:
        """What a run with streams needs that goes on with batch `step`, which is the
        last one drawn or the one after it. Where drawing it has failed half-way, that
        is the position before. None without streams."""
        if not self._streams:
            return None
        states = self._before if step == self._before["step"] else self._now()
        assert step == states["step"]
        return states

    def sources_of(self, step: int, rows: slice = slice(None)) -> list[int]:
        """The index of the source that each of those rows comes from."""
        return [self.schedule.locate(sample)[0] for sample in self._samples(step)[rows]]

    def tokens(self, steps: int) -> dict[str, int]:
        """How many tokens of each source the first `steps` batches hold."""
        counts = self.schedule.counts(steps * self.rows_per_step) * self.seq_len
        return dict(zip(self.names, counts.tolist(), strict=True))

    def sample(self, number: int) -> Block:
        """Sample `number` of the schedule."""
        source, number_in_source = self.schedule.locate(number)
        return self.sources[source].sample(number_in_source)

    def _samples(self, step: int) -> range:
        return range(step * self.rows_per_step, (step + 1) * self.rows_per_step)

    def _draw(self) -> None:
        """Draw the streams' part of the next global batch, on every rank, so that all
        stay at the same position."""
        self._before = self._now()
        self._drawn = {}
        for sample in self._samples(self._next_step):
            source, _ = self.schedule.locate(sample)
            if isinstance(self.sources[source], StreamSource):
                self._drawn[sample] = self.sample(sample)
        self._next_step += 1

    def _now(self) -> JsonObject:
        return {
            "step": self._next_step,
            "sources": {name: stream.state() for name, stream in self._streams.items()},
        }
