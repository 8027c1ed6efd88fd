"""What a run loses on old text, against its own start: the report, the bound at which it stops, the best checkpoint.

--stop_when_forgotten general:1.10      stop once the perplexity on `general` is more than 1.10 of what it was
--best_by general:0.3 domain:0.7        checkpoints/best: least 0.3 x loss on general + 0.7 x loss on domain
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mora_ds.errors import UserError, nearest


@dataclass(frozen=True)
class Watch:
    """What is looked at after every evaluation. All figures are perplexities by name of the set."""

    bounds: Mapping[str, float]
    """A set's perplexity, as a ratio to its start, at which the run stops."""
    weights: Mapping[str, float]
    """Of the losses in the sum by which checkpoints are compared; empty: they are not."""

    @classmethod
    def of(cls, bounds: Sequence[str], weights: Sequence[str]) -> Watch:
        """From the flags. Raises `UserError` for what is no NAME:NUMBER."""
        watch = cls(_named("--stop_when_forgotten", bounds), _named("--best_by", weights))
        for name, bound in watch.bounds.items():
            if bound <= 1:
                raise UserError(
                    f"--stop_when_forgotten {name}:{bound:g}: a ratio to the start is meant, above 1 (1.10: 10% worse)"
                )
        if any(weight < 0 for weight in watch.weights.values()) or (watch.weights and not sum(watch.weights.values())):
            raise UserError("--best_by: weights must not be negative, and one must be above 0")
        return watch

    def check_names(self, known: Sequence[str]) -> None:
        """Raises `UserError` for a set that is not evaluated."""
        for flag, names in (("--stop_when_forgotten", self.bounds), ("--best_by", self.weights)):
            for name in names:
                if name not in known:
                    there = f"there are: {', '.join(known)}." if known else "there are none: give --eval_files."
                    raise UserError(f"{flag}: no evaluation set is called {name!r}; {there}{nearest(name, known)}")

    def forgotten(self, before: Mapping[str, float], now: Mapping[str, float]) -> str | None:
        """Which bound is passed, in a sentence, or None."""
        for name, bound in self.bounds.items():
            if name in before and name in now and now[name] > bound * before[name]:
                return (
                    f"the perplexity on {name} is {now[name]:.3f}, {now[name] / before[name]:.3f} of the "
                    f"{before[name]:.3f} it was at the start, and --stop_when_forgotten allows {bound:g}"
                )
        return None

    def score(self, now: Mapping[str, float]) -> float | None:
        """The weighted sum of losses, lower is better; None where nothing is weighed."""
        if not self.weights or not self.weights.keys() <= now.keys():
            return None
        return sum(weight * math.log(now[name]) for name, weight in self.weights.items())


def report(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Lines of a table: each set against its start. Empty where there is nothing to compare."""
    names = [name for name in after if name in before]
    if not names:
        return []
    width = max(len("perplexity on"), *map(len, names))
    lines = [f"{'perplexity on':<{width}}{'start':>12}{'now':>12}{'change':>10}"]
    for name in names:
        lines.append(f"{name:<{width}}{before[name]:>12.3f}{after[name]:>12.3f}{change(before, after)[name]:>+9.2f}%")
    return lines


def change(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """{set: change of its perplexity since the start, in per cent}; above 0 is forgetting."""
    return {name: 100 * (after[name] / before[name] - 1) for name in after if name in before}


def _named(flag: str, entries: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for entry in entries:
        name, mark, number = entry.rpartition(":")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not mark or not name or not math.isfinite(value):
            raise UserError(f"{flag} {entry}: must be NAME:NUMBER")
        if name in found:
            raise UserError(f"{flag}: {name} is given twice")
        found[name] = value
    return found
