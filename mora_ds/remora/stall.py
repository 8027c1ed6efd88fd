"""When a cycle has given what it can: a straight line through the newest values of one number.

    values (one a step at full rate)        change   what the line moves over the window   }  as shares of
      .                                     error    two standard errors of that           }  the window's mean
        . ' .
      ------.--.-'-.--.---   least squares  stalled  |change| + error < tolerance
        |<--- window --->|

So a signal has stalled when the data say that it is flat, not when they only fail to say that it moves: noise and
single spikes widen the error and put a merge off. A signal that truly moves by the tolerance or more passes in about 1
window of 40 (one side of two standard errors). Pure functions of the history, in floats that are summed exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mora_ds.errors import UserError

LEAST_WINDOW = 3
"""Below this no line has an error. From about 30 values on two standard errors mean what they say."""

_STANDARD_ERRORS = 2.0

_NOTHING = 1e-200
"""Below it squares of floats are zeros: no mean that one could take a share of."""


class StallSignal(str, Enum):
    """What is watched."""

    LOSS = "loss"
    """The training loss of each step, over the global batch."""
    UPDATE = "update"
    """The norm of all squares together, which start a cycle at zero: how far the cycle has moved the model."""


DEFAULT_TOLERANCE = {StallSignal.LOSS: 0.01, StallSignal.UPDATE: 0.05}
"""The norm of a random walk, which is what remains of training once nothing more is learned, grows by 5% over 200 steps
after 2000: with the default window a cycle is then about as long as the MoRA paper's."""


@dataclass(frozen=True)
class Trend:
    """A window's straight line, in shares of the window's mean."""

    change: float
    """From the first value to the last, along the line; negative where it falls."""
    error: float
    """Two standard errors of `change`; takes the noise of different steps as independent."""


def trend(values: Sequence[float]) -> Trend | None:
    """The least-squares line through `values`, finite numbers at equal distances.

    None where there are fewer than `LEAST_WINDOW` or their mean is next to nothing (squares that have not moved yet).
    """
    count = len(values)
    mean = math.fsum(values) / count if count else 0.0
    if count < LEAST_WINDOW or abs(mean) < _NOTHING:
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
    """Values, one a step at full rate; a shorter history has not stalled."""
    tolerance: float
    """Share of the signal's mean by which it may still move over the window."""

    def __post_init__(self) -> None:
        problems = []
        if self.window < LEAST_WINDOW:
            problems.append(f"--stall_window must be at least {LEAST_WINDOW}, got {self.window}")
        if not 0 < self.tolerance < math.inf:
            problems.append(f"--stall_tolerance must be above 0, got {self.tolerance}")
        if problems:
            raise UserError("\n".join(problems))

    def noted(self, history: Sequence[float], value: float) -> list[float]:
        """`history` with `value` behind it, as much of it as `judge` needs."""
        return [*history, value][-self.window :]

    def judge(self, history: Sequence[float]) -> Trend | None:
        """The trend of the newest `window` values since the cycle came to its full rate; None while there are fewer."""
        return trend(history[-self.window :]) if len(history) >= self.window else None

    def stalled(self, history: Sequence[float]) -> bool:
        found = self.judge(history)
        return found is not None and abs(found.change) + found.error < self.tolerance

    def facts(self, history: Sequence[float]) -> dict[str, Any]:
        """For a log: the newest value, and the trend where there is one."""
        found = self.judge(history)
        return {
            "signal": self.signal.value,
            "value": history[-1] if history else None,
            "values": len(history),
            "change": found.change if found else None,
            "error": found.error if found else None,
            "tolerance": self.tolerance,
        }

    def sentence(self, history: Sequence[float]) -> str:
        """The same for a reader."""
        found, name = self.judge(history), _NAMES[self.signal]
        if found is None:
            return f"{name} has {len(history)} of {self.window} values since the ramp"
        return (
            f"{name} moved by {found.change:+.2%} +- {found.error:.2%} over the last {self.window} steps, "
            f"--stall_tolerance is {self.tolerance:.2%}"
        )

    def complaint(self, history: Sequence[float]) -> str | None:
        """What to change where noise alone is wider than the tolerance, so that no stall can be seen; else None."""
        found = self.judge(history)
        if found is None or found.error < self.tolerance:
            return None
        needed = math.ceil(self.window * (found.error / self.tolerance) ** 2)
        return (
            f"{_NAMES[self.signal]} is too noisy for a stall to be seen: two standard errors over {self.window} steps "
            f"are {found.error:.2%}, --stall_tolerance is {self.tolerance:.2%}. A --stall_window of more than "
            f"{needed}, more sequences a step or a larger tolerance would do"
        )

    def __str__(self) -> str:
        return (
            f"{_NAMES[self.signal]} moves by less than {self.tolerance:.3g} of itself over {self.window} steps, "
            "two standard errors included"
        )


_NAMES = {StallSignal.LOSS: "the training loss", StallSignal.UPDATE: "the norm of the squares"}
