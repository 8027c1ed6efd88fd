"""Which layers tensor parallelism splits, and how: from the model's own
`base_model_tp_plan` and its config.

    colwise     each rank computes a slice of the outputs                      q, k, v, gate, up
    rowwise     each rank reads a slice of the inputs; results are summed      o, down
    full        every rank computes the complete layer: the fallback, reported with its reason

A block (attention, MLP) is split completely or not at all. The plan depends on the
model and the degree only, which are the same on all ranks, as ranks with different
plans would wait for each other in collectives.
"""

import re
from dataclasses import dataclass

from torch import nn

from mora_ds.adapters.inject import frozen_buffers
from mora_ds.adapters.layer import AdaptedLinear, is_linear, linear_shape
from mora_ds.adapters.ops.spec import Style
from mora_ds.adapters.target_modules import ending_of
from mora_ds.models.decoder_layers import text_config

SUMMED = "replicated_with_grad_allreduce"
"""Transformers' style of a norm that sees some heads: its gradients are to be
summed."""


@dataclass(frozen=True)
class TensorPlan:
    """The plan of a model at one degree. Names are those of its modules."""

    degree: int
    styles: dict[str, Style]
    """How each linear layer is split, or that it is not."""
    blocks: tuple[str, ...]
    """The modules that are split, whose inputs' gradients are to be summed."""
    summed: tuple[str, ...]
    """Modules within them whose parameters' gradients are summed over the group."""
    reasons: dict[str, str]
    """Why a layer is not split."""

    def __str__(self) -> str:
        lines = [
            f"tensor parallel, {self.degree} ranks a group; every rank has the complete base"
        ]
        for reason in dict.fromkeys(self.reasons.values()):
            unsplit = [
                ending_of(name) for name in self.reasons if self.reasons[name] == reason
            ]
            names = ", ".join(dict.fromkeys(unsplit))
            lines.append(f"  computed completely on every rank: {names} ({reason})")
        return "\n".join(lines)


def tp_plan_of(model: nn.Module, degree: int) -> TensorPlan:
    """The plan at `degree`, before or after injection; 1: all that could be split."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLinear) or is_linear(module)
    ]
    parents = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    styles = dict.fromkeys(names, Style.FULL)
    reasons = {}
    blocks = []
    summed = []
    for parent in parents:
        children = [name for name in names if name.rpartition(".")[0] == parent]
        wanted = {name: _planned(model, name) for name in children}
        reason = _obstacle(model, parent, wanted, degree)
        if reason:
            reasons.update(dict.fromkeys(children, reason))
            continue
        styles.update({name: Style(style) for name, style in wanted.items()})
        blocks.append(parent)
        holders = _holders(model, parent)
        summed += [name for name in holders if _planned(model, name) == SUMMED]
    return TensorPlan(degree, styles, tuple(blocks), tuple(summed), reasons)


def _planned(model: nn.Module, name: str) -> str:
    """The style that the model's plan has for a module; "" for none."""
    plan = getattr(text_config(model), "base_model_tp_plan", None) or {}
    prefix = getattr(model, "base_model_prefix", "")
    local = name.removeprefix(f"{prefix}.") if prefix else name
    return plan.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", local), "")


def _obstacle(model: nn.Module, block: str, wanted: dict[str, str], degree: int) -> str:
    """Why a block cannot be split; "" where it can be."""
    config = text_config(model)
    if not getattr(config, "base_model_tp_plan", None):
        return "the model has no tensor-parallel plan"
    known = {Style.COLWISE.value, Style.ROWWISE.value, SUMMED}
    for name in (*wanted, *_holders(model, block)):
        style = _planned(model, name)
        if style not in known:
            return f"the model's plan has {style or 'nothing'} for {ending_of(name)}"
    styles = list(wanted.values())
    if SUMMED in styles or styles.count(Style.ROWWISE.value) != 1 or len(styles) < 2:
        return "the model's plan has no pair of colwise and rowwise here"
    module = model.get_submodule(block)
    if hasattr(module, "head_dim") or hasattr(module, "head_size"):
        # Attention is split by heads
        heads = config.num_attention_heads
        shared = getattr(config, "num_key_value_heads", None) or heads
        if heads % degree or shared % degree:
            return (
                f"{degree} does not divide {heads} heads and {shared} key-value heads"
            )
    for name, style in wanted.items():
        d_in, d_out = linear_shape(model.get_submodule(name))
        is_colwise = style == Style.COLWISE.value
        size = d_out if is_colwise else d_in
        if size % degree:
            side = "outputs" if is_colwise else "inputs"
            return f"{degree} does not divide the {size} {side} of {ending_of(name)}"
    return ""


def _holders(model: nn.Module, block: str) -> list[str]:
    """Names of the modules of a block that hold weights, frozen or not."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = parameters.keys() | frozen_buffers(model).keys()
    inside = sorted(name for name in tensors if name.startswith(f"{block}."))
    return list(dict.fromkeys(name.rpartition(".")[0] for name in inside))
