"""Which linear layers of a model are adapted: those that patterns match, or those of a plan."""

from __future__ import annotations

import fnmatch
import re

from torch import nn

from mora_ds.adapters.config import ALL_LINEAR, AdapterConfig
from mora_ds.adapters.layer import is_linear
from mora_ds.common.errors import UserError, nearest


def targets_of(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """Name -> linear layer for every layer that `config` adapts, in the model's order. Raises `UserError` for a pattern
    that matches nothing, and for planned layers that the model does not have."""
    if not config.planned_layers:
        return match_targets(model, config.target_modules)
    linear = _linear_layers(model)
    planned = set(config.planned_layers)
    if missing := sorted(planned - linear.keys()):
        more = f"\nand {len(missing) - 3} more" if len(missing) > 3 else ""
        named = "".join(f"\n{name}.{nearest(name, linear)}" for name in missing[:3])
        raise UserError(f"--targets: the plan names linear layers that the model does not have:{named}{more}")
    return {name: module for name, module in linear.items() if name in planned}


def match_targets(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, nn.Module]:
    """Name -> linear layer for every layer that a pattern matches, in the model's order. Raises `UserError` for a
    pattern that matches nothing."""
    linear = _linear_layers(model)
    chosen: set[str] = set()
    for pattern in patterns:
        matched = _match(pattern, linear, model)
        if not matched:
            endings = sorted({ending_of(name) for name in linear})
            raise UserError(
                f"--target_modules {pattern!r} matches no linear layer; there are: {', '.join(endings)}."
                + nearest(pattern, endings)
            )
        chosen |= matched
    return {name: module for name, module in linear.items() if name in chosen}


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    if not linear:
        raise UserError("the model has no nn.Linear or Conv1D layer that could be adapted")
    return linear


def _match(pattern: str, linear: dict[str, nn.Module], model: nn.Module) -> set[str]:
    if pattern == ALL_LINEAR:
        head = output_head(model)
        return {name for name, module in linear.items() if module is not head}
    if pattern.startswith("re:"):
        try:
            regex = re.compile(pattern[3:])
        except re.error as error:
            raise UserError(f"--target_modules {pattern!r} is no regular expression: {error}") from error
        return {name for name in linear if regex.fullmatch(name)}
    if any(sign in pattern for sign in "*?["):
        return {name for name in linear if fnmatch.fnmatchcase(name, pattern)}
    return {name for name in linear if name == pattern or name.endswith("." + pattern)}


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer from hidden states to logits, if the model names it."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if get else None


def ending_of(name: str) -> str:
    """The last part of a module's name, such as q_proj."""
    return name.rsplit(".", 1)[-1]
