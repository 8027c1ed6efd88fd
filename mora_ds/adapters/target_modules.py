"""Which linear layers of a model are adapted: those that patterns match, or those of a
plan.

A pattern reaches the experts of a mixture only where it names them (`names_experts`):
`experts` for all projections, `experts.down_proj` for one, or that word in a glob or a
regular expression. Others leave them frozen, so that they mean the same in a model with
experts as in one without.
"""

from typing import Any

from torch import nn

from mora_ds.adapters.config import AdapterConfig
from mora_ds.adapters.experts import find_stacks, require_known
from mora_ds.adapters.layer import ExpertStack, is_linear
from mora_ds.adapters.target_patterns import (
    ALL_LINEAR,
    matches,
    matches_experts,
    names_experts,
)
from mora_ds.common.errors import UserError, nearest

READ_DIRECTLY = {
    "MambaMixer.x_proj",
    "MambaMixer.dt_proj",
    "MambaMixer.out_proj",
    "FalconMambaMixer.x_proj",
    "FalconMambaMixer.dt_proj",
    "FalconMambaMixer.out_proj",
    "JambaMambaMixer.dt_proj",
    "Mamba2Mixer.out_proj",
    "BambaMixer.out_proj",
    "FalconH1Mixer.out_proj",
    "GraniteMoeHybridMambaLayer.out_proj",
    "NemotronHMamba2Mixer.out_proj",
    "Zamba2MambaMixer.out_proj",
    "Gemma3nTextAltUp.prediction_coefs",
    "Gemma3nTextAltUp.correction_coefs",
}
"""Class of a module and its layer whose weight it computes with itself, without calling
the layer (transformers, models/*/modeling_*.py): an adapter there would not train.
Those of Mamba but dt_proj are read only for a fused kernel on a GPU, and those of
FalconMamba but dt_proj only by transformers 5.24; runs adapt the same layers on every
machine and with every version."""


def targets_of(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """Name -> linear layer, or projection of experts, for every one that `config`
    adapts, in the model's order. Raises `UserError` for a pattern that matches nothing,
    and for planned layers that the model does not have."""
    if not config.planned_layers:
        return match_targets(model, config.target_modules)
    known: dict[str, Any] = _linear_layers(model)
    for name, stack in find_stacks(model).items():
        if isinstance(stack, ExpertStack):
            known[name] = stack
    planned = set(config.planned_layers)
    missing = sorted(planned - known.keys())
    if missing:
        raise UserError(
            f"research.targets: the plan names {len(missing)} linear layers that the model does not have, such as "
            f"{missing[0]}.{nearest(missing[0], known)}"
        )
    return _chosen(model, known, planned)


def match_targets(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, nn.Module]:
    """Name -> linear layer, or projection of experts, for every one that a pattern
    matches, in the model's order. Raises `UserError` for a pattern that matches
    nothing, and for experts of a layout that is not known."""
    linear = _linear_layers(model)
    stacks = find_stacks(model)
    chosen: set[str] = set()
    for pattern in patterns:
        matched = _match(pattern, linear, model)
        if names_experts(pattern):
            experts = {
                name: stacks[name] for name in stacks if matches_experts(pattern, name)
            }
            require_known(experts, pattern)
            matched |= experts.keys()
        if not matched:
            projections = [".".join(name.split(".")[-2:]) for name in sorted(stacks)]
            endings = [*sorted(map(ending_of, linear)), *projections]
            there = ", ".join(dict.fromkeys(endings))
            raise UserError(
                f"`target_modules` {pattern!r} matches no linear layer; there are: {there}."
                + nearest(pattern, endings)
            )
        chosen |= matched
    return _chosen(model, {**linear, **stacks}, chosen)


def _chosen(
    model: nn.Module,
    known: dict[str, Any],
    names: set[str],
) -> dict[str, nn.Module]:
    """In the order of the model's parameters, as a stack has no module yet."""
    if unused := sorted(name for name in names if _is_read_directly(model, name)):
        raise UserError(
            f"`target_modules` includes {unused[0]!r}, whose weight the model reads without calling the layer: an "
            "adapter there would not train. Leave it out, as all-linear does"
        )
    parameters = model.named_parameters(remove_duplicate=False)
    order = [name.removesuffix(".weight") for name, _ in parameters]
    return {
        name: known[name] for name in dict.fromkeys([*order, *known]) if name in names
    }


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    inside = {*language_model(model).modules(), output_head(model)}
    linear = {
        name: module
        for name, module in model.named_modules()
        if module in inside and is_linear(module)
    }
    if not linear:
        raise UserError(
            "the model has no nn.Linear or Conv1D layer that could be adapted"
        )
    return linear


def _match(pattern: str, linear: dict[str, nn.Module], model: nn.Module) -> set[str]:
    if pattern == ALL_LINEAR:
        head = output_head(model)
        return {
            name
            for name, module in linear.items()
            if module is not head and not _is_read_directly(model, name)
        }
    return {name for name in linear if matches(pattern, name)}


def _is_read_directly(model: nn.Module, name: str) -> bool:
    parent, _, child = name.rpartition(".")
    kind = type(model.get_submodule(parent)).__name__
    return f"{kind}.{child}" in READ_DIRECTLY


def language_model(model: Any) -> Any:
    """What text trains but the head: of a multimodal model its language model, without
    towers and projectors; any other model itself."""
    # transformers' composite configs have a `text_config` (configuration_utils.py,
    # `get_text_config`); modeling_utils.py, `get_decoder`, is a best effort
    text = getattr(getattr(model, "config", None), "text_config", None)
    if text is None:
        return model
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", ())
    count = getattr(text, "num_hidden_layers", None)
    return decoder if len(layers) == count else model


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer from hidden states to logits, if the model names it."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if get else None


def ending_of(name: str) -> str:
    """The last part of a module's name, such as q_proj."""
    return name.rsplit(".", 1)[-1]
