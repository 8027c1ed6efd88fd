"""Sample i of a mixture -> (its source, the how-manieth sample of that source it is): pure functions of i.

    weights 0.5, 0.3, 0.2  ->  whole numbers 5, 3, 2  ->  a period of 10 samples, repeated: a b c a b a c a b a

Within a period sources follow each other by Tijdeman's rule (The chairman assignment problem, Discrete Mathematics 32,
1980): after any number of samples n, each of K sources has given n x its share to within 1 - 1/(2K - 2) samples. So a
window of any length has its shares to within two samples, and a place in the order is found without a walk to it.

A phase (other weights from some sample on) or a source that is used up (its epochs are over) begins a new segment: the
same rule with the weights that hold from there on.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

LONGEST_PERIOD = 1 << 16
"""Weights whose common denominator is larger are rounded to multiples of 1 / this."""


@dataclass(frozen=True)
class Phase:
    """From sample `first` on, sources are drawn in proportion to `weights`."""

    first: int
    weights: tuple[float, ...]


class Shares:
    """The order of K sources under phases and caps. `caps[k]`: samples that source k has to give, None for any number.

    Where every source with a weight is used up, the order ends: `limit` is its length, None for an endless one.
    """

    def __init__(self, phases: Sequence[Phase], caps: Sequence[int | None]) -> None:
        assert phases and phases[0].first == 0, "the first phase begins with the first sample"
        self._segments: list[_Segment] = []
        self.limit = self._lay_out(phases, caps)
        self._firsts = [segment.first for segment in self._segments]

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, number among that source's samples) of sample `sample`. Raises `IndexError` beyond `limit`."""
        if sample < 0 or (self.limit is not None and sample >= self.limit):
            raise IndexError(f"sample {sample} of {self.limit}")
        return self._segment(sample).locate(sample)

    def counts(self, samples: int) -> np.ndarray:
        """(K,) int64: how many of the first `samples` samples come from each source."""
        return self._segment(samples).counts(samples)

    def _segment(self, sample: int) -> _Segment:
        return self._segments[max(bisect_right(self._firsts, sample) - 1, 0)]

    def _lay_out(self, phases: Sequence[Phase], caps: Sequence[int | None]) -> int | None:
        first, before = 0, np.zeros(len(caps), dtype=np.int64)
        ends = [*(phase.first for phase in phases[1:]), None]
        for phase, end in zip(phases, ends, strict=True):
            while end is None or first < end:
                spent = [cap is not None and count >= cap for cap, count in zip(caps, before, strict=True)]
                weights = [0.0 if out else weight for weight, out in zip(phase.weights, spent, strict=True)]
                if not any(weights):
                    return first
                segment = _Segment(first, whole_weights(weights), before)
                self._segments.append(segment)
                stops = [segment.sample_after(k, cap) for k, cap in enumerate(caps) if cap is not None and weights[k]]
                stop = min(stops, default=None)
                if stop is None or (end is not None and stop > end):
                    stop = end
                if stop is None:
                    return None
                first, before = stop, segment.counts(stop)
        raise AssertionError("the last phase has no end")


@dataclass(frozen=True)
class _Segment:
    """Samples from `first` on, a period of `sum(weights)` repeated; `before`: what each source gave earlier."""

    first: int
    weights: tuple[int, ...]
    before: np.ndarray

    def locate(self, sample: int) -> tuple[int, int]:
        order, rank = _period(self.weights)
        periods, place = divmod(sample - self.first, len(order))
        source = int(order[place])
        return source, int(self.before[source]) + periods * self.weights[source] + int(rank[place])

    def counts(self, samples: int) -> np.ndarray:
        order, _ = _period(self.weights)
        periods, rest = divmod(samples - self.first, len(order))
        within = np.bincount(order[:rest], minlength=len(self.weights))
        return self.before + periods * np.array(self.weights, dtype=np.int64) + within

    def sample_after(self, source: int, count: int) -> int:
        """The sample behind the one with which `source` has given `count` of them."""
        order, _ = _period(self.weights)
        periods, rank = divmod(count - int(self.before[source]) - 1, self.weights[source])
        return self.first + periods * len(order) + int(np.flatnonzero(order == source)[rank]) + 1


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the proportion of `weights`, read as the decimals they are written as.

    Where they would add up to more than `LONGEST_PERIOD` they are rounded to add up to it (largest remainders; at
    least 1 each), which moves a share by less than 1/65,536.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    exact = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(weight.denominator for weight in exact))
    if period <= LONGEST_PERIOD:
        return tuple(int(weight * period) for weight in exact)
    scaled = [weight * LONGEST_PERIOD for weight in exact]
    whole = [max(int(weight), 1) if weight else 0 for weight in scaled]
    while (missing := LONGEST_PERIOD - sum(whole)) != 0:
        lack = [weight - have for weight, have in zip(scaled, whole, strict=True)]
        sign = 1 if missing > 0 else -1
        able = [k for k, have in enumerate(whole) if have > (1 if sign < 0 else 0)]
        whole[max(able, key=lambda k: sign * lack[k])] += sign
    return tuple(whole)


@lru_cache(maxsize=64)
def _period(weights: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(order, rank), each (period,): the source of every sample of one period, and its number among that source's."""
    active = [source for source, weight in enumerate(weights) if weight]
    share, period = np.array([weights[source] for source in active], dtype=np.int64), sum(weights)
    order, rank = np.empty(period, dtype=np.int64), np.empty(period, dtype=np.int64)
    given = np.zeros_like(share)
    slack = max(2 * len(active) - 2, 1)
    for sample in range(period):
        lack = (sample + 1) * share - given * period
        due = (slack * (period - lack) - period) / share  # exact: whole numbers far below 2^53, divided once
        due[slack * lack < period] = np.inf
        pick = int(np.argmin(due))
        order[sample], rank[sample] = active[pick], given[pick]
        given[pick] += 1
    return order, rank
