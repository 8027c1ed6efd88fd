"""Which layers a tensor-parallel group splits, and how: from the model's own `base_model_tp_plan` and its config.

    colwise     a rank computes its slice of the outputs          q, k, v, gate, up
    rowwise     its slice of the inputs; the results are summed    o, down
    whole       every rank computes all of it: the fallback, told with its reason

A block (attention, MLP) is split as one or not at all. Everything is decided from the model and the degree, which are
the same on all ranks: a rank that decided for itself would leave the others waiting in a collective.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn

from mora_ds.adapters.layer import AdaptedLinear, is_linear, linear_shape


class Style(str, Enum):
    """How a linear layer is computed in a group."""

    COLWISE = "colwise"
    ROWWISE = "rowwise"
    WHOLE = "whole"


SUMMED = "replicated_with_grad_allreduce"
"""The plan's word for a norm that sees only its rank's heads: gradients are summed over the group."""


@dataclass(frozen=True)
class TensorPlan:
    """Of a model at one degree. Names are those of its modules."""

    degree: int
    styles: dict[str, Style]
    """Every linear layer."""
    blocks: tuple[str, ...]
    """The modules that are split: they get one gradient sum at their input."""
    summed: tuple[str, ...]
    """Modules within them whose parameters' gradients are summed over the group."""
    reasons: dict[str, str]
    """Why a layer runs whole."""

    def __str__(self) -> str:
        split = Counter(_ending(name) for name, style in self.styles.items() if style is not Style.WHOLE)
        lines = [f"tensor parallel, {self.degree} ranks a group, the base whole on each"]
        if split:
            lines.append(f"  split: {_counted(split)}")
        for reason in dict.fromkeys(self.reasons.values()):
            names = Counter(_ending(name) for name, why in self.reasons.items() if why == reason)
            lines.append(f"  whole on every rank: {_counted(names)} ({reason})")
        return "\n".join(lines)


def plan_of(model: nn.Module, degree: int) -> TensorPlan:
    """The plan at `degree`; at 1, what the model's own plan allows of itself. Before or after injection."""
    names = [name for name, module in model.named_modules() if _is_linear(module)]
    parents = list(dict.fromkeys(_parent(name) for name in names))
    styles, reasons = dict.fromkeys(names, Style.WHOLE), {}
    blocks, summed = [], []
    for parent in parents:
        children = [name for name in names if _parent(name) == parent]
        wanted = {name: _planned(model, name) for name in children}
        reason = _obstacle(model, parent, wanted, degree)
        if reason:
            reasons.update(dict.fromkeys(children, reason))
            continue
        styles.update({name: Style(style) for name, style in wanted.items()})
        blocks.append(parent)
        summed += [name for name in _holders(model, parent) if _planned(model, name) == SUMMED]
    return TensorPlan(degree, styles, tuple(blocks), tuple(summed), reasons)


def style_in_plan(model: nn.Module) -> dict[str, Style]:
    """Style of every linear layer whatever the degree: what a grouping may hang on."""
    return plan_of(model, 1).styles


def is_attention(block: nn.Module) -> bool:
    """Whether what a block computes is cut into heads."""
    return hasattr(block, "head_dim") or hasattr(block, "head_size")


def _planned(model: nn.Module, name: str) -> str:
    """What the model's plan says of a module, "" for nothing."""
    plan = getattr(_config(model), "base_model_tp_plan", None) or {}
    prefix = getattr(model, "base_model_prefix", "")
    local = name.removeprefix(f"{prefix}.") if prefix else name
    return plan.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", local), "")


def _obstacle(model: nn.Module, block: str, wanted: dict[str, str], degree: int) -> str:
    """Why a block cannot be split; "" where it can."""
    if not getattr(_config(model), "base_model_tp_plan", None):
        return "the model has no tensor-parallel plan"
    known = {Style.COLWISE.value, Style.ROWWISE.value}
    if odd := sorted({style or "nothing" for style in wanted.values()} - known):
        return f"the model's plan says {', '.join(odd)}"
    if list(wanted.values()).count(Style.ROWWISE.value) != 1 or len(wanted) < 2:
        return "the model's plan has no pair of colwise and rowwise here"
    if others := [name for name in _holders(model, block) if _planned(model, name) not in {*known, SUMMED}]:
        return f"the model's plan leaves {_ending(others[0])} out"
    return _indivisible(model, block, wanted, degree)


def _indivisible(model: nn.Module, block: str, wanted: dict[str, str], degree: int) -> str:
    config, module = _config(model), model.get_submodule(block)
    if is_attention(module):
        heads = config.num_attention_heads
        shared = getattr(config, "num_key_value_heads", None) or heads
        if heads % degree or shared % degree:
            return f"{degree} does not divide {heads} heads and {shared} key-value heads"
    for name, style in wanted.items():
        d_in, d_out = _shape(model.get_submodule(name))
        size = d_out if style == Style.COLWISE.value else d_in
        if size % degree:
            return f"{degree} does not divide the {size} {'outputs' if size == d_out else 'inputs'} of {_ending(name)}"
    return ""


def _holders(model: nn.Module, block: str) -> list[str]:
    """Names of the modules of a block that hold weights, frozen ones (which injection has made buffers) included."""
    frozen: set[str] = getattr(model, "_mora_frozen", set())
    tensors = {name for name, _ in model.named_parameters(remove_duplicate=False)} | frozen
    return list(dict.fromkeys(name.rpartition(".")[0] for name in sorted(tensors) if name.startswith(f"{block}.")))


def _config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, AdaptedLinear) or is_linear(module)


def _shape(module: Any) -> tuple[int, int]:
    if isinstance(module, AdaptedLinear):
        return module.in_features, module.out_features
    return linear_shape(module)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _ending(name: str) -> str:
    return name.rpartition(".")[2]


def _counted(names: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" if count > 1 else name for name, count in names.items())
