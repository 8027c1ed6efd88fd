"""What a merge does to the optimizer's state of the MoRA matrices: rules that change one flat tensor of it in place.
Adam has two moments and a step count, Muon one moment, the momentum."""

from __future__ import annotations

from enum import Enum

from torch import Tensor


class OptimizerReset(str, Enum):
    """Values of --optimizer_reset: what a merge does to the optimizer's state."""

    ZERO = "zero"
    KEEP = "keep"


def zero(key: str, value: Tensor) -> None:
    """Sets moments and step count to zero: with the old count the first update would be 2.94 times too large."""
    del key
    value.zero_()


def keep(key: str, value: Tensor) -> None:
    """Changes nothing."""


RULES = {OptimizerReset.ZERO: zero, OptimizerReset.KEEP: keep}
