"""The registered adapters: what each is called, where its classes are, and what it
supports.

    register(AdapterType("dora", ...))      once; `BUILT_IN` below has the adapters of mora_ds
    adapter_type("dora")                    its entry; an unknown name is an error that lists the registered ones
    require("dora", Capability.MUON, "--optimizer muon")      an error that names the adapter and the flag

An adapter supports what it declares and nothing else. This module imports no torch:
settings are checked by names and capabilities, and a class that is given as text
("module:name") is imported when it is first used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

from mora_ds.common.errors import UserError, refuse, unknown

if TYPE_CHECKING:
    from mora_ds.adapters.config import AdapterConfig
    from mora_ds.adapters.layer import AdaptedLinear
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
    """"kind" in merge ledgers -> the `UpdateSpec`: sizes, first value, merged
    weight."""
    capabilities: frozenset[Capability] = frozenset()
    settings: Mapping[str, str] = field(default_factory=dict)
    """Setting of a run -> field of the config, of the settings that not all adapters
    read."""
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

    @property
    def config_class(self) -> type[AdapterConfig]:
        return _loaded(self.config)

    @property
    def layer_class(self) -> type[AdaptedLinear]:
        return _loaded(self.layer)

    @property
    def expert_layer_class(self) -> type[AdaptedLinear]:
        return _loaded(self.expert_layer)

    @property
    def domain_layer_class(self) -> Any:
        """Built with `Domains` in addition (`domains.DomainLinear`)."""
        return _loaded(self.domain_layer)

    def spec_class(self, kind: str) -> type[UpdateSpec]:
        """The class of the specs with this "kind"."""
        return _loaded(self.specs[kind])


def _loaded(path: ClassPath | None) -> Any:
    if path is None:
        raise LookupError("the adapter declares a capability without its class")
    if isinstance(path, type):
        return path
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


_TYPES: dict[str, AdapterType] = {}


def register(adapter: AdapterType) -> AdapterType:
    """Adds an adapter. Raises `UserError` where its name, or a "kind" of its specs, is
    taken."""
    if adapter.name in (*_TYPES, *Control):
        raise UserError(f"there is an adapter {adapter.name!r} already")
    if taken := sorted(adapter.specs.keys() & spec_kinds()):
        raise UserError(
            f"adapter {adapter.name!r}: another one has specs of kind {taken[0]!r}"
        )
    _TYPES[adapter.name] = adapter
    return adapter


def unregister(name: str) -> None:
    """Removes an adapter. Raises `UserError` for an unknown one."""
    del _TYPES[adapter_type(name).name]


def adapter_types() -> tuple[AdapterType, ...]:
    """All adapters, in the order in which they were registered."""
    return tuple(_TYPES.values())


def adapter_names() -> list[str]:
    """The values of --adapter that stand for an adapter."""
    return list(_TYPES)


def adapter_type(name: str) -> AdapterType:
    """The entry of an adapter. Raises `UserError` that lists the registered ones."""
    if name not in _TYPES:
        raise UserError(unknown("adapter", name, _TYPES))
    return _TYPES[name]


def spec_kinds() -> dict[str, AdapterType]:
    """ "kind" of a spec -> its adapter."""
    return {kind: adapter for adapter in _TYPES.values() for kind in adapter.specs}


def supports(name: str, capability: Capability) -> bool:
    """Whether an adapter declares a capability; no control has any."""
    return name in _TYPES and capability in _TYPES[name].capabilities


def unsupported(name: str, capability: Capability, setting: str) -> Iterator[str]:
    """A message where an adapter does not declare the capability that a `setting`
    needs."""
    if not supports(name, capability):
        able = [other for other in _TYPES if supports(other, capability)]
        yield (
            f"{setting}: --adapter {name} does not support {capability.value} "
            f"(these do: {', '.join(able)})"
        )


def require(name: str, capability: Capability, setting: str) -> None:
    """Raises `UserError` with the message of `unsupported`."""
    refuse(unsupported(name, capability, setting))


# -- the adapters of mora_ds -----------------------------------------------------------

_ADDITIVE = frozenset(
    {
        Capability.BASE_8_BITS,
        Capability.BASE_4_BITS,
        Capability.MUON,
        Capability.SUM,
        Capability.PEFT_EXPORT,
    }
)

_OPERATOR = "mora_ds.adapters.ops.mora:OperatorSpec"

BUILT_IN = (
    AdapterType(
        name=DEFAULT_ADAPTER,
        title="MoRA",
        config="mora_ds.adapters.config:MoRAConfig",
        layer="mora_ds.adapters.layer:MoRALinear",
        specs={
            "truncate": _OPERATOR,
            "share": _OPERATOR,
            "decouple": _OPERATOR,
            "rotate": _OPERATOR,
            "stack": "mora_ds.adapters.ops.stack:StackSpec",
        },
        capabilities=frozenset(Capability),
        settings={
            name: name for name in ("operator", "grouping", "r_hat_multiple", "compute")
        },
        expert_layer="mora_ds.adapters.experts:MoRAExperts",
        domain_layer="mora_ds.adapters.domains:DomainLinear",
        size_title="r_hat",
        weights_title="MoRA matrices",
    ),
    AdapterType(
        name="lora",
        title="LoRA",
        config="mora_ds.adapters.config:LoRAConfig",
        layer="mora_ds.adapters.layer:LoRALinear",
        specs={"lora": "mora_ds.adapters.ops.lora:LoRASpec"},
        capabilities=_ADDITIVE,
        settings={"lora_alpha": "alpha"},
        has_factors=True,
    ),
)

for _adapter in BUILT_IN:
    register(_adapter)
