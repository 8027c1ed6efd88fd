"""Forgetting: perplexities against those at the start, and the settings that act on
them.

--stop_when_forgotten general:1.10    stop once the perplexity on `general` exceeds 1.10 of its value at the start
--best_by general:0.3 domain:0.7      checkpoints/best: lowest 0.3 x loss on general + 0.7 x loss on domain
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mora_ds.common.errors import NOT_NEGATIVE, Bounds, UserError, nearest

_STOP = "--stop_when_forgotten"
_BEST = "--best_by"


@dataclass(frozen=True)
class Watch:
    """What is looked at after every evaluation. Names are those of evaluation sets,
    whose values are perplexities, and of tasks, whose values are costs."""

    bounds: Mapping[str, float]
    """Name -> the ratio of its value to that at the start above which the run stops."""
    weights: Mapping[str, float]
    """Name -> the weight of its loss in the sum that ranks checkpoints; empty: no
    ranks."""

    @classmethod
    def of(cls, bounds: Sequence[str], weights: Sequence[str]) -> Watch:
        """From the values of --stop_when_forgotten and of --best_by. Raises
        `UserError`."""
        watch = cls(
            _named(_STOP, bounds, Bounds(above=1)), _named(_BEST, weights, NOT_NEGATIVE)
        )
        if watch.weights and not any(watch.weights.values()):
            raise UserError(f"{_BEST}: one weight must be above 0")
        return watch

    def check_names(self, known: Sequence[str]) -> None:
        """Raise `UserError` for a name that is not evaluated."""
        available = f"there are: {', '.join(known)}."
        if not known:
            available = "there are none: give --eval_files."
        for flag, names in ((_STOP, self.bounds), (_BEST, self.weights)):
            for name in names:
                if name not in known:
                    raise UserError(
                        f"{flag}: no evaluation set is called {name!r}; {available}{nearest(name, known)}"
                    )

    def forgotten(
        self, before: Mapping[str, float], now: Mapping[str, float]
    ) -> str | None:
        """A sentence about the first bound that is exceeded, or None."""
        for name, bound in self.bounds.items():
            if name in before and name in now and now[name] > bound * before[name]:
                return (
                    f"the value of {name} is {now[name]:.3f}, {now[name] / before[name]:.3f} of the "
                    f"{before[name]:.3f} it was at the start, and --stop_when_forgotten allows {bound:g}"
                )
        return None

    def score(self, now: Mapping[str, float]) -> float | None:
        """The weighted sum of losses, lower is better; None without weights, or where a
        weighted value is missing."""
        if not self.weights or not self.weights.keys() <= now.keys():
            return None
        return sum(
            weight * math.log(now[name]) for name, weight in self.weights.items()
        )


def report(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """A line for each set that has a perplexity at the start and now."""
    return [
        f"perplexity on {name}: {before[name]:.3f} at the start, {after[name]:.3f} now ({percent:+.2f}%)"
        for name, percent in change(before, after).items()
    ]


def change(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """{set: change of its perplexity since the start in percent, above 0 if
    forgotten}."""
    return {
        name: 100 * (after[name] / before[name] - 1) for name in after if name in before
    }


def _named(flag: str, entries: Sequence[str], bounds: Bounds) -> dict[str, float]:
    """{name: number} of `entries` NAME:NUMBER. Raises `UserError` for another form."""
    numbers = {}
    for entry in entries:
        name, _, number = entry.rpartition(":")
        if name in numbers:
            raise UserError(f"{flag}: {name} is given twice")
        try:
            numbers[name] = float(number)
        except ValueError:
            numbers[name] = math.nan
        if not name or not bounds.allow(numbers[name]):
            raise UserError(
                f"{flag} {entry}: must be NAME:NUMBER, with a number {bounds}"
            )
    return numbers
