"""The configuration of an adapter: frozen dataclasses that check their own values.

AdapterConfig          what all adapters share: rank, target layers, dropout, other trained parameters (modules_to_save)
  MoRAConfig           MoRA: one square matrix a layer
  LoRAConfig           LoRA, for comparison; merged at intervals it is ReLoRA
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

from mora_ds.adapters.domain_names import domain_validation_errors
from mora_ds.adapters.ops.index_tables import OPERATORS, mora_matrix_size
from mora_ds.adapters.ops.linear import Compute
from mora_ds.adapters.ops.lora import LORA, LoRASpec
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import (
    R_HAT_MULTIPLE,
    Grouping,
    OperatorKind,
    UpdateSpec,
    default_kind,
    permutation_seed,
    round_side,
)
from mora_ds.adapters.registry import Capability, adapter_type, loaded, unsupported
from mora_ds.adapters.target_patterns import ALL_LINEAR
from mora_ds.common.errors import (
    UserError,
    raise_validation_errors,
    unknown,
)
from mora_ds.common.files import JsonObject
from mora_ds.common.untrusted import entry, typed_fully, wrong_types

ALTERNATE = "alternate"
"""Grouping policy of the paper's ReMoRA: strided in even cycles, contiguous in odd
ones."""

AS_LOADED = 16
"""Value of `base_bits` for a base that is held in the run's dtype."""

PACKED_BASES = {8: Capability.BASE_8_BITS, 4: Capability.BASE_4_BITS}
"""What an adapter must support for values of `base_bits` below 16."""

Config = TypeVar("Config", bound="AdapterConfig")
Spec = TypeVar("Spec", bound=UpdateSpec)


@dataclass(frozen=True)
class AdapterConfig:
    """Which layers are adapted, and what else is trained. Base class: use `MoRAConfig`,
    `LoRAConfig`, or the config of another registered adapter (`adapters.registry`).

    Raises `UserError` with one line for each wrong field, which it names.
    """

    adapter: ClassVar[str]
    """Value of --adapter, under which the class is registered."""

    rank: int = 8
    """LoRA rank; each layer's adapter has about as many parameters as LoRA of this
    rank."""
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    """Names (`q_proj`), globs (`*.mlp.*`), regular expressions
    (`re:.*layers\\.[0-3]\\..*`) or `all-linear`."""
    dropout: float = 0.0
    """Dropout on the adapter's input while training, in [0, 1)."""
    train_embeddings: bool = False
    train_norms: bool = False
    train_head: bool = False
    new_rows_from: int = 0
    """Train the rows of embeddings and head from this index on alone; 0 trains none."""
    embedding_rank: int = 0
    """Rank of a product that is trained and added to embeddings and head; 0 for
    none."""
    base_bits: int = AS_LOADED
    """Bits of the frozen weights: 8 (`ops.int8`), 4 (`nf4`), or 16, as they are
    loaded."""
    seed: int = 42
    """Seed of permutations and LoRA's A, hashed with the layer's name and the cycle."""

    def __post_init__(self) -> None:
        # PEFT's configs give a set
        if isinstance(self.target_modules, set | frozenset):
            object.__setattr__(self, "target_modules", sorted(self.target_modules))
        raise_validation_errors(wrong_types(self))
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        raise_validation_errors(self._validation_errors())

    def _validation_errors(self) -> Iterator[str]:
        if self.rank < 1:
            yield f"`rank` must be at least 1, got {self.rank}"
        if capability := PACKED_BASES.get(self.base_bits):
            setting = f"`base_bits` {self.base_bits}"
            yield from unsupported(self.adapter, capability, setting)
        if not 0.0 <= self.dropout < 1.0:
            yield f"`dropout` must be in [0, 1), got {self.dropout}"
        if not self.target_modules:
            yield "`target_modules` names no module"
        if self.base_bits not in (4, 8, AS_LOADED):
            yield f"`base_bits` must be 8 or 4, or {AS_LOADED} for the base as it is loaded, got {self.base_bits}"
        for name in ("new_rows_from", "embedding_rank"):
            if getattr(self, name) < 0:
                yield f"`{name}` must be at least 0, got {getattr(self, name)}"

    @property
    def title(self) -> str:
        """The adapter's name in reports."""
        return self.adapter

    def operator_for(self, layer: str, d_in: int, d_out: int, cycle: int) -> UpdateSpec:
        """The spec of a layer's update in a cycle (0 first), from these arguments
        alone."""
        raise NotImplementedError

    def in_cycle(self, spec: Spec, layer: str, cycle: int) -> Spec:
        """What `operator_for` gives the layer in another cycle than `spec`: the same,
        unless cycles have groupings of their own."""
        return spec

    def of_expert(self, layer: str, experts_per_token: int) -> MoRAConfig:
        """The config that gives each expert of `layer` its operator, for adapters that
        declare `Capability.EXPERTS`. Raises `UserError` where there is none."""
        raise NotImplementedError

    @property
    def planned_layers(self) -> tuple[str, ...]:
        """Names of the layers that a plan has chosen; empty without a plan."""
        return ()

    def layer_options(self, layer: str) -> dict[str, Any]:
        """Further arguments of the layer's class."""
        return {"seed": self.first_seed(layer, cycle=0)}

    def first_seed(self, layer: str, cycle: int) -> int:
        """Seed of the adapter weight that a layer starts a cycle from
        (`UpdateSpec.init_weight`)."""
        return permutation_seed(self.seed, f"first/{layer}", cycle)

    def to_dict(self) -> JsonObject:
        """The fields as JSON values, with the adapter under "kind"."""
        values: JsonObject = {"kind": self.adapter}
        for field in fields(self):
            value = getattr(self, field.name)
            values[field.name] = list(value) if isinstance(value, tuple) else value
        return values

    @classmethod
    def from_dict(cls: type[Config], values: JsonObject) -> Config:
        """Inverse of `to_dict`. Raises `UserError` for an unknown or a missing key."""
        values = {key: value for key, value in values.items() if key != "kind"}
        if isinstance(sizes := values.get("layer_sizes"), Mapping):
            values["layer_sizes"] = list(sizes.items())
        return typed_fully(cls, values, "the adapter's settings")


@dataclass(frozen=True)
class LoRAConfig(AdapterConfig):
    """LoRA with the same targets, merges and sharding as MoRA."""

    adapter: ClassVar[str] = LORA

    alpha: float | None = None
    """The update is (alpha / rank) B A; None stands for twice the rank."""

    def _validation_errors(self) -> Iterator[str]:
        yield from super()._validation_errors()
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            yield f"`alpha` must be above 0, got {self.alpha}"

    @property
    def scale(self) -> float:
        """alpha / rank; it stays the same for layers that take a smaller rank."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def operator_for(self, layer: str, d_in: int, d_out: int, cycle: int) -> LoRASpec:
        rank = min(self.rank, d_in, d_out)
        return LoRASpec(d_in, d_out, rank, self.scale * rank)


@dataclass(frozen=True)
class MoRAConfig(AdapterConfig):
    """Which layers get a MoRA matrix, its size, and the operator around it."""

    adapter: ClassVar[str] = "mora"

    operator: str = "auto"
    """truncate, share, decouple, rotate, or auto: rotate for ranks below 64, else
    share."""

    grouping: str = "permuted"
    """permuted (fresh permutations every cycle), alternate (the paper's), plain, or one
    of share's fixed groupings."""

    r_hat_multiple: int = R_HAT_MULTIPLE
    """r_hat is rounded down to a multiple of this, and to an even number below twice
    this (`round_side`). 1: the paper's size."""

    compute: str = "auto"
    """How a layer is computed: activation, weight or auto (see `ops.linear`)."""

    layer_sizes: tuple[tuple[str, int], ...] = ()
    """(layer name, r_hat) of exactly the layers that are adapted, in place of
    `target_modules` and of the sizes that `rank` stands for (a plan of targets). Given
    as a mapping or pairs, kept sorted by name. Empty: no plan."""

    domains: tuple[str, ...] = ()
    """Names of the domains, each with its own MoRA matrix in every layer."""

    def __post_init__(self) -> None:
        sizes: Any = self.layer_sizes
        if isinstance(sizes, Mapping):
            sizes = sizes.items()
        try:
            # Read from JSON, a pair is a list
            pairs = sorted((str(name), int(size)) for name, size in sizes)
        except (TypeError, ValueError):
            raise UserError(
                f"layer_sizes must be whole numbers by names of layers, got {sizes!r}"
            ) from None
        object.__setattr__(self, "layer_sizes", tuple(pairs))
        # Refuses a text in place of `domains`, of which a tuple would be its letters
        super().__post_init__()
        object.__setattr__(self, "domains", tuple(self.domains))

    def _validation_errors(self) -> Iterator[str]:
        yield from super()._validation_errors()
        for name, size in self.layer_sizes:
            if size < 1 or size % self.step:
                even = ", and even for rotate" if self.step == 2 else ""
                yield f"research.targets: the side of {name} must be at least 1{even}, got {size}"
                break
        yield from domain_validation_errors(self.domains)
        choices = {
            "operator": ["auto", *(kind.value for kind in OPERATORS)],
            "grouping": [ALTERNATE, *(grouping.value for grouping in Grouping)],
            "compute": [path.value for path in Compute],
        }
        misspelt = [
            name for name in choices if getattr(self, name) not in choices[name]
        ]
        for name in misspelt:
            yield unknown(f"`{name}`", getattr(self, name), choices[name])
        multiple = self.r_hat_multiple
        if multiple != 1 and (multiple < 1 or multiple % 2):
            yield f"`r_hat_multiple` must be 1 or even, got {multiple}"
        if not misspelt:
            yield from self._unsuited_grouping()

    def _unsuited_grouping(self) -> Iterator[str]:
        operator = OPERATORS[self.kind]
        suited = [grouping.value for grouping in operator.groupings]
        if operator.has_groups:
            suited.append(ALTERNATE)
        if self.grouping not in suited:
            yield (
                f"`grouping` {self.grouping} belongs to `operator` share, but the operator is {self.kind.value}: "
                f"use {' or '.join(suited)}"
            )

    @property
    def kind(self) -> OperatorKind:
        """The operator as one of the paper's four; of auto, the one that it stands
        for."""
        if self.operator == "auto":
            return default_kind(self.rank)
        return OperatorKind(self.operator)

    @property
    def step(self) -> int:
        """Every r_hat that the operator takes is a multiple of this."""
        return OPERATORS[self.kind].smallest_side

    @property
    def planned_layers(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.layer_sizes)

    @property
    def title(self) -> str:
        return f"{self.kind.value}/{self.grouping}"

    def layer_options(self, layer: str) -> dict[str, Any]:
        return {"compute": Compute(self.compute)}

    def of_expert(self, layer: str, experts_per_token: int) -> MoRAConfig:
        """`rank` is divided by the number of experts that compute a token, which
        together then have the rank of a linear layer."""
        if not experts_per_token:
            raise UserError(
                f"`target_modules` includes {layer}, and the model's config does not tell how many experts a token "
                "has: leave experts out"
            )
        return replace(
            self,
            rank=max(1, self.rank // experts_per_token),
            operator=self.kind.value,
        )

    def mora_matrix_size(self, d_in: int, d_out: int) -> int:
        """r_hat of a layer: the paper's size, at most `largest_size`, rounded down."""
        largest = round_side(
            self.largest_size(d_in, d_out), self.r_hat_multiple, self.step
        )
        of_paper = mora_matrix_size(
            d_in, d_out, self.rank, self.kind, self.r_hat_multiple
        )
        r_hat = min(of_paper, largest)
        if largest < 1:
            raise UserError(
                f"a layer of {d_in} x {d_out} has no two dimensions that {self.kind.value} could pair, whatever the "
                "rank: leave it out of `target_modules`"
            )
        if r_hat < 1:
            raise UserError(
                f"`rank` {self.rank} is too small for a MoRA matrix on a layer of {d_in} x {d_out}"
            )
        return r_hat

    def largest_size(self, d_in: int, d_out: int) -> int:
        """r_hat beyond which a matrix adds nothing: the longer side, rounded to
        `step`."""
        longest = max(d_in, d_out)
        return longest - longest % self.step

    def size_of(self, layer: str, d_in: int, d_out: int) -> int:
        """r_hat of the layer: the plan's, or `mora_matrix_size`. Raises `UserError` for a
        planned one above `largest_size`, and for a layer that the plan leaves out."""
        if not self.layer_sizes:
            return self.mora_matrix_size(d_in, d_out)
        size = dict(self.layer_sizes).get(layer)
        if size is None:
            raise UserError(f"research.targets: the plan gives {layer} no MoRA matrix")
        largest = self.largest_size(d_in, d_out)
        if size > largest:
            raise UserError(
                f"research.targets: a MoRA matrix of side {size} on {layer}, a layer of {d_in} x {d_out}, is larger "
                f"than it can use: give {largest} at most"
            )
        return size

    def operator_for(
        self, layer: str, d_in: int, d_out: int, cycle: int
    ) -> OperatorSpec:
        r_hat = self.size_of(layer, d_in, d_out)
        return self.in_cycle(OperatorSpec(self.kind, d_in, d_out, r_hat), layer, cycle)

    def in_cycle(self, spec: Spec, layer: str, cycle: int) -> Spec:
        if self.grouping == ALTERNATE:
            grouping = Grouping.CONTIGUOUS if cycle % 2 else Grouping.STRIDED
        else:
            grouping = Grouping(self.grouping)
        seed = 0
        if grouping is Grouping.PERMUTED:
            seed = permutation_seed(self.seed, layer, cycle)
        return spec.with_grouping(grouping, seed)

    def to_dict(self) -> JsonObject:
        values = super().to_dict()
        values["layer_sizes"] = dict(self.layer_sizes)
        return values


def config_from_dict(values: JsonObject) -> AdapterConfig:
    """Inverse of `to_dict` for every registered adapter. Raises `UserError`."""
    kind = entry(values, "kind", str, "the adapter's settings")
    config: AdapterConfig = loaded(adapter_type(kind).config).from_dict(values)
    return config


FLAGS = {
    **{field.name: f"--{field.name}" for field in fields(MoRAConfig)},
    "rank": "--mora_rank",
    "alpha": "--lora_alpha",
    "dropout": "--mora_dropout",
    "new_rows_from": "--train_new_embeddings",
    "embedding_rank": "--train_embedding_rank",
}
"""The flags of the fields of configs, for `named_as_flags`. The flag of another field
has its name."""
