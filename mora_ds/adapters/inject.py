"""Match, replace, freeze, report: a Hugging Face model becomes a model with squares (or, as a control, LoRA's factors).

inject(model, MoRAConfig(rank=8))
  1. every matched linear layer becomes an `AdaptedLinear`       nothing matched is an error that lists what there is
     (base_bits 8: with its weight in 8 bits, and no other)
  2. every other parameter not to be trained becomes a buffer       tied tensors stay one tensor
  3. a report: shapes, sizes, trainable and total parameters
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mora_ds.adapters.config import ALL_LINEAR, AdapterConfig, Freeze, MoRAConfig
from mora_ds.adapters.domains import DomainLinear, Domains, frozen_values, told_of_domains
from mora_ds.adapters.layer import AdaptedLinear, adapt, linear_shape
from mora_ds.adapters.new_embeddings import train_new_rows
from mora_ds.adapters.ops.linear import Compute
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import Side, UpdateSpec
from mora_ds.adapters.target_modules import ending_of, output_head, targets_of
from mora_ds.adapters.tp_plan import Style, style_in_plan
from mora_ds.errors import RunError, UserError


@dataclass(frozen=True)
class ShapeRow:
    """All layers of one name ending and shape, e.g. the 32 q_proj of a model."""

    name: str
    count: int
    d_in: int
    d_out: int
    size: int
    """Side of the square (the smallest, where a plan gives them several), or LoRA's rank."""
    params: int
    """Of all `count` layers' squares (factors) together."""
    note: str


@dataclass(frozen=True)
class InjectionReport:
    """What `inject` did. Counts are in parameters, each tied tensor counted once."""

    rows: tuple[ShapeRow, ...]
    operator: str
    values: str
    """What the layers have been given: squares, or factors."""
    square_params: int
    """Elements of all of them."""
    other_trainable_params: int
    total_params: int
    eight_bits: tuple[int, int]
    """Bytes of what is frozen in 8 bits, scales included, and what it took before; (0, 0) where nothing is."""
    left_out: dict[str, int]
    """With all-linear: elements of the frozen matrices in no linear layer (experts in one tensor, convolutions), by the
    end of their name."""
    domains: str = ""
    """Of the squares beside the shared ones, where there are any."""

    @property
    def trainable_params(self) -> int:
        return self.square_params + self.other_trainable_params

    def __str__(self) -> str:
        size = "r_hat" if self.values == "squares" else "rank"
        head = f"{'layer':<20} {'count':>5} {'d_in':>7} {'d_out':>7} {size:>6} {self.values:>13}"
        lines = [head, "-" * len(head)]
        for row in self.rows:
            note = f"  {row.note}" if row.note else ""
            lines.append(
                f"{row.name:<20} {row.count:>5} {row.d_in:>7} {row.d_out:>7} {row.size:>6} {row.params:>13,}{note}"
            )
        share = 100 * self.trainable_params / self.total_params
        lines.append(
            f"operator {self.operator}: trainable {self.trainable_params:,} "
            f"({self.values} {self.square_params:,}, other {self.other_trainable_params:,}) "
            f"of {self.total_params:,} parameters = {share:.3f}%"
        )
        if self.domains:
            lines.append(self.domains)
        if self.eight_bits[0]:
            now, before = (f"{size / 1e6:,.1f} MB" for size in self.eight_bits)
            lines.append(f"frozen weights of these layers in 8 bits: {now}, scales included, in place of {before}")
        if self.left_out:
            names = ", ".join(f"{name} ({numel:,} parameters)" for name, numel in self.left_out.items())
            lines.append(f"left as they are, for they are no linear layers: {names}")
        return "\n".join(lines)


def inject(model: nn.Module, config: AdapterConfig, original: Callable[[str], Tensor] | None = None) -> InjectionReport:
    """Give `model` its squares (`MoRAConfig`) or factors (`LoRAConfig`) and freeze the rest, in place.

    With `base_bits` 8, `original` says what a weight (by its name) was before it was loaded in the model's dtype, on
    the device where it is to be: that is rounded to 8 bits then, and the model's own is dropped.
    Raises `UserError` when a target matches nothing, when the model already has an adapter, when a target shares its
    weight with another module (a merge would change both), or is to be trained as a whole.
    """
    if mora_layers(model):
        raise UserError("this model already has an adapter: inject it once")
    targets = targets_of(model, config)
    _refuse_shared(model, targets)
    keep = _trainable_tensors(model, config)
    _refuse_trained(targets, keep)
    total = count_parameters(model)
    rows = _shape_rows(targets, config)
    styles = style_in_plan(model)
    domains = Domains(config.domains) if isinstance(config, MoRAConfig) and config.domains else None
    eight_bits = _refuse_unfit_for_8_bits(targets) if config.base_bits == 8 else (0, 0)
    for name, base in targets.items():
        d_in, d_out = linear_shape(base)
        aligned = _SIDES.get(styles[name])
        spec = config.operator_for(name, d_in, d_out, 0, aligned)
        layer = layer_for(config, base, spec, name, domains)
        layer.train(base.training)
        layer.aligned = aligned
        if config.base_bits == 8:
            _hold_in_8_bits(layer, f"{name}.weight", original)
        _replace(model, name, layer)
    _freeze_to_buffers(model, keep)
    if config.new_rows_from:
        train_new_rows(model, config.new_rows_from)
    layers = list(mora_layers(model).values())
    values = sum(value.numel() for layer in layers for value in layer.parameters(recurse=False))
    kept = sum(value.numel() for value in frozen_values(model).values())
    trainable = sum(parameter.numel() for parameter in model.parameters())
    named = "squares" if layers[0].spec.value_name == "square" else "factors"
    all_linear = ALL_LINEAR in config.target_modules and not config.planned_layers
    left_out = _matrices_left_out(model) if all_linear else {}
    sums = values, trainable - values, total + values + kept
    return InjectionReport(rows, config.title, named, *sums, eight_bits, left_out, told_of_domains(model))


_SIDES = {Style.COLWISE: Side.OUT, Style.ROWWISE: Side.IN}


def mora_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Module name -> layer with a square (factors), in the model's own order (the same on every rank)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def value_names(model: nn.Module) -> set[str]:
    """Parameter names of all squares (factors), those of domains included."""
    layers = mora_layers(model).items()
    return {f"{name}.{value}" for name, layer in layers for value, _ in layer.named_parameters(recurse=False)}


def set_cycle(model: nn.Module, config: AdapterConfig, cycle: int) -> None:
    """Wire every layer as cycle `cycle` wants it (fresh permutations, or the next grouping)."""
    for name, layer in mora_layers(model).items():
        layer.spec = config.operator_for(name, layer.in_features, layer.out_features, cycle, layer.aligned)


def frozen_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name -> frozen base tensor, every name of a tied tensor included, and scales of weights in 8 bits. What the model
    had as buffers is not in it."""
    names: set[str] = getattr(model, "_mora_frozen", set())
    return {name: tensor for name, tensor in model.named_buffers(remove_duplicate=False) if name in names}


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """`frozen_buffers` without the scales: what has an original."""
    scales = scale_names(model)
    return {name: tensor for name, tensor in frozen_buffers(model).items() if name not in scales}


def scale_names(model: nn.Module) -> set[str]:
    """Names of the buffers that hold scales of weights in 8 bits."""
    return {f"{name}.weight_scales" for name, layer in mora_layers(model).items() if layer.weight_scales is not None}


def count_parameters(model: nn.Module) -> int:
    """Parameters and frozen base tensors, each tied tensor once; no scales."""
    frozen = {id(tensor): tensor.numel() for tensor in base_weights(model).values()}
    return sum(parameter.numel() for parameter in model.parameters()) + sum(frozen.values())


def move_base(model: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """Move and cast the frozen base, each tied tensor once; scales of weights in 8 bits stay fp32.

    `nn.Module.to` moves buffers one by one, which would untie tied ones; and DeepSpeed casts parameters, not buffers
    (runtime/engine.py, `_cast_module_mixed_precision`).
    """
    moved: dict[int, Tensor] = {}
    scales = scale_names(model)
    for name, tensor in frozen_buffers(model).items():
        if id(tensor) not in moved:
            casts = tensor.is_floating_point() and name not in scales
            moved[id(tensor)] = tensor.to(device, dtype if casts else tensor.dtype)
        _set_buffer(model, name, moved[id(tensor)])
    for name, tensor in frozen_values(model).items():
        _set_buffer(model, name, tensor.to(device))


# -- refusals ----------------------------------------------------------------------------------------------------------
def _refuse_shared(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """Neither a weight with two owners nor a module with two places can have one square."""
    modules = list(model.modules())
    owners = Counter(id(parameter) for module in modules for parameter in module._parameters.values())
    places = Counter(id(child) for module in modules for child in module._modules.values())
    for name, module in targets.items():
        if owners[id(module.weight)] > 1 or places[id(module)] > 1:
            raise UserError(
                f"--target_modules includes {name!r}, whose weight is tied to another module (the embeddings?): "
                "merging its square would change both. Leave it out, or use --train_head"
            )


def _refuse_trained(targets: dict[str, nn.Module], keep: set[int]) -> None:
    for name, module in targets.items():
        if id(module.weight) in keep:
            raise UserError(f"--target_modules includes {name!r}, which --train_head trains as a whole: choose one")


def _refuse_unfit_for_8_bits(targets: dict[str, nn.Module]) -> tuple[int, int]:
    """Bytes in 8 bits, and now."""
    now = before = 0
    for name, module in targets.items():
        weight: Any = module.weight
        if not weight.is_floating_point():
            raise UserError(f"--base_bits 8: {name}.weight is {weight.dtype}: only floating ones are rounded")
        now += weight.numel() + 4 * linear_shape(module)[1]
        before += weight.nbytes
    return now, before


def _hold_in_8_bits(layer: AdaptedLinear, name: str, original: Callable[[str], Tensor] | None) -> None:
    try:
        layer.hold_in_8_bits(layer.weight if original is None else original(name))
    except RunError as error:
        raise UserError(f"--base_bits 8: {name}: {error}") from error


# -- replacing and freezing ------------------------------------------------------------------------------------------
def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _trainable_tensors(model: nn.Module, config: AdapterConfig) -> set[int]:
    """ids of the parameters that stay trainable beside the squares."""
    modules: list[nn.Module] = []
    if config.train_embeddings:
        modules += [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if config.train_norms:
        modules += [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    if config.train_head:
        head = output_head(model)
        if head is None:
            raise UserError("--train_head: this model has no output head")
        modules.append(head)
    return {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}


def _freeze_to_buffers(model: nn.Module, keep: set[int]) -> None:
    """Every parameter but the squares and `keep` becomes a non-persistent buffer, one object per tied tensor."""
    frozen: dict[int, Tensor] = {}
    names: set[str] = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, AdaptedLinear):
            own = {name for name, tensor in module.named_buffers(recurse=False) if tensor is not None}
            names |= {prefix + name for name in own - {*module.frozen_values}}
            continue
        for name, parameter in list(module._parameters.items()):
            if parameter is None or id(parameter) in keep:
                continue
            tensor = frozen.setdefault(id(parameter), parameter.data)
            del module._parameters[name]
            module.register_buffer(name, tensor, persistent=False)
            names.add(prefix + name)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model._mora_frozen = names  # type: ignore[assignment]


def _set_buffer(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._buffers[child] = tensor


def _matrices_left_out(model: nn.Module) -> dict[str, int]:
    """Frozen by `_freeze_to_buffers`, of two dimensions or more, and neither adapted nor embedding nor head."""
    head = output_head(model)
    found: Counter[str] = Counter()
    for path, module in model.named_modules():
        if not isinstance(module, (AdaptedLinear, nn.Embedding)) and module is not head:
            for name, tensor in module.named_buffers(recurse=False):
                if f"{path}.{name}" in model._mora_frozen and tensor.dim() > 1:  # type: ignore[operator]
                    found[f"{ending_of(path)}.{name}"] += tensor.numel()
    return dict(found)


def _shape_rows(targets: dict[str, nn.Module], config: AdapterConfig) -> tuple[ShapeRow, ...]:
    held: dict[tuple[str, int, int], list[tuple[int, int]]] = {}
    for name, module in targets.items():
        d_in, d_out = linear_shape(module)
        shape = config.operator_for(name, d_in, d_out, cycle=0).value_shape
        held.setdefault((ending_of(name), d_in, d_out), []).append(shape)
    rows = []
    for (ending, d_in, d_out), shapes in held.items():
        size, params = min(shapes)[0], sum(rows * columns for rows, columns in shapes)
        rows.append(ShapeRow(ending, len(shapes), d_in, d_out, size, params, _note(config, d_in, d_out, shapes)))
    return tuple(rows)


def _note(config: AdapterConfig, d_in: int, d_out: int, shapes: list[tuple[int, int]]) -> str:
    if config.planned_layers:
        largest = max(shapes)[0]
        return f"(to {largest}, as planned)" if largest > min(shapes)[0] else "(as planned)"
    size, wanted = shapes[0][0], config.asked_for(d_in, d_out)
    side = "longer" if isinstance(config, MoRAConfig) and not config.is_subspace else "shorter"
    return f"(rank {config.rank} asks for {wanted}: the {side} side is enough)" if size < wanted else ""


def layer_for(config: AdapterConfig, base: Any, spec: UpdateSpec, name: str, domains: Domains | None) -> AdaptedLinear:
    """The layer that takes the place of `base`, called `name` in its model, in cycle 0; with squares of domains, if
    there are any. Raises `UserError` for an update that rows cannot have of their own."""
    if domains is not None:
        if not (isinstance(config, MoRAConfig) and isinstance(spec, OperatorSpec)):
            raise UserError(
                f"--domain_adapters is for --operator truncate, share, decouple or rotate: {name} would get "
                f"{spec.describe()}"
            )
        return DomainLinear(base, spec, domains, config.dropout, Freeze(config.freeze))
    compute = Compute(config.compute) if isinstance(config, MoRAConfig) else Compute.ACTIVATION
    return adapt(base, spec, config.dropout, compute, config.first_seed(name, cycle=0))
