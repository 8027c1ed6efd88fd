"""Measure the ranks of a model's weights, and plan which layers to adapt under a
budget.

Of singular values s_1 >= s_2 >= ... of a weight, with its energy |W|^2 = sum of s_i^2:

    effective rank   exp(-sum of p_i log p_i), p_i = s_i^2 / |W|^2: the entropy of the shares of energy

A plan divides the budget in proportion to how much of its rank a weight uses:

    score     of a layer: effective rank / shorter side
    r_hat^2   = factor * score * (d_in + d_out)      MoRA's own size, r_hat^2 = rank * (d_in + d_out), with a rank in
                                                     proportion to the score; the factor uses the budget up

A layer gets a matrix if its rank factor * score is 1 or more, so that a small budget
goes to the layers of the highest scores.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mora_ds.adapters.inject import count_parameters
from mora_ds.adapters.layer import ExpertStack
from mora_ds.adapters.ops.spec import R_HAT_MULTIPLE, round_side
from mora_ds.adapters.target_modules import match_targets
from mora_ds.common.errors import RunError, UserError
from mora_ds.models.base import BaseCheckpoint, map_model
from mora_ds.models.load import folder_config
from mora_ds.planning.step import Work, planned_model
from mora_ds.runtime.cli import table

_EVEN = 2
"""Every side is a multiple of it, as rotate needs."""


def layers_of(
    base: BaseCheckpoint, patterns: Sequence[str], trust_remote_code: bool = False
) -> tuple[dict[str, str], int]:
    """({layer: key of its weight}, parameters of the complete model) of a Hugging Face
    folder; no weight is read. `patterns`: --target_modules. Raises `UserError` where
    the files do not hold the model's weights one to one."""
    config = folder_config(base.folder, trust_remote_code, "MODEL")
    work = Work(config, None, seq_len=1, trust_remote_code=trust_remote_code)
    model = planned_model(work)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    keys = map_model(base, model, names)
    layers = match_targets(model, tuple(patterns))
    for name, module in layers.items():
        if isinstance(module, ExpertStack):
            raise UserError(
                f"--target_modules includes {name}, experts, whose ranks no plan chooses: leave them out"
            )
    return {name: keys[f"{name}.weight"] for name in layers}, count_parameters(model)


# -- a weight --------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightMeasures:
    """How many directions a layer's weight uses."""

    layer: str
    shape: tuple[int, ...]
    """Its sides, (d_out, d_in) or transposed."""
    effective_rank: float

    @property
    def score(self) -> float:
        """Effective rank / shorter side: the share of its directions that the layer
        uses."""
        return self.effective_rank / min(self.shape)

    def side(self, factor: float) -> int:
        """The side of the layer's matrix by the rule with this factor; 0 for a rank
        below 1."""
        rank = factor * self.score
        if rank < 1:
            return 0
        largest = max(self.shape)
        side = math.isqrt(int(min(rank, largest) * sum(self.shape)))
        return round_side(min(side, largest), R_HAT_MULTIPLE, _EVEN)


@torch.no_grad()
def measure(layer: str, weight: Tensor) -> WeightMeasures:
    """The measures of one weight, (d_out, d_in) or transposed, which has the same
    singular values. Raises `RunError` for one that is not finite."""
    if not weight.isfinite().all():
        raise RunError(f"{layer}.weight is not finite")
    matrix = weight.double()
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    # The eigenvalues of W W^T are the energies s_i^2. Squaring loses those of tiny
    # values, which count for nothing here, and takes a fraction of the time of a
    # singular value decomposition.
    energies = torch.linalg.eigvalsh(matrix @ matrix.T).clamp(min=0)
    energy = energies.sum().item()
    effective_rank = 0.0
    if energy:
        effective_rank = torch.special.entr(energies / energy).sum().exp().item()
    return WeightMeasures(layer, tuple(weight.shape), effective_rank)


def report_lines(weights: Sequence[WeightMeasures]) -> list[str]:
    """A table of every layer."""
    rows = [["layer", "shape", "effective rank", "of full"]]
    for measures in weights:
        shape = " x ".join(map(str, measures.shape))
        rows.append(
            [
                measures.layer,
                shape,
                f"{measures.effective_rank:.1f}",
                f"{measures.score:.1%}",
            ]
        )
    legend = "effective rank: exp of the entropy of s_i^2 / |W|^2, and as a share of the shorter side"
    return [*table(rows), legend]


# -- the budget ------------------------------------------------------------------------


def parse_budget(text: str, parameters: int) -> int:
    """The number of parameters that "0.5%" (of the model's `parameters`) or "250000"
    stands for. Raises `UserError` where it is no budget."""
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"--trainable_budget must be like 0.5% or 250000, got {text!r}")
    return int(number * parameters / 100 if text.endswith("%") else number)


def spend(weights: Sequence[WeightMeasures], budget: int) -> dict[str, int]:
    """Layer -> side (0: no matrix), in the order of `weights`; the sum of squares is at
    most the budget. Raises `UserError` for a budget that is too small for one
    matrix."""

    def cost(factor: float) -> int:
        return sum(measures.side(factor) ** 2 for measures in weights)

    # Bisection: the cost never falls as the factor grows.
    low = 0.0
    high = 1.0
    while cost(high) <= budget and high < 1e12:
        low = high
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if cost(middle) <= budget:
            low = middle
        else:
            high = middle
    sides = {measures.layer: measures.side(low) for measures in weights}
    if not any(sides.values()):
        raise UserError(
            f"--trainable_budget: {budget:,} parameters are too few for one MoRA matrix"
        )
    return sides
