"""Gives a Hugging Face model its adapters, freezes the rest, and reports what was done.

inject(model, MoRAConfig(rank=8))
  1. every target layer becomes an `AdaptedLinear`, with its weight in 8 or 4 bits if base_bits says so
  2. every other parameter that is not trained becomes a buffer; tied tensors stay one tensor
  3. a report: shapes, sizes, trainable and total parameters
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from mora_ds.adapters.config import AS_LOADED, AdapterConfig
from mora_ds.adapters.domains import Domains
from mora_ds.adapters.experts import compute_sorted
from mora_ds.adapters.layer import (
    AdaptedLinear,
    ExpertStack,
    linear_shape,
    mora_layers,
)
from mora_ds.adapters.low_rank_embeddings import train_low_rank
from mora_ds.adapters.new_embeddings import train_new_rows
from mora_ds.adapters.nf4 import NF4Weight
from mora_ds.adapters.ops.spec import UpdateSpec
from mora_ds.adapters.ops.stack import StackSpec
from mora_ds.adapters.quantized import quantized_layers
from mora_ds.adapters.registry import (
    ADAPTERS,
    Capability,
    adapter_type,
    loaded,
    require,
)
from mora_ds.adapters.target_modules import (
    ending_of,
    language_model,
    output_head,
    targets_of,
)
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.untrusted import shown


@dataclass(frozen=True)
class ShapeRow:
    """All layers of one name ending and shape, e.g. the 32 q_proj of a model."""

    name: str
    d_in: int
    d_out: int
    count: int
    size: int
    """r_hat (the smallest, where a plan gives the layers several), or a rank."""
    params: int
    """Parameters of the adapters of all `count` layers together."""


@dataclass(frozen=True)
class InjectionReport:
    """What `inject` did. Counts are in parameters, with each tied tensor counted
    once."""

    rows: tuple[ShapeRow, ...]
    operator: str
    values: str
    """What is trained in the layers: matrices, or factors."""
    size: str
    """What `ShapeRow.size` is: r_hat, or rank."""
    adapter_params: int
    """Parameters of all these."""
    other_trainable_params: int
    total_params: int

    @property
    def trainable_params(self) -> int:
        return self.adapter_params + self.other_trainable_params

    def __str__(self) -> str:
        head = f"{'layer':<20} {'count':>5} {'d_in':>7} {'d_out':>7} {self.size:>6} {self.values:>13}"
        lines = [head, "-" * len(head)]
        for row in self.rows:
            lines.append(
                f"{row.name:<20} {row.count:>5} {row.d_in:>7} {row.d_out:>7} {row.size:>6} {row.params:>13,}"
            )
        share = 100 * self.trainable_params / self.total_params
        lines.append(
            f"operator {self.operator}: trainable {self.trainable_params:,} "
            f"({self.values} {self.adapter_params:,}, other {self.other_trainable_params:,}) "
            f"of {self.total_params:,} parameters = {share:.3f}%"
        )
        return "\n".join(lines)


_CONFIG = "_mora_config"
"""The attribute of a model that holds the config it was injected with."""


def inject(
    model: nn.Module,
    config: AdapterConfig,
    original: Callable[[str], Tensor] | None = None,
) -> InjectionReport:
    """Gives `model` its adapters and freezes the rest, in place.

    With `base_bits` 8 or 4, `original` returns a weight (by its name) as it was before
    it was loaded in the model's dtype, on the device where it is to be; that is
    rounded, and the model's own weight is dropped. Raises `UserError` when a target
    matches nothing, when the model already has an adapter, and when a target shares its
    weight with another module (a merge would change both) or is trained itself.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"inject: `model` must be of the type Module, got {shown(model)}"
        )
    if not isinstance(config, AdapterConfig):
        raise UserError(
            f"inject: `config` must be a config of an adapter ({', '.join(ADAPTERS)}), got {config!r}"
        )
    adapter = adapter_type(config.adapter)
    if type(config) is not loaded(adapter.config):
        raise UserError(
            f"inject: `config` is a {type(config).__name__}, and adapter {adapter.name!r} is registered with another "
            "class: register it under a name of its own (adapters/registry.py)"
        )
    if is_compiled(model):
        raise UserError(
            "inject: `model` is compiled: merges change what was compiled; give the model itself"
        )
    if mora_layers(model):
        raise UserError("this model already has an adapter: inject it once")
    targets = targets_of(model, config)
    if "" in targets:
        raise UserError(
            "inject: `model` is itself a linear layer: give the module that it is a part of"
        )
    _refuse_shared(model, targets)
    trained = _trained_parameters(model, config)
    if both := [
        name for name, module in targets.items() if id(module.weight) in trained
    ]:
        raise UserError(
            f"`target_modules` includes {both[0]!r}, which `train_head` trains itself: choose one"
        )
    total = count_parameters(model)
    specs = {name: spec_of(config, name, base) for name, base in targets.items()}
    domains = None
    if names := getattr(config, "domains", ()):
        require(adapter.name, Capability.DOMAINS, "`domains`")
        domains = Domains(names)
    stacks = [name for name, base in targets.items() if isinstance(base, ExpertStack)]
    if stacks and config.base_bits == NF4Weight.bits:
        raise UserError(
            f"`base_bits` 4: {stacks[0]} is a stack of experts, which 8 bits can hold: use them, or leave it out"
        )
    _reset_kernels(model)
    for name, base in targets.items():
        layer = layer_for(config, base, specs[name], name, domains)
        layer.train(base.training)
        if config.base_bits != AS_LOADED:
            _quantize(layer, name, config.base_bits, original)
        if isinstance(base, ExpertStack):
            parent, _, child = name.rpartition(".")
            experts = model.get_submodule(parent)
            # The stack is a parameter there, in whose place torch puts no module
            delattr(experts, child)
            compute_sorted(experts)
        model.set_submodule(name, layer)
    setattr(model, _CONFIG, config)
    _freeze_to_buffers(model, trained)
    if config.new_rows_from:
        train_new_rows(model, config.new_rows_from)
    if config.embedding_rank:
        train_low_rank(model, config.embedding_rank, config.seed)
    layers = list(mora_layers(model).values())
    for layer in layers:
        # Until a run sets it
        shape = layer.spec.adapter_weight_shape
        if layer.spec.trained_shape != shape:
            layer.set_fixed(layer.adapter_weight.new_full(shape, math.nan))
    values = sum(
        value.numel() for layer in layers for value in layer.parameters(recurse=False)
    )
    other_trainable = (
        sum(parameter.numel() for parameter in model.parameters()) - values
    )
    return InjectionReport(
        rows=_shape_rows(specs),
        operator=config.title,
        values=adapter.weights_title,
        size=adapter.size_title,
        adapter_params=values,
        other_trainable_params=other_trainable,
        total_params=total + values,
    )


def _quantize(
    layer: AdaptedLinear,
    name: str,
    bits: int,
    original: Callable[[str], Tensor] | None,
) -> None:
    weight_name = layer.spec.weight_name(name)
    weight = layer.weight if original is None else original(weight_name)
    try:
        layer.quantize(weight, bits)
    except RunError as error:
        raise UserError(f"`base_bits` {bits}: {weight_name}: {error}") from error


def is_compiled(model: nn.Module) -> bool:
    """Whether a module is the wrapper that `torch.compile` returns."""
    return hasattr(model, "_orig_mod")


def config_of(model: nn.Module) -> AdapterConfig:
    """The config that `model` was injected with. Raises `UserError` for a model without
    an adapter."""
    config: AdapterConfig | None = getattr(model, _CONFIG, None)
    if config is None:
        raise UserError(
            "the model has no adapter: call mora_ds.inject(model, MoRAConfig(...)) first"
        )
    return config


def set_cycle(model: nn.Module, config: AdapterConfig, cycle: int) -> None:
    """Gives every layer its operator of a cycle."""
    for name, layer in mora_layers(model).items():
        layer.spec = config.in_cycle(layer.spec, name, cycle)


def spec_of(config: AdapterConfig, name: str, module: nn.Module) -> UpdateSpec:
    """The spec in the first cycle of the layer that replaces `module`."""
    d_in, d_out = linear_shape(module)
    if isinstance(module, ExpertStack):
        setting = f"`target_modules` includes {name}, which are experts"
        require(config.adapter, Capability.EXPERTS, setting)
        of_expert = config.of_expert(name, module.experts_per_token)
        expert_spec = of_expert.operator_for(name, d_in, d_out, cycle=0)
        return StackSpec(module.count, expert_spec)
    return config.operator_for(name, d_in, d_out, cycle=0)


def frozen_buffers(model: nn.Module, once: bool = False) -> dict[str, Tensor]:
    """Name -> frozen base tensor, with every name of a tied tensor, or `once` by its
    first name, and scales of quantized weights; not the buffers that the model had
    before."""
    names: set[str] = getattr(model, "_mora_frozen", set())
    buffers = model.named_buffers(remove_duplicate=once)
    return {name: tensor for name, tensor in buffers if name in names}


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """`frozen_buffers` without scales, by the parameters' names before injection."""
    scales = scale_names(model)
    names = {
        f"{name}.weight": layer.spec.weight_name(name)
        for name, layer in mora_layers(model).items()
    }
    frozen = frozen_buffers(model).items()
    return {
        names.get(name, name): tensor for name, tensor in frozen if name not in scales
    }


def scale_names(model: nn.Module) -> set[str]:
    """Names of the buffers that hold scales of weights in 8 or 4 bits."""
    return {f"{name}.weight_scales" for name in quantized_layers(model)}


def base_elements(model: nn.Module) -> int:
    """Elements of the frozen base, each tied tensor once, packed or not, without
    scales."""
    quantized = quantized_layers(model).values()
    packed = {id(layer.weight): math.prod(layer.shape) for layer in quantized}
    weights = {id(weight): weight for weight in base_weights(model).values()}
    return sum(packed.get(key, weight.numel()) for key, weight in weights.items())


def count_parameters(model: nn.Module) -> int:
    """Elements of parameters and frozen base, each tied tensor once; without scales."""
    trained = sum(parameter.numel() for parameter in model.parameters())
    return trained + base_elements(model)


def move_base(
    model: nn.Module,
    device: torch.device | str,
    dtype: torch.dtype,
    on_host: Collection[str] = (),
) -> None:
    """Moves and casts the frozen base, each tied tensor once; scales of quantized
    weights stay fp32. The tensors named by `on_host` go to the CPU instead.

    `nn.Module.to` would move buffers one by one and so untie tied ones, and DeepSpeed
    casts parameters, not buffers (runtime/engine.py, `_cast_module_mixed_precision`).
    """
    moved = {}
    scales = scale_names(model)
    for name, tensor in frozen_buffers(model, once=True).items():
        casts = tensor.is_floating_point() and name not in scales
        where = "cpu" if name in on_host else device
        moved[name] = tensor.to(where, dtype if casts else tensor.dtype)
    put_frozen(model, moved)


def put_frozen(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts `tensors` in place of frozen ones, by name; a tied one under all its
    names."""
    frozen = frozen_buffers(model)
    new = {id(frozen[name]): tensor for name, tensor in tensors.items()}
    for name, old in frozen.items():
        if id(old) in new:
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent)._buffers[child] = new[id(old)]


def _reset_kernels(model: Any) -> None:
    """Restore the forward methods that transformers has replaced by kernels of the Hub.
    Such a kernel may replace a module with target layers in it, and need not call them
    (transformers' modeling_utils.py, `set_use_kernels`; the default from 5.25 on)."""
    if getattr(model, "use_kernels", False):
        model.set_use_kernels(False)


def _refuse_shared(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """A weight of two modules, or a module of two names, cannot have one adapter."""
    owners: Counter[int] = Counter()
    occurrences: Counter[int] = Counter()
    for module in model.modules():
        owners.update(map(id, module._parameters.values()))
        occurrences.update(map(id, module._modules.values()))
    for name, module in targets.items():
        if owners[id(module.weight)] > 1 or occurrences[id(module)] > 1:
            raise UserError(
                f"`target_modules` includes {name!r}, whose weight is tied to another module (the embeddings?): "
                "a merge would change both. Leave it out, or use `train_head`"
            )


def _trained_parameters(model: nn.Module, config: AdapterConfig) -> set[int]:
    """ids of the other trained parameters (modules_to_save)."""
    head = output_head(model)
    if config.train_head and head is None:
        raise UserError("`train_head`: this model has no output head")
    trained: set[int] = set()
    for module in (*language_model(model).modules(), head):
        trains = config.train_embeddings and isinstance(module, nn.Embedding)
        trains |= config.train_norms and "norm" in type(module).__name__.lower()
        trains |= config.train_head and module is head
        if module is not None and trains:
            trained.update(map(id, module.parameters(recurse=False)))
    for pattern in adapter_type(config.adapter).trainables:
        named = model.named_parameters()
        trained |= {id(tensor) for name, tensor in named if fnmatchcase(name, pattern)}
    return trained


def _freeze_to_buffers(model: nn.Module, trained: set[int]) -> None:
    """Makes all parameters but the adapters' and `trained` ones buffers, tied ones
    once."""
    frozen: dict[int, Tensor] = {}
    names: set[str] = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, AdaptedLinear):
            names |= {prefix + name for name, _ in module.named_buffers(recurse=False)}
            continue
        for name, parameter in list(module._parameters.items()):
            if parameter is None or id(parameter) in trained:
                continue
            tensor = frozen.setdefault(id(parameter), parameter.data)
            del module._parameters[name]
            module.register_buffer(name, tensor, persistent=False)
            names.add(prefix + name)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model._mora_frozen = names  # type: ignore[assignment]


def _shape_rows(specs: Mapping[str, UpdateSpec]) -> tuple[ShapeRow, ...]:
    groups: dict[tuple[str, int, int], list[UpdateSpec]] = {}
    for name, spec in specs.items():
        kind = (ending_of(name), spec.d_in, spec.d_out)
        groups.setdefault(kind, []).append(spec)
    return tuple(
        ShapeRow(
            *kind,
            count=len(alike),
            size=min(spec.size for spec in alike),
            params=sum(math.prod(spec.trained_shape) for spec in alike),
        )
        for kind, alike in groups.items()
    )


def layer_for(
    config: AdapterConfig,
    base: Any,
    spec: UpdateSpec,
    name: str,
    domains: Domains | None,
) -> AdaptedLinear:
    """The layer that replaces `base`, called `name` in its model, in cycle 0. Raises
    `UserError` for experts that would have domains."""
    adapter = adapter_type(config.adapter)
    layer: AdaptedLinear
    if isinstance(base, ExpertStack):
        if domains is not None:
            raise UserError(
                f"research.domain_adapters: {name} are experts, which can have no domains: leave them out"
            )
        layer = loaded(adapter.expert_layer)(base, spec, config.dropout)
    elif domains is not None:
        layer = loaded(adapter.domain_layer)(base, spec, domains, config.dropout)
    else:
        options = config.layer_options(name)
        layer = loaded(adapter.layer)(base, spec, config.dropout, **options)
    return layer
