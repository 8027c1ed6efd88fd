"""What a merge does to the optimizer's state of the MoRA matrices: rules that change one flat tensor of it in place.
Adam has two moments and a step count, Muon one moment, the momentum.

    zero        moments and step count to zero (ReMoRA's default)
    magnitude   the smallest 90% of each moment to zero, by absolute value        the two of ReLoRA
    random      a random 99% of each moment to zero                               (arXiv 2307.05695, section 3)
    keep        no change

All except `zero` keep the step count, as ReLoRA does.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor

from mora_ds.adapters.ops.spec import permutation_seed

MAGNITUDE_PRUNED = 0.9
RANDOM_PRUNED = 0.99
STEP = "step"
"""Key of Adam's step count; every other tensor of the state is a moment."""

StateReset = Callable[[str, Tensor], None]
"""Changes one tensor of optimizer state (key, flat partition) in place."""


class OptimizerReset(str, Enum):
    """Values of --optimizer_reset: what a merge does to the optimizer's state."""

    ZERO = "zero"
    MAGNITUDE = "magnitude"
    RANDOM = "random"
    KEEP = "keep"


def rule(reset: OptimizerReset, run_seed: int, rank: int, cycle: int) -> StateReset:
    """The rule for one merge. The random one depends on its arguments alone, so a resumed run repeats it."""
    if reset is OptimizerReset.ZERO:
        return zero
    if reset is OptimizerReset.KEEP:
        return lambda key, value: None
    if reset is OptimizerReset.MAGNITUDE:
        return prune_magnitude
    generator = torch.Generator().manual_seed(permutation_seed(run_seed, f"reset/{rank}", cycle))
    return lambda key, value: prune_randomly(key, value, generator)


def zero(key: str, value: Tensor) -> None:
    """Sets moments and step count to zero: with the old count the first update would be 2.94 times too large."""
    del key
    value.zero_()


def prune_magnitude(key: str, value: Tensor) -> None:
    """Sets all but the largest tenth of a moment to zero."""
    if key == STEP:
        return
    kept = max(1, round(value.numel() * (1.0 - MAGNITUDE_PRUNED)))
    chosen = value.abs().flatten().topk(kept).indices
    values = value.flatten()[chosen]
    value.zero_()
    value.view(-1)[chosen] = values


def prune_randomly(key: str, value: Tensor, generator: torch.Generator) -> None:
    """Sets all but a random hundredth of a moment to zero."""
    if key == STEP:
        return
    kept = torch.rand(value.shape, generator=generator) >= RANDOM_PRUNED
    value.mul_(kept.to(value.device))
