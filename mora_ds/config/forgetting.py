"""Forgetting: the perplexities on old text against those at the start, and the settings that act on them.

--stop_when_forgotten general:1.10      stop once the perplexity on `general` exceeds 1.10 of its value at the start
--best_by general:0.3 domain:0.7        checkpoints/best: lowest 0.3 x loss on general + 0.7 x loss on domain
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mora_ds.common.errors import UserError, nearest, refuse


@dataclass(frozen=True)
class Watch:
    """The bounds and weights that are applied after every evaluation. Perplexities are mappings by name of the set."""

    bounds: Mapping[str, float]
    """The ratio of a set's perplexity to its value at the start above which the run stops."""
    weights: Mapping[str, float]
    """The weights of the sets' losses in the sum that ranks checkpoints; empty: checkpoints are not ranked."""

    @classmethod
    def of(cls, bounds: Sequence[str], weights: Sequence[str]) -> Watch:
        """From the values of --stop_when_forgotten and --best_by. Raises `UserError` that lists the invalid ones."""
        problems: list[str] = []
        watch = cls(_named("--stop_when_forgotten", bounds, problems), _named("--best_by", weights, problems))
        problems += [
            f"--stop_when_forgotten {name}:{bound:g}: a ratio to the start is meant, above 1 (1.10: 10% worse)"
            for name, bound in watch.bounds.items()
            if bound <= 1
        ]
        if min(watch.weights.values(), default=1) < 0 or (watch.weights and not any(watch.weights.values())):
            problems.append("--best_by: weights must not be negative, and one must be above 0")
        refuse(problems)
        return watch

    def check_names(self, known: Sequence[str]) -> None:
        """Raises `UserError` for a set that is not evaluated."""
        for flag, names in (("--stop_when_forgotten", self.bounds), ("--best_by", self.weights)):
            for name in names:
                require_set(flag, name, known)

    def forgotten(
        self,
        before: Mapping[str, float],
        now: Mapping[str, float],
        tasks: Collection[str] = (),
    ) -> str | None:
        """A sentence about the first bound that is exceeded, or None. `tasks`: the names whose values are costs."""
        for name, bound in self.bounds.items():
            if name in before and name in now and now[name] > bound * before[name]:
                what = f"the cost of task {name}" if name in tasks else f"the perplexity on {name}"
                return (
                    f"{what} is {now[name]:.3f}, {now[name] / before[name]:.3f} of the "
                    f"{before[name]:.3f} it was at the start, and --stop_when_forgotten allows {bound:g}"
                )
        return None

    def score(self, now: Mapping[str, float]) -> float | None:
        """The weighted sum of losses, lower is better; None without weights, or where a weighted set is missing."""
        if not self.weights or not self.weights.keys() <= now.keys():
            return None
        return sum(weight * math.log(now[name]) for name, weight in self.weights.items())


def require_set(flag: str, name: str, known: Sequence[str]) -> None:
    """Raise `UserError` for an evaluation set that `flag` names and that is none of the `known` ones."""
    if name not in known:
        there = f"there are: {', '.join(known)}." if known else "there are none: give --eval_files."
        raise UserError(f"{flag}: no evaluation set is called {name!r}; {there}{nearest(name, known)}")


def report(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Lines of a table with each set's perplexity at the start and now; empty where no set has both."""
    changes = change(before, after)
    if not changes:
        return []
    width = max(map(len, ["perplexity on", *changes]))
    lines = [f"{'perplexity on':<{width}}{'start':>12}{'now':>12}{'change':>10}"]
    return lines + [
        f"{name:<{width}}{before[name]:>12.3f}{after[name]:>12.3f}{percent:>+9.2f}%"
        for name, percent in changes.items()
    ]


def change(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """{set: change of its perplexity since the start, in per cent}; above 0 is forgetting."""
    return {name: 100 * (after[name] / before[name] - 1) for name in after if name in before}


def _named(flag: str, entries: Sequence[str], problems: list[str]) -> dict[str, float]:
    """{name: number} of `entries` NAME:NUMBER; appends a message to `problems` for each invalid one."""
    numbers: dict[str, float] = {}
    for entry in entries:
        name, _, number = entry.rpartition(":")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not name or not math.isfinite(value):
            problems.append(f"{flag} {entry}: must be NAME:NUMBER")
        elif name in numbers:
            problems.append(f"{flag}: {name} is given twice")
        else:
            numbers[name] = value
    return numbers
