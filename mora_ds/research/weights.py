"""Singular values and ranks of a model's frozen weights, layer by layer.

    BaseCheckpoint -> one weight at a time, mapped -> its singular values -> a few numbers

Of singular values s_1 >= s_2 >= ... of a weight, with its energy |W|_F^2 = sum of s_i^2:

    stable rank      |W|_F^2 / s_1^2
    effective rank   exp(-sum of p_i log p_i), p_i = s_i^2 / |W|_F^2: the entropy of the shares of energy

Where the shorter side is at most `EXACT_UP_TO`, all singular values are computed (`torch.linalg.svdvals`, float64).
Beyond it the leading `LEADING` are computed (`torch.svd_lowrank`, fp32: randomised subspace iteration; Halko et al.
2011). The remaining energy is known from the norm; its values are assumed to fall from the last leading one to zero as
(1 - t)^a, t from 0 to 1. The effective rank is then an estimate, and `is_estimated` says so. Measured errors at
1536 x 1536: 1% for a Gaussian weight, 8% for one whose values fall as i^(-1/2).
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mora_ds.common.errors import RunError
from mora_ds.models.base import BaseCheckpoint

EXACT_UP_TO = 1024
"""Shorter side up to which all singular values are computed: about a second of one core."""

LEADING = 192
"""How many singular values are computed of a larger weight."""

_OVERSAMPLING = 64
"""How many more are computed and dropped, because the last ones are too small."""

_ITERATIONS = 4
"""Steps of subspace iteration: the leading values of a flat spectrum are then accurate to about 1%."""


@dataclass(frozen=True)
class Weight:
    """A linear layer's weight in the files of a model."""

    key: str
    d_in: int
    d_out: int


@dataclass(frozen=True)
class WeightMeasures:
    """The singular values of a layer's weight in a few numbers."""

    module: str
    d_in: int
    d_out: int
    is_estimated: bool
    """Whether the effective rank is an estimate; norm and stable rank never are."""
    norm: float
    """Frobenius norm."""
    largest: float
    """s_1."""
    stable_rank: float
    effective_rank: float

    @property
    def score(self) -> float:
        """Effective rank / shorter side, 0 to 1: the share of its directions that the layer uses."""
        return self.effective_rank / min(self.d_in, self.d_out)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "score": self.score}


def analyse(base: BaseCheckpoint, weights: Mapping[str, Weight], device: str = "cpu") -> Iterator[WeightMeasures]:
    """The measures of each layer (module name -> weight); one weight is in memory at a time.

    The same on every call with the same device and build of torch. Raises `RunError` naming a weight that is not
    finite.
    """
    for module, weight in weights.items():
        yield measure_weight(module, weight, base.read(weight.key).detach().to(device))


@torch.no_grad()
def measure_weight(module: str, weight: Weight, values: Tensor) -> WeightMeasures:
    """The measures of one weight, (d_out, d_in) or transposed, which has the same singular values."""
    shorter_side = min(values.shape)
    norm = torch.linalg.vector_norm(values.float(), dtype=torch.float64).item()
    if not math.isfinite(norm):
        raise RunError(f"{module}.weight is not finite")
    is_exact = shorter_side <= max(EXACT_UP_TO, LEADING + _OVERSAMPLING)
    singular = torch.linalg.svdvals(values.double()) if is_exact else _leading(values.float(), module)
    largest = singular[0].item()
    stable_rank = effective_rank = 0.0
    if largest:
        shares = _shares_of_energy(singular.double().cpu(), norm, shorter_side)
        stable_rank = (norm / largest) ** 2
        effective_rank = torch.special.entr(shares).sum().exp().item()
    return WeightMeasures(
        module, weight.d_in, weight.d_out, not is_exact, norm, largest, stable_rank, effective_rank
    )  # fmt: skip


def _leading(values: Tensor, module: str) -> Tensor:
    """(LEADING,) singular values. The start is drawn from the layer's name; the caller's random state is unchanged."""
    devices = [values.device] if values.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "little"))
        return torch.svd_lowrank(values, q=LEADING + _OVERSAMPLING, niter=_ITERATIONS)[1][:LEADING]


def _shares_of_energy(singular: Tensor, norm: float, count: int) -> Tensor:
    """(count,) shares, descending; those of values that are not in `singular` fall by a power law."""
    shares = (singular / norm).square()
    missing = count - len(shares)
    if missing == 0:
        return shares / shares.sum()
    energy_left = max(0.0, 1.0 - shares.sum().item())
    last = shares[-1].item()
    power = max(0.0, last * missing / energy_left - 1) if energy_left else 0.0  # the mean of (1 - t)^a is 1 / (a + 1)
    tail = (1 - (torch.arange(missing, dtype=shares.dtype) + 0.5) / missing) ** power
    return torch.cat((shares, tail * (energy_left / tail.sum())))
