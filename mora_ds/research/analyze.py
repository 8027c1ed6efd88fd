"""Measure the ranks of a model's weights or the gradients of their MoRA matrices, and
plan which layers to adapt for a budget.

For the singular values s_1 >= s_2 >= ... of a weight, with energy |W|^2 = sum of s_i^2:

    effective rank   exp(-sum of p_i log p_i), p_i = s_i^2 / |W|^2

For a few batches of text (--probe), with MoRA matrices of zeros:

    gradient         |dL/dM|, root mean square over batches; L: the mean loss of a batch's tokens

A plan divides the budget by how much of its rank each weight uses, or by the gradient:

    score     of a layer: effective rank / shorter side, or |dL/dM| / r_hat
    r_hat^2   = factor * score * (d_in + d_out)      MoRA's size r_hat^2 = rank * (d_in + d_out), with a rank
                                                     proportional to the score; the factor is the largest that fits

A layer gets a matrix if its rank, factor * score, is at least 1, so a small budget goes
to the layers with the highest scores.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import count_parameters, inject
from mora_ds.adapters.layer import ExpertStack, mora_layers
from mora_ds.adapters.ops.spec import R_HAT_MULTIPLE, round_side
from mora_ds.adapters.target_modules import match_targets
from mora_ds.common.errors import RunError, UserError
from mora_ds.models.base import BaseCheckpoint, map_model
from mora_ds.models.load import folder_config
from mora_ds.planning.step import Work, planned_model
from mora_ds.runtime.cli import table

_EVEN = 2
"""Matrix sizes are multiples of this, as the operator rotate requires."""


def layers_of(
    base: BaseCheckpoint, patterns: Sequence[str], trust_remote_code: bool = False
) -> tuple[dict[str, str], int]:
    """({layer: key of its weight}, number of parameters of the model) of a Hugging Face
    folder. Reads no weights. `patterns`: --target_modules. Raises `UserError` if the
    files do not match the model's weights one to one."""
    config = folder_config(base.folder, trust_remote_code, "MODEL")
    work = Work(config, None, seq_len=1, trust_remote_code=trust_remote_code)
    model = planned_model(work)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    keys = map_model(base, model, names)
    layers = match_targets(model, tuple(patterns))
    for name, module in layers.items():
        if isinstance(module, ExpertStack):
            raise UserError(
                f"--target_modules includes {name}: plans do not support experts, leave them out"
            )
    return {name: keys[f"{name}.weight"] for name in layers}, count_parameters(model)


# -- weights ---------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerMeasures:
    """What a plan needs of a layer."""

    layer: str
    shape: tuple[int, ...]
    """(d_out, d_in) or transposed."""

    @property
    def score(self) -> float:
        """The layer's rank in a plan is proportional to it."""
        raise NotImplementedError

    def side(self, factor: float) -> int:
        """The side of the layer's MoRA matrix for this factor; 0 for a rank below 1."""
        rank = factor * self.score
        if rank < 1:
            return 0
        largest = max(self.shape)
        side = math.isqrt(int(min(rank, largest) * sum(self.shape)))
        return round_side(min(side, largest), R_HAT_MULTIPLE, _EVEN)


@dataclass(frozen=True)
class WeightMeasures(LayerMeasures):
    """The effective rank of a layer's weight."""

    effective_rank: float

    @property
    def score(self) -> float:
        """Effective rank / shorter side: the fraction of its directions that the layer
        uses."""
        return self.effective_rank / min(self.shape)


@torch.no_grad()
def measure(layer: str, weight: Tensor) -> WeightMeasures:
    """Measure a weight (d_out, d_in) or its transpose. Raises `RunError` for a weight
    that is not finite."""
    if not weight.isfinite().all():
        raise RunError(f"{layer}.weight is not finite")
    matrix = weight.double()
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    # The eigenvalues of W W^T are the energies s_i^2. They are inaccurate for tiny s_i,
    # which are negligible here, and much faster than a singular value decomposition.
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
    legend = "effective rank: exp of the entropy of s_i^2 / |W|^2; of full: divided by the shorter side"
    return [*table(rows), legend]


# -- gradients -------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientMeasures(LayerMeasures):
    """The gradient of a layer's MoRA matrix."""

    r_hat: int
    norm: float
    """|dL/dM| at M = 0."""

    @property
    def score(self) -> float:
        """Root mean square of the entries of dL/dM: to first order, how much the loss
        falls for each parameter that Adam changes by one unit."""
        return self.norm / self.r_hat


def probe(
    model: Any, config: MoRAConfig, batches: Sequence[Tensor]
) -> list[GradientMeasures]:
    """The measures of every layer that `config` adapts, in the model's order.

    `model`: of transformers; afterwards it has MoRA matrices of zeros. `batches`: token
    ids (1, T) each. Raises `UserError` where there is nothing to predict, and `RunError`
    for a gradient that is not finite.
    """
    batches = [ids.to(model.device) for ids in batches if ids.shape[1] > 1]
    if not batches:
        raise UserError("--probe: there are fewer than two tokens in it")
    inject(model, config)
    # Without dropout
    model.eval()
    layers = mora_layers(model)
    energies = dict.fromkeys(layers, 0.0)
    for ids in batches:
        logits = model(input_ids=ids, use_cache=False).logits
        F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()
        for name, layer in layers.items():
            gradient = layer.adapter_weight.grad
            # None where no token has reached the layer
            if gradient is not None:
                energies[name] += gradient.double().square().sum().item()
        model.zero_grad(set_to_none=True)
    measures = []
    for name, layer in layers.items():
        norm = math.sqrt(energies[name] / len(batches))
        if not math.isfinite(norm):
            raise RunError(f"{name}: its gradient is not finite")
        measures.append(GradientMeasures(name, layer.shape, layer.spec.size, norm))
    return measures


def probe_lines(measures: Sequence[GradientMeasures]) -> list[str]:
    """A table of every layer."""
    rows = [["layer", "r_hat", "|dL/dM|"]]
    for layer in measures:
        rows.append([layer.layer, str(layer.r_hat), f"{layer.norm:.3e}"])
    return table(rows)


# -- the budget ------------------------------------------------------------------------


def parse_budget(text: str, parameters: int) -> int:
    """A budget such as "0.5%" (of the model's `parameters`) or "250000" as a number of
    parameters. Raises `UserError` for an invalid budget."""
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"--trainable_budget must be like 0.5% or 250000, got {text!r}")
    return int(number * parameters / 100 if text.endswith("%") else number)


def allocate_budget(layers: Sequence[LayerMeasures], budget: int) -> dict[str, int]:
    """Layer -> side (0: no matrix), in the order of `layers`. The number of parameters,
    sum of side^2, is at most the budget. Raises `UserError` for a budget that is too
    small for one matrix."""

    def cost(factor: float) -> int:
        return sum(measures.side(factor) ** 2 for measures in layers)

    # Bisection: the cost is monotonic in the factor.
    low = 0.0
    high = 1.0
    while cost(high) <= budget and high < 1e30:
        low = high
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if cost(middle) <= budget:
            low = middle
        else:
            high = middle
    sides = {measures.layer: measures.side(low) for measures in layers}
    if not any(sides.values()):
        raise UserError(
            f"--trainable_budget: {budget:,} parameters are too few for one MoRA matrix"
        )
    return sides
