"""What fixes an operator: its kind, shape, grouping and seed. The ledger stores it beside each square."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from mora_ds.errors import UserError, nearest

ROTATE_BELOW_RANK = 64
"""Below this LoRA-equivalent rank `default_kind` rotates, from it on it shares (paper: rotate at 8, share at 256)."""


class OperatorKind(str, Enum):
    """The four families of compress / decompress pairs of the paper."""

    TRUNCATE = "truncate"
    SHARE = "share"
    DECOUPLE = "decouple"
    ROTATE = "rotate"


class Grouping(str, Enum):
    """Which inputs (outputs) meet in one slot. PLAIN and PERMUTED fit every kind; the others only `share`."""

    PLAIN = "plain"
    PERMUTED = "permuted"
    STRIDED = "strided"
    CONTIGUOUS = "contiguous"
    CONTIGUOUS_STRIDED = "contiguous-strided"
    STRIDED_CONTIGUOUS = "strided-contiguous"

    @property
    def contiguous_in(self) -> bool:
        return self in (Grouping.CONTIGUOUS, Grouping.CONTIGUOUS_STRIDED)

    @property
    def contiguous_out(self) -> bool:
        return self in (Grouping.CONTIGUOUS, Grouping.STRIDED_CONTIGUOUS)


@dataclass(frozen=True)
class OperatorSpec:
    """Everything that fixes an operator: the ledger stores it beside each square.

    Raises `UserError` for sizes or groupings that make no operator.
    """

    kind: OperatorKind
    d_in: int
    d_out: int
    r_hat: int
    grouping: Grouping = Grouping.PLAIN
    seed: int = 0
    """Seed of the permutations; read only when `grouping` is PERMUTED."""
    in_segments: int = 1
    """Cut the inputs and the columns of M into so many runs; an input meets columns of its own run only. For share."""
    out_segments: int = 1
    """The same of the outputs and the rows of M."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", _member(OperatorKind, self.kind, "operator"))
        object.__setattr__(self, "grouping", _member(Grouping, self.grouping, "grouping"))
        if min(self.d_in, self.d_out, self.r_hat) < 1:
            raise UserError(f"an operator needs positive sizes, got {self}")
        if self.kind is OperatorKind.ROTATE and self.r_hat % 2:
            raise UserError(f"rotate pairs dimensions, so r_hat must be even, got {self.r_hat}")
        if self.kind is not OperatorKind.SHARE and self.grouping not in (Grouping.PLAIN, Grouping.PERMUTED):
            raise UserError(f"grouping {self.grouping.value!r} belongs to operator 'share', not {self.kind.value!r}")
        segments = max(self.in_segments, self.out_segments)
        if min(self.in_segments, self.out_segments) < 1 or (segments > 1 and self.kind is not OperatorKind.SHARE):
            raise UserError(f"segments belong to operator 'share', and are at least 1, got {self}")
        if segments > self.r_hat:
            raise UserError(f"{segments} segments need a square of that side at least, got {self.r_hat}")

    @property
    def blocks_in(self) -> int:
        return math.ceil(self.d_in / self.r_hat)

    @property
    def blocks_out(self) -> int:
        return math.ceil(self.d_out / self.r_hat)

    @property
    def blockwise(self) -> bool:
        """Whether M is applied to each of several blocks (decouple, rotate) instead of once."""
        return self.kind in (OperatorKind.DECOUPLE, OperatorKind.ROTATE)

    def to_dict(self) -> dict[str, Any]:
        """Without segments where there are none, as before there were any."""
        values = {**asdict(self), "kind": self.kind.value, "grouping": self.grouping.value}
        return {key: value for key, value in values.items() if not (key.endswith("_segments") and value == 1)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OperatorSpec:
        return cls(**values)


def _member(enum: type[Enum], value: Any, what: str) -> Any:
    try:
        return enum(value)
    except ValueError:
        known = [member.value for member in enum]
        raise UserError(f"unknown {what} {value!r}; known: {', '.join(known)}.{nearest(str(value), known)}") from None


def default_kind(rank: int) -> OperatorKind:
    """The operator for a LoRA-equivalent `rank` when none is named: rotate for small ranks, share for large ones."""
    return OperatorKind.ROTATE if rank < ROTATE_BELOW_RANK else OperatorKind.SHARE


def square_size(d_in: int, d_out: int, rank: int, kind: OperatorKind) -> int:
    """r_hat = floor(sqrt((d_in + d_out) * rank)): a square of a rank-`rank` LoRA's parameters (paper, section 3).

    Rounded down to even for rotate. Raises `UserError` where the rank is too small for any square.
    """
    if rank < 1:
        raise UserError(f"--mora_rank must be at least 1, got {rank}")
    r_hat = math.isqrt((d_in + d_out) * rank)
    return r_hat - r_hat % 2 if kind is OperatorKind.ROTATE else r_hat


def permutation_seed(run_seed: int, layer: str, cycle: int) -> int:
    """The seed of a layer's permutations in a cycle: a hash, so that it never depends on the order of layers."""
    digest = hashlib.sha256(f"{run_seed}/{layer}/{cycle}".encode()).digest()
    return int.from_bytes(digest[:4], "little")
