"""Decides whether a training signal has stalled, by a straight line through its newest values.

    values (one a step at full lr)          change   what the line moves over the window   }  as shares of
      .                                     error    two standard errors of that           }  the window's mean
        . ' .
      ------.--.-'-.--.---   least squares  stalled  |change| + error < tolerance
        |<--- window --->|

So a signal has stalled when the data show that it is flat, not when they merely fail to show a change: noise and single
spikes widen the error and delay a merge. A signal that really moves by the tolerance or more passes in about 1 window
of 40 (one side of two standard errors). Pure functions of the history; floats are summed exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mora_ds.common.errors import UserError

LEAST_WINDOW = 3
"""Fewest values for which a line has an error; from about 30 on two standard errors mean 95%."""

_STANDARD_ERRORS = 2.0

_SMALLEST_MEAN = 1e-200
"""Smallest mean to divide by: below it the squares of floats underflow."""


class StallSignal(str, Enum):
    """Values of --stall_signal."""

    LOSS = "loss"
    """The training loss of each step, over the global batch."""
    UPDATE = "update"
    """The joint norm of all MoRA matrices, which start a cycle at zero: how far the cycle has moved the model."""


DEFAULT_TOLERANCE = {StallSignal.LOSS: 0.01, StallSignal.UPDATE: 0.05}
"""The norm of a random walk, which training becomes once nothing more is learned, grows by 5% from step 2000 to 2200:
with the default window a cycle is then about as long as the MoRA paper's."""


@dataclass(frozen=True)
class Trend:
    """The straight line through a window, relative to the window's mean."""

    change: float
    """Change along the line from the first value to the last; negative where it falls."""
    error: float
    """Two standard errors of `change`; takes the noise of different steps as independent."""


def trend(values: Sequence[float]) -> Trend | None:
    """The least-squares line through `values`, finite numbers at equal distances.

    None where there are fewer than `LEAST_WINDOW` or their mean is about zero (matrices that have not moved yet).
    """
    count = len(values)
    mean = math.fsum(values) / count if count else 0.0
    if count < LEAST_WINDOW or abs(mean) < _SMALLEST_MEAN:
        return None
    places = [place - (count - 1) / 2 for place in range(count)]
    spread = count * (count * count - 1) / 12
    slope = math.fsum(place * value for place, value in zip(places, values, strict=True)) / spread
    rest = math.fsum((value - mean - slope * place) ** 2 for place, value in zip(places, values, strict=True))
    slope_error = math.sqrt(rest / (count - 2) / spread)
    over_window = (count - 1) / abs(mean)
    return Trend(slope * over_window, _STANDARD_ERRORS * slope_error * over_window)


@dataclass(frozen=True)
class StallRule:
    """The detector's settings. Raises `UserError` for those that make none."""

    signal: StallSignal
    window: int
    """Number of values, one a step at the full learning rate; a shorter history has not stalled."""
    tolerance: float
    """Largest change over the window that counts as flat, relative to the signal's mean."""

    def __post_init__(self) -> None:
        problems = []
        if self.window < LEAST_WINDOW:
            problems.append(f"--stall_window must be at least {LEAST_WINDOW}, got {self.window}")
        if not 0 < self.tolerance < math.inf:
            problems.append(f"--stall_tolerance must be above 0, got {self.tolerance}")
        if problems:
            raise UserError("\n".join(problems))

    def noted(self, history: Sequence[float], value: float) -> list[float]:
        """`history` with `value` appended, cut to what `judge` needs."""
        return [*history, value][-self.window :]

    def judge(self, history: Sequence[float]) -> Trend | None:
        """The trend of the newest `window` values at the full learning rate; None while there are fewer."""
        return trend(history[-self.window :]) if len(history) >= self.window else None

    def stalled(self, history: Sequence[float]) -> bool:
        line = self.judge(history)
        return line is not None and abs(line.change) + line.error < self.tolerance

    def facts(self, history: Sequence[float]) -> dict[str, Any]:
        """For metrics.jsonl: the newest value, and the trend if there is one."""
        line = self.judge(history)
        return {
            "signal": self.signal.value,
            "value": history[-1] if history else None,
            "values": len(history),
            "change": line.change if line else None,
            "error": line.error if line else None,
            "tolerance": self.tolerance,
        }

    def sentence(self, history: Sequence[float]) -> str:
        """As `facts`, in words."""
        line, name = self.judge(history), _NAMES[self.signal]
        if line is None:
            return f"{name} has {len(history)} of {self.window} values since the re-warmup"
        return (
            f"{name} moved by {line.change:+.2%} +- {line.error:.2%} over the last {self.window} steps, "
            f"--stall_tolerance is {self.tolerance:.2%}"
        )

    def complaint(self, history: Sequence[float]) -> str | None:
        """What to change where noise alone exceeds the tolerance, so that no stall can be detected; else None."""
        line = self.judge(history)
        if line is None or line.error < self.tolerance:
            return None
        needed = math.ceil(self.window * (line.error / self.tolerance) ** 2)
        return (
            f"{_NAMES[self.signal]} is too noisy to detect a stall: two standard errors over {self.window} steps "
            f"are {line.error:.2%}, --stall_tolerance is {self.tolerance:.2%}. A --stall_window of more than "
            f"{needed}, more sequences a step or a larger tolerance would do"
        )

    def __str__(self) -> str:
        return (
            f"{_NAMES[self.signal]} moves by less than {self.tolerance:.3g} of itself over {self.window} steps, "
            "two standard errors included"
        )


_NAMES = {StallSignal.LOSS: "the training loss", StallSignal.UPDATE: "the norm of the MoRA matrices"}
