"""What an adapter is: a frozen dataclass, validated when made, and what each layer gets in each cycle.

AdapterConfig          what all adapters share: rank, targets, dropout, what is trained beside them
  MoRAConfig           squares
  LoRAConfig           the control: LoRA's factors; merged at intervals it is ReLoRA
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from typing import Any, ClassVar, TypeVar

from mora_ds.adapters.ops.linear import Compute
from mora_ds.adapters.ops.lora import LORA, LoRASpec
from mora_ds.adapters.ops.mora import Grouping, OperatorKind, OperatorSpec, default_kind, permutation_seed, square_size
from mora_ds.adapters.ops.subspace import SUBSPACE, SubspaceSpec
from mora_ds.adapters.ops.update import Side, SquareSpec, UpdateSpec
from mora_ds.errors import UserError, nearest

SHARED = "shared"
"""Stands for the shared square alone where a domain is named, so that no domain may be called that."""


class Freeze(str, Enum):
    """Which squares of a run with domains are kept as they are."""

    NONE = "none"
    SHARED = "shared"
    DOMAINS = "domains"


def check_domains(domains: Sequence[str], freeze: str) -> None:
    """Raises `UserError` for names that are not one a domain, and for what is not to be frozen."""
    if len(set(domains)) < len(domains) or SHARED in domains:
        raise UserError(
            f"--domain_adapters: each domain needs a name of its own, and {SHARED!r} is the shared square's; "
            f"got {', '.join(domains)}"
        )
    if unfit := {".", ".."} & set(domains):
        raise UserError(f"--domain_adapters: {min(unfit)!r} is no name of a domain: each has its model's folder")
    kinds = [kind.value for kind in Freeze]
    if freeze not in kinds:
        raise UserError(f"unknown --freeze {freeze!r}; known: {', '.join(kinds)}.{nearest(freeze, kinds)}")
    if freeze != Freeze.NONE.value and not domains:
        raise UserError(f"--freeze {freeze} is for --domain_adapters")


ALTERNATE = "alternate"
"""Grouping policy of the paper's ReMoRA: strided in even cycles, contiguous in odd ones (share only)."""

ALL_LINEAR = "all-linear"
"""Target that stands for every linear layer but the output head."""

AS_LOADED = 16
"""`base_bits` of a base that is held in the run's dtype, whatever that is."""

INCREMENTAL_IN_8_BITS = (
    "--base_bits 8: --merge_precision incremental would round to 8 bits again at every merge; leave it at exact"
)

SPLIT_IN_8_BITS = "--base_bits 8 holds whole weights, which --tensor_parallel_size {} would split: leave one out"

MORA = "mora"

Config = TypeVar("Config", bound="AdapterConfig")


@dataclass(frozen=True)
class AdapterConfig:
    """Which layers are adapted, and what else is trained. Make one of its subclasses.

    Raises `UserError` when a value makes no adapter; the message names the flag.
    """

    adapter: ClassVar[str]
    """Value of --adapter."""
    rank_flag: ClassVar[str] = "--mora_rank"

    rank: int = 8
    """LoRA rank whose parameter count each layer's adapter has."""

    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    """Names (`q_proj`), globs (`*.mlp.*`), regular expressions (`re:.*layers\\.[0-3]\\..*`) or `all-linear`."""

    dropout: float = 0.0
    """Dropout on the adapter's input while training, in [0, 1)."""

    train_embeddings: bool = False
    train_norms: bool = False
    train_head: bool = False
    new_rows_from: int = 0
    """Train the rows of embeddings and head from this one on, and keep those before it frozen; 0: do not."""
    base_bits: int = AS_LOADED
    """8: the weights of adapted layers are frozen in 8 bits (`eight_bits`); 16: in the dtype they are loaded in."""
    seed: int = 42
    """Seed of what is drawn in each cycle (permutations, LoRA's A), hashed with the layer's name and the cycle."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if self.rank < 1:
            raise UserError(f"{self.rank_flag} must be at least 1, got {self.rank}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"--mora_dropout must be in [0, 1), got {self.dropout}")
        if not self.target_modules:
            raise UserError("--target_modules names no module")
        if self.base_bits not in (8, AS_LOADED):
            raise UserError(f"--base_bits must be 8, or {AS_LOADED} for the base as it is loaded, got {self.base_bits}")

    @property
    def title(self) -> str:
        """What a report calls it."""
        raise NotImplementedError

    def operator_for(self, layer: str, d_in: int, d_out: int, cycle: int, aligned: Side | None = None) -> UpdateSpec:
        """What a layer's value means in a cycle (0 until the first merge): a pure function of its arguments.

        `aligned`: the side on which a grouping in segments is confined, if the layer has one."""
        raise NotImplementedError

    def asked_for(self, d_in: int, d_out: int) -> int:
        """Side of a square, or rank, that `rank` asks for where the layer is large enough."""
        raise NotImplementedError

    @property
    def planned_layers(self) -> tuple[str, ...]:
        """Names of the layers that a plan has chosen; with none `target_modules` say which are adapted."""
        return ()

    def first_seed(self, layer: str, cycle: int) -> int:
        """Seed of the value that a layer starts a cycle from."""
        return permutation_seed(self.seed, f"first/{layer}", cycle)

    def to_dict(self) -> dict[str, Any]:
        """Without new rows where there are none, and bits where they are as ever: as before there were any."""
        values = {"kind": self.adapter, **asdict(self), "target_modules": list(self.target_modules)}
        usual = {"new_rows_from": 0, "base_bits": AS_LOADED}
        return {key: each for key, each in values.items() if key not in usual or each != usual[key]}

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """Strict: an unknown key is a `UserError` with the nearest known one."""
        known = [field.name for field in fields(cls)]
        values = {key: value for key, value in values.items() if key != "kind"}
        for key in values:
            if key not in known:
                raise UserError(f"unknown key {key!r} in the adapter's settings.{nearest(key, known)}")
        return cls(**values)


@dataclass(frozen=True)
class LoRAConfig(AdapterConfig):
    """LoRA with the same targets, merge machinery and sharding as the squares."""

    adapter: ClassVar[str] = LORA
    rank_flag: ClassVar[str] = "--lora_rank"

    alpha: float | None = None
    """The update is alpha / rank times B A; None for twice the rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise UserError(f"--lora_alpha must be above 0, got {self.alpha}")

    @property
    def title(self) -> str:
        return LORA

    @property
    def scale(self) -> float:
        """alpha / rank, which stays where a layer's rank is cut."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def asked_for(self, d_in: int, d_out: int) -> int:
        return self.rank

    def operator_for(self, layer: str, d_in: int, d_out: int, cycle: int, aligned: Side | None = None) -> LoRASpec:
        rank = min(self.rank, d_in, d_out)
        return LoRASpec(d_in, d_out, rank, self.scale * rank)


@dataclass(frozen=True)
class MoRAConfig(AdapterConfig):
    """Which layers get a square, of what size, and how it is wired."""

    adapter: ClassVar[str] = MORA

    operator: str = "auto"
    """truncate, share, decouple, rotate or subspace; auto takes rotate for ranks below 64, share from there on."""

    grouping: str = "permuted"
    """permuted (fresh permutations every cycle), alternate (the paper's), plain, or one of share's fixed groupings."""

    compute: str = "auto"
    """How a layer is computed: activation, weight or auto (see `compute.py`)."""

    segments: int = 0
    """Confine the groupings of layers that tensor parallelism can split to so many segments, so that their squares need
    no communication at any degree that divides it; 0: do not. A property of the run: the update is another one."""

    vectors: str = ""
    """The file of the base's singular vectors that the subspace operator, or the alignment loss, reads
    (`VectorsRecord.name`). `run_vectors` fills it in."""

    vector_sets: int = 1
    """Subspace: cycle c takes singular vectors s r_hat, s r_hat + 1, ... with s = c modulo so many sets; with 1 every
    cycle takes the leading ones. Behind a layer's last vector comes its first."""

    layer_sizes: tuple[tuple[str, int], ...] = ()
    """(layer's name, r_hat) of exactly the layers that get a square, in place of `target_modules` and of the sizes that
    `rank` asks for (a plan, `targets`); given as a mapping or pairs, kept in the order of names. Empty: no plan."""

    domains: tuple[str, ...] = ()
    """Names of the domains that have a square of their own in every layer, beside the shared one."""

    freeze: str = Freeze.NONE.value
    """shared or domains: squares that are not trained; none: all are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layer_sizes", _sorted_sizes(self.layer_sizes))
        for name, size in self.layer_sizes:
            if size < 1 or size % self.step:
                even = ", and even for rotate" if self.step == 2 else ""
                raise UserError(f"--targets: the side of {name} must be at least 1{even}, got {size}")
        object.__setattr__(self, "domains", tuple(self.domains))
        check_domains(self.domains, self.freeze)
        kinds = [*(kind.value for kind in OperatorKind), SUBSPACE]
        if self.operator != "auto" and self.operator not in kinds:
            raise UserError(
                f"unknown --operator {self.operator!r}; known: auto, {', '.join(kinds)}.{nearest(self.operator, kinds)}"
            )
        paths = [path.value for path in Compute]
        if self.compute not in paths:
            raise UserError(
                f"unknown --compute {self.compute!r}; known: {', '.join(paths)}.{nearest(self.compute, paths)}"
            )
        policies = [ALTERNATE, *(grouping.value for grouping in Grouping)]
        if self.grouping not in policies:
            raise UserError(
                f"unknown --grouping {self.grouping!r}; known: {', '.join(policies)}.{nearest(self.grouping, policies)}"
            )
        if self.vector_sets < 1:
            raise UserError(f"--subspace_cycles must be at least 1, got {self.vector_sets}")
        if self.is_subspace:
            self._check_subspace()
            return
        if self.vector_sets > 1:
            raise UserError(f"--subspace_cycles is for --operator subspace, and the operator is {self.kind.value}")
        any_kind = (Grouping.PLAIN.value, Grouping.PERMUTED.value)
        if self.kind is not OperatorKind.SHARE and self.grouping not in any_kind:
            raise UserError(
                f"--grouping {self.grouping} belongs to --operator share, but the operator is {self.kind.value}: "
                f"use {' or '.join(any_kind)}"
            )
        if self.segments < 0:
            raise UserError(f"--tp_segments must be at least 1, got {self.segments}")
        if self.segments and self.kind is not OperatorKind.SHARE:
            raise UserError(f"--tp_grouping aligned belongs to --operator share, but the operator is {self.kind.value}")

    def _check_subspace(self) -> None:
        """What is for the other operators."""
        if self.grouping != MoRAConfig.grouping:
            raise UserError(f"--operator subspace has no groups: drop --grouping {self.grouping}")
        if self.compute == Compute.WEIGHT.value:
            raise UserError("--operator subspace is computed over activations: drop --compute weight")
        if self.segments:
            raise UserError("--tp_grouping aligned belongs to --operator share, but the operator is subspace")

    @property
    def is_subspace(self) -> bool:
        return self.operator == SUBSPACE

    @property
    def operator_name(self) -> str:
        """What `operator` says, with auto decided."""
        return default_kind(self.rank).value if self.operator == "auto" else self.operator

    @property
    def step(self) -> int:
        """Sides of squares are multiples of it."""
        return 2 if self.operator_name == OperatorKind.ROTATE.value else 1

    @property
    def planned_layers(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.layer_sizes)

    @property
    def kind(self) -> OperatorKind:
        """Which of the four that need no vectors."""
        return default_kind(self.rank) if self.operator == "auto" else OperatorKind(self.operator)

    @property
    def title(self) -> str:
        return SUBSPACE if self.is_subspace else f"{self.kind.value}/{self.grouping}"

    def asked_for(self, d_in: int, d_out: int) -> int:
        return square_size(d_in, d_out, self.rank, OperatorKind.SHARE if self.is_subspace else self.kind)

    def square_size(self, d_in: int, d_out: int) -> int:
        """r_hat of a layer: the paper's size, at most `largest_size`."""
        r_hat = min(self.asked_for(d_in, d_out), self.largest_size(d_in, d_out))
        if r_hat < 1:
            raise UserError(f"--mora_rank {self.rank} is too small for a square on a layer of {d_in} x {d_out}")
        return r_hat

    def largest_size(self, d_in: int, d_out: int) -> int:
        """r_hat beyond which a square adds nothing: the layer's longer side, rounded to `step`; for the subspace
        operator the shorter one, as a weight has no more singular vectors."""
        longest = min(d_in, d_out) if self.is_subspace else max(d_in, d_out)
        return longest - longest % self.step

    def size_of(self, layer: str, d_in: int, d_out: int) -> int:
        """r_hat of the layer: the plan's, or `square_size`. Raises `UserError` for a planned one above `largest_size`,
        and for a layer that the plan leaves out."""
        if not self.layer_sizes:
            return self.square_size(d_in, d_out)
        size = dict(self.layer_sizes).get(layer)
        if size is None:
            raise UserError(f"--targets: the plan gives {layer} no square")
        if size > (largest := self.largest_size(d_in, d_out)):
            raise UserError(
                f"--targets: a square of side {size} on {layer}, a layer of {d_in} x {d_out}, is larger than it can "
                f"use: give {largest} at most"
            )
        return size

    def operator_for(self, layer: str, d_in: int, d_out: int, cycle: int, aligned: Side | None = None) -> SquareSpec:
        r_hat = self.size_of(layer, d_in, d_out)
        if self.is_subspace:
            first = cycle % self.vector_sets * r_hat % min(d_in, d_out)
            return SubspaceSpec(d_in, d_out, r_hat, layer, self.vectors, first)
        if self.grouping == ALTERNATE:
            grouping = (Grouping.STRIDED, Grouping.CONTIGUOUS)[cycle % 2]
        else:
            grouping = Grouping(self.grouping)
        seed = permutation_seed(self.seed, layer, cycle) if grouping is Grouping.PERMUTED else 0
        spec = OperatorSpec(self.kind, d_in, d_out, r_hat, grouping, seed)
        if aligned is None or not self.segments or r_hat < self.segments:
            return spec
        if aligned is Side.IN:
            return replace(spec, in_segments=self.segments)
        return replace(spec, out_segments=self.segments)

    def to_dict(self) -> dict[str, Any]:
        """Without segments, sizes, domains and singular vectors where there are none: as before there were any."""
        values = {**super().to_dict(), "layer_sizes": dict(self.layer_sizes), "domains": list(self.domains)}
        usual = {
            "segments": 0, "layer_sizes": {}, "vectors": "", "vector_sets": 1, "domains": [],
            "freeze": Freeze.NONE.value,
        }  # fmt: skip
        return {key: value for key, value in values.items() if key not in usual or value != usual[key]}


def _sorted_sizes(sizes: Any) -> tuple[tuple[str, int], ...]:
    """Of a mapping or pairs, of which JSON makes lists."""
    pairs: Iterable[Any] = sizes.items() if isinstance(sizes, Mapping) else sizes
    return tuple(sorted((str(name), int(size)) for name, size in pairs))


def config_from_dict(values: dict[str, Any]) -> AdapterConfig:
    """Inverse of `to_dict`, for either adapter; without a kind (version 0.1.0) it is MoRA's."""
    kind: type[AdapterConfig] = LoRAConfig if values.get("kind") == LORA else MoRAConfig
    return kind.from_dict(values)
