"""Singular values of the deltas in a merge ledger, the record of all merged MoRA matrices M, cycle by cycle.

    one delta            `singular_values`: from its M, by algebra; no (O, D) matrix is decomposed
    a layer's history    `layer_spectra`: the sum of deltas after every cycle, and what the newest one adds to it

Shape legend:  D = d_in, O = d_out, R = r_hat.  A delta is left @ M @ right^T with left (O, R) and right (D, R) made of
zeros and ones (truncate, share), or M on every block of inputs (decouple, rotate). Hence

    truncate, share   members of a group share a row (column) of M: the delta's singular values are those of
                      diag(rows a group)^(1/2) M diag(columns a group)^(1/2), an (R, R) matrix
    decouple, rotate  blocks share no row or no column: the union over blocks of those of n^(1/2) M,
                      n being the number of blocks in which M is
    a sum of cycles   QR of all left factors side by side, and of all right ones: as long as the sides R add up to
                      less than min(O, D), a matrix of that size has the same singular values

The (O, D) matrix is formed only where D is no multiple of R or the sides exceed that, one layer at a time. LoRA's and
subspace deltas are computed from two thin QRs; their sums are formed. All in float64 from M in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mora_ds.adapters.ops.mora import OperatorSpec, compress, decompress, decompress_transpose, delta_weight
from mora_ds.adapters.ops.spec import Grouping, OperatorKind, SquareSpec, UpdateSpec

THRESHOLD = 0.1
"""The MoRA paper's figure 5 counts singular values above it."""

_FP32_EPS = torch.finfo(torch.float32).eps
_COLUMNS_AT_ONCE = 256
_CG_STEPS = 200
_CG_TOLERANCE = 1e-10

Update = tuple[UpdateSpec, Tensor]
"""(operator, M in fp32 (R, R)), or LoRA's spec and factors."""


@dataclass(frozen=True)
class Measures:
    """Summary of a matrix's singular values s_1 >= s_2 >= ...; all 0 for the zero matrix."""

    norm: float
    """Frobenius norm: the root of the sum of s_i^2."""
    largest: float
    """s_1."""
    above: int
    """How many exceed the threshold."""
    stable_rank: float
    """sum of s_i^2 / s_1^2."""
    effective_rank: float
    """exp of the entropy of s_i / sum of s_i (Roy & Vetterli 2007)."""
    rank: int
    """How many exceed s_1 * max(O, D) * eps of fp32, the precision in which M is stored."""
    top_1: float
    """Share of the energy (s_i^2) that s_1 holds."""
    top_10_percent: float
    """Share that the largest tenth (at least one) of all min(O, D) values holds."""


def measure(values: Tensor, longest_side: int, threshold: float = THRESHOLD) -> Measures:
    """The summary of `values`, all min(O, D) singular values, descending. `longest_side`: max(O, D)."""
    largest = values[0].item()
    if largest == 0.0:
        return Measures(0.0, 0.0, 0, 0.0, 0.0, 0, 0.0, 0.0)
    energy = (values / largest).square()
    shares = values / values.sum()
    tenth = math.ceil(len(values) / 10)
    return Measures(
        norm=values.norm().item(),
        largest=largest,
        above=int((values > threshold).sum()),
        stable_rank=energy.sum().item(),
        effective_rank=torch.special.entr(shares).sum().exp().item(),
        rank=int((values > largest * longest_side * _FP32_EPS).sum()),
        top_1=1.0 / energy.sum().item(),
        top_10_percent=(energy[:tenth].sum() / energy.sum()).item(),
    )


# -- one delta ---------------------------------------------------------------------------------------------------------


def singular_values(spec: UpdateSpec, square: Tensor) -> Tensor:
    """All min(O, D) singular values of delta_weight(spec, square), descending, float64, on its device."""
    if not isinstance(spec, OperatorSpec):
        return spec.singular_values(square)
    plain = replace(spec, grouping=Grouping.PLAIN, seed=0) if spec.grouping is Grouping.PERMUTED else spec
    square = square.double()  # permutations of rows and columns change no singular value
    if not spec.blockwise:
        values = torch.linalg.svdvals(_scaled_square(plain, square))
    elif spec.d_in % spec.r_hat == 0:
        values = _block_values(plain, square)
    else:
        values = _component_values(plain, square)
    size = min(spec.d_in, spec.d_out)
    values = values.sort(descending=True).values[:size]
    return torch.cat((values, values.new_zeros(size - len(values))))


def _scaled_square(spec: OperatorSpec, square: Tensor) -> Tensor:
    """Truncate, share: a matrix with the delta's singular values, (R, R), or (R, D) where inputs are in two groups.

    Each row is scaled by the number of its outputs."""
    rows = decompress_transpose(spec, square.new_ones(spec.d_out)).flatten()  # outputs a group
    if spec.kind is OperatorKind.SHARE and not spec.grouping.contiguous_in and spec.d_in % spec.r_hat:
        columns = delta_weight(replace(spec, d_out=spec.r_hat), square)  # one output a group
    else:
        columns = square * compress(spec, square.new_ones(spec.d_in)).sqrt()
    return rows.sqrt().unsqueeze(1) * columns


def _block_values(spec: OperatorSpec, square: Tensor) -> Tensor:
    """Decouple, rotate, D a multiple of R: rotating a block's inputs does not change M's singular values."""
    rows_out = torch.arange(spec.blocks_out * spec.r_hat, device=square.device)
    exists = (rows_out < spec.d_out).view(spec.blocks_out, spec.r_hat).double()  # the last block may have fewer rows
    pairs = torch.arange(max(spec.blocks_in, spec.blocks_out), device=square.device)
    blocks = min(spec.blocks_in, spec.blocks_out)
    counts = exists.new_zeros(blocks, spec.r_hat).index_add_(0, pairs % blocks, exists[pairs % spec.blocks_out])
    distinct, repeats = counts.unique(dim=0, return_counts=True)
    values = [torch.linalg.svdvals(rows.sqrt().unsqueeze(1) * square) for rows in distinct]
    return torch.cat([each.repeat(int(count)) for each, count in zip(values, repeats, strict=True)])


def _component_values(spec: OperatorSpec, square: Tensor) -> Tensor:
    """Decouple, rotate, D no multiple of R: the first and last block of inputs overlap, the others are separate."""
    delta, blocks = delta_weight(spec, square), min(spec.blocks_in, spec.blocks_out)
    rows, columns = (
        torch.arange(size, device=square.device) // spec.r_hat % blocks for size in (spec.d_out, spec.d_in)
    )
    for labels in (rows, columns):
        labels[labels == (spec.blocks_in - 1) % blocks] = 0
    values = [torch.linalg.svdvals(delta[rows == label][:, columns == label]) for label in rows.unique()]
    return torch.cat(values)


# -- a layer's history -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerSpectrum:
    """A layer after one cycle. `outside_*` are shares, 0 to 1, of the newest delta's energy (squared norm)."""

    newest: Measures
    """Summary of this cycle's delta alone."""
    cumulative: Measures
    """Summary of the sum of all deltas so far."""
    outside_span: float
    """The share outside the span of the earlier ones: what does not both read from the row space and write to the
    column space of their sum. 0 as soon as that sum has full rank (rotate and decouple: after one cycle)."""
    outside_reach: float
    """The share that the operators of the earlier cycles could not have expressed with any M."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def layer_spectra(updates: Sequence[Update], threshold: float = THRESHOLD) -> Iterator[LayerSpectrum]:
    """The spectrum after each of a layer's `updates`, in their order, computed on the device of the M."""
    frame = _Frame(updates)
    total: Tensor | None = None
    earlier: dict[UpdateSpec, None] = {}
    span: tuple[Tensor, Tensor] | None = None
    for position, (spec, square) in enumerate(updates):
        newest = frame.place(spec, square.double())
        outside = _outside_span(newest, span)
        reach = 0.0 if spec in earlier else _outside_reach(frame, newest, list(earlier))
        total = newest if total is None else total + newest
        values, span = _decompose(total, frame.longest_side, position < len(updates) - 1)
        earlier[spec] = None
        yield LayerSpectrum(
            newest=measure(singular_values(spec, square), frame.longest_side, threshold),
            cumulative=measure(frame.all_values(values), frame.longest_side, threshold),
            outside_span=outside,
            outside_reach=reach,
        )


def cumulative_norms(updates: Sequence[Update]) -> list[float]:
    """Frobenius norm of the sum of deltas after each of a layer's updates, without any decomposition."""
    frame = _Frame(updates)
    norms, total = [], None
    for spec, square in updates:
        newest = frame.place(spec, square.double())
        total = newest if total is None else total + newest
        norms.append(total.norm().item())
    return norms


class _Frame:
    """Coordinates for a layer's deltas, isometric to (O, D) matrices and small where the sides R are small.

    Small: with left factors side by side = Q S (QR) and right ones = Q' S', the matrix S_c M S'_c^T is the delta of
    cycle c in the bases Q and Q'. Otherwise the coordinates are the deltas themselves.
    """

    def __init__(self, updates: Sequence[Update]) -> None:
        specs = [spec for spec, _ in updates]
        slotted = (spec for spec in specs if isinstance(spec, OperatorSpec) and not spec.blockwise)
        self._specs = list(dict.fromkeys(slotted))
        self._shape = (specs[0].d_out, specs[0].d_in)
        self._sides: dict[UpdateSpec, tuple[Tensor, Tensor]] = {}
        self.longest_side = max(self._shape)
        small = len(self._specs) == len(set(specs)) and sum(spec.r_hat for spec in self._specs) < min(self._shape)
        if small:
            self._sides = self._small_sides(updates[0][1].device)

    def place(self, spec: UpdateSpec, square: Tensor) -> Tensor:
        """The delta of a float64 M in these coordinates."""
        if not self._sides:
            return spec.delta_weight(square)
        left, right = self._sides[spec]
        return left @ square @ right.T

    def lift(self, spec: SquareSpec, delta: Tensor) -> Tensor:
        """The adjoint of `place`."""
        if not self._sides:
            return spec.adjoint(delta)
        left, right = self._sides[spec]
        return left.T @ delta @ right

    def all_values(self, values: Tensor) -> Tensor:
        """The min(O, D) singular values of a delta whose coordinates have `values`: the others are zero."""
        return torch.cat((values, values.new_zeros(min(self._shape) - len(values))))

    def _small_sides(self, device: torch.device) -> dict[UpdateSpec, tuple[Tensor, Tensor]]:
        lefts, rights = zip(*(_factors(spec, device) for spec in self._specs), strict=True)
        widths = [spec.r_hat for spec in self._specs]
        left, right = (
            torch.linalg.qr(torch.cat(factors, dim=1), mode="r").R.split(widths, dim=1) for factors in (lefts, rights)
        )
        return dict(zip(self._specs, zip(left, right, strict=True), strict=True))


def _factors(spec: OperatorSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Truncate, share: left (O, R) and right (D, R) of delta_weight(M) = left @ M @ right^T, float64."""
    slots = torch.eye(spec.r_hat, dtype=torch.float64, device=device)
    chunks = torch.arange(spec.d_in, device=device).split(_COLUMNS_AT_ONCE)
    inputs = (torch.nn.functional.one_hot(chunk, spec.d_in).double() for chunk in chunks)
    return decompress(spec, slots.unsqueeze(-2)).T, torch.cat([compress(spec, chunk).squeeze(-2) for chunk in inputs])


def _decompose(total: Tensor, longest_side: int, vectors: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Singular values, and with `vectors` orthonormal bases of the column and row space, (O, rank) and (rank, D)."""
    if not vectors:
        return torch.linalg.svdvals(total), None
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    rank = int((values > values[0] * longest_side * _FP32_EPS).sum())
    return values, (left[:, :rank], right[:rank])


def _outside_span(newest: Tensor, span: tuple[Tensor, Tensor] | None) -> float:
    energy = newest.square().sum().item()
    if energy == 0.0:
        return 0.0
    if span is None:
        return 1.0
    inside = (span[0].T @ newest @ span[1].T).square().sum().item()
    return min(1.0, max(0.0, 1.0 - inside / energy))


def _outside_reach(frame: _Frame, newest: Tensor, earlier: Sequence[UpdateSpec]) -> float:
    """Share of the energy of `newest` that is left after the best fit by any M under the `earlier` operators.

    It is 0 after a LoRA cycle, whose factors can express any matrix of their rank. Least squares by conjugate gradients
    (CGLS; Hestenes & Stiefel 1952), which takes few steps, as permuted operators overlap little. An upper bound if
    `_CG_STEPS` do not suffice.
    """
    energy = newest.square().sum().item()
    if energy == 0.0 or not earlier:
        return float(energy > 0.0)
    operators = [spec for spec in earlier if isinstance(spec, SquareSpec)]
    if len(operators) < len(earlier):
        return 0.0
    residual = newest.clone()
    gradient = [frame.lift(spec, residual) for spec in operators]
    direction = gradient
    power = first = _energy(gradient)
    for _ in range(_CG_STEPS):
        if power <= _CG_TOLERANCE * min(first, energy):
            break
        step = sum(frame.place(spec, part) for spec, part in zip(operators, direction, strict=True))
        assert isinstance(step, Tensor)
        residual -= power / step.square().sum() * step
        gradient = [frame.lift(spec, residual) for spec in operators]
        power, before = _energy(gradient), power
        direction = [new + power / before * old for new, old in zip(gradient, direction, strict=True)]
    return min(1.0, residual.square().sum().item() / energy)


def _energy(squares: Sequence[Tensor]) -> float:
    return sum(square.square().sum().item() for square in squares)
