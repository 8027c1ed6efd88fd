"""The registered adapters: what each is called, where its classes are, and what it
supports.

    register(AdapterType("dora", ...))      once; those of mora_ds are at the end of this file
    adapter_type("dora")                    its entry; an unknown name is an error that lists the registered ones
    require("dora", Capability.MUON, "--optimizer muon")      an error that names the adapter and the flag

An adapter is a module with three classes:

    UpdateSpec       (ops/spec.py) the shape of its trained tensor, the adapter weight that a cycle starts from, and
                     merged_weight(base_weight, adapter_weight); a merge that adds a delta is an `AdditiveSpec`
    AdaptedLinear    (layer.py) the forward
    AdapterConfig    (config.py) the spec of each layer; a field with the name of a setting is set by it

and a `register` with their names. --adapter, help, messages, merges, ledger, resume and
export follow. An adapter outside of mora_ds calls `register` itself, before it parses
settings or opens a checkpoint.

An adapter supports what it declares and nothing else. This module imports no torch:
settings are checked by names and capabilities, and a class that is given as text
("module:name") is imported when it is first used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

from mora_ds.common.errors import UserError, raise_validation_errors, unknown
from mora_ds.common.files import JsonObject
from mora_ds.common.untrusted import entry

if TYPE_CHECKING:
    from mora_ds.adapters.ops.spec import UpdateSpec

ClassPath: TypeAlias = type | str
"""A class, or "module:name" of one that is imported when it is used."""


DEFAULT_ADAPTER = "mora"


class Control(str, Enum):
    """Values of --adapter that stand for no adapter."""

    FULL = "full"
    NONE = "none"


class Capability(str, Enum):
    """What an adapter may support. The value completes "does not support ..."."""

    TENSOR_PARALLEL = "tensor parallelism"
    """`parallel.tensor_parallel` splits its layers, which are `MoRALinear`."""
    BASE_8_BITS = "a base in 8 bits"
    """Its layer takes a `QuantizedWeight` as frozen weight."""
    BASE_4_BITS = "a base in 4 bits"
    """The same, and merged updates are applied by `AdditiveSpec.add_update_`."""
    EXPERTS = "experts"
    """It has `expert_layer`, and its config has `of_expert`."""
    DOMAINS = "domains"
    """It has `domain_layer`, and its config has `domains`."""
    LAYER_SIZES = "a size for each layer"
    """Its config has `layer_sizes`, the plan of research.targets."""
    ALIGNMENT = "the alignment loss"
    """Its specs are `AdditiveSpec`, of MoRA's operators or with `low_rank`."""
    MUON = "Muon"
    """Its tensor is a matrix, or two (`AdapterType.has_factors`)."""
    SUM = "sums of adapters"
    """Its specs are `AdditiveSpec`: scaled, summed, and added to other models."""
    PEFT_EXPORT = "exports as LoRA"
    """Its specs are `AdditiveSpec`: their sum is decomposed."""


@dataclass(frozen=True)
class AdapterType:
    """An adapter's name, classes and capabilities."""

    name: str
    """Value of --adapter, and of "kind" in the config that checkpoints hold."""
    title: str
    """Its name in sentences: LoRA."""
    config: ClassPath
    """An `AdapterConfig`: what is adapted, and the update of each layer."""
    layer: ClassPath
    """An `AdaptedLinear`: the forward."""
    specs: Mapping[str, ClassPath]
    """"kind" in merge ledgers -> the `UpdateSpec`: sizes, initial weight, merged
    weight."""
    settings: tuple[str, ...] = ()
    """Settings of a run that are fields of its config and not of every
    `AdapterConfig`: they have no effect with adapters that do not name them."""
    capabilities: tuple[Capability, ...] = ()
    trainables: tuple[str, ...] = ()
    """Globs of names of other parameters that are trained with it, such as
    `*norm.weight`."""
    has_factors: bool = False
    """Whether its tensor is two matrices side by side, the second one transposed. Muon
    then takes one after the other."""
    expert_layer: ClassPath | None = None
    """The layer of a projection of experts."""
    domain_layer: ClassPath | None = None
    """The layer with a tensor for each domain."""
    size_title: str = "rank"
    """What reports call `UpdateSpec.size`."""
    weights_title: str = "factors"
    """What reports call its trained tensors."""


ADAPTERS: dict[str, AdapterType] = {}
"""Name -> the registered adapter, in the order in which they were registered."""


def register(adapter: AdapterType) -> None:
    """Adds an adapter. Raises `UserError` where its name, or a "kind" of its specs, is
    taken."""
    for name in {adapter.name} & {*ADAPTERS, *Control}:
        raise UserError(f"there is an adapter {name!r} already")
    for kind in adapter.specs.keys() & spec_classes():
        raise UserError(f"{adapter.name}: there are specs of kind {kind!r} already")
    ADAPTERS[adapter.name] = adapter


def adapter_type(name: str) -> AdapterType:
    """The entry of an adapter. Raises `UserError` that lists the registered ones."""
    if name not in ADAPTERS:
        raise UserError(unknown("adapter", name, ADAPTERS))
    return ADAPTERS[name]


def spec_classes() -> dict[str, ClassPath]:
    """The classes of all specs, by their "kind"."""
    return {
        kind: path
        for adapter in ADAPTERS.values()
        for kind, path in adapter.specs.items()
    }


def loaded(path: ClassPath | None) -> Any:
    """The class, imported where it is given as text."""
    if isinstance(path, str):
        module, _, name = path.partition(":")
        return getattr(import_module(module), name)
    return path


def spec_from_dict(values: JsonObject) -> UpdateSpec:
    """Inverse of any spec's `to_dict`. Raises `UserError` for unknown kinds, other keys
    and wrong types."""
    kind = entry(values, "kind", str, "operator")
    classes = spec_classes()
    if kind not in classes:
        raise UserError(unknown("operator", kind, classes))
    spec: UpdateSpec = loaded(classes[kind]).from_dict(values)
    return spec


def unsupported(name: str, capability: Capability, setting: str) -> Iterator[str]:
    """A message where an adapter does not declare the capability that a `setting`
    needs. `name`: of an adapter or a `Control`, which has none."""
    able = [
        adapter.name
        for adapter in ADAPTERS.values()
        if capability in adapter.capabilities
    ]
    if name not in able and name in (*ADAPTERS, *Control):
        yield (
            f"{setting}: --adapter {name} does not support {capability.value} "
            f"(these do: {', '.join(able)})"
        )


def require(name: str, capability: Capability, setting: str) -> None:
    """Raises `UserError` with the message of `unsupported`."""
    raise_validation_errors(unsupported(name, capability, setting))


# -- the adapters of mora_ds -----------------------------------------------------------

_OPERATOR = "mora_ds.adapters.ops.mora:OperatorSpec"

register(
    AdapterType(
        name=DEFAULT_ADAPTER,
        title="MoRA",
        config="mora_ds.adapters.config:MoRAConfig",
        layer="mora_ds.adapters.layer:MoRALinear",
        specs={
            **dict.fromkeys(("truncate", "share", "decouple", "rotate"), _OPERATOR),
            "stack": "mora_ds.adapters.ops.stack:StackSpec",
        },
        settings=("operator", "grouping", "r_hat_multiple", "compute"),
        capabilities=tuple(Capability),
        expert_layer="mora_ds.adapters.experts:MoRAExperts",
        domain_layer="mora_ds.adapters.domains:DomainLinear",
        size_title="r_hat",
        weights_title="MoRA matrices",
    )
)
register(
    AdapterType(
        name="lora",
        title="LoRA",
        config="mora_ds.adapters.config:LoRAConfig",
        layer="mora_ds.adapters.layer:LoRALinear",
        specs={"lora": "mora_ds.adapters.ops.lora:LoRASpec"},
        settings=("lora_alpha",),
        capabilities=(
            Capability.BASE_8_BITS,
            Capability.BASE_4_BITS,
            Capability.ALIGNMENT,
            Capability.MUON,
            Capability.SUM,
            Capability.PEFT_EXPORT,
        ),
        has_factors=True,
    )
)
register(
    AdapterType(
        name="subspace",
        title="MoRA between singular vectors",
        config="mora_ds.research.subspace:SubspaceConfig",
        layer="mora_ds.research.subspace:SubspaceLinear",
        specs={"subspace": "mora_ds.research.subspace:SubspaceSpec"},
        settings=("r_hat_multiple",),
        capabilities=(
            Capability.BASE_8_BITS,
            Capability.BASE_4_BITS,
            Capability.LAYER_SIZES,
            Capability.ALIGNMENT,
            Capability.SUM,
            Capability.PEFT_EXPORT,
        ),
        size_title="r_hat",
        weights_title="MoRA matrices",
    )
)
