"""The plan of which layers get a MoRA matrix and of what side: a file that people read, edit and give to --targets.

    targets.yaml      format, model, fingerprint, budget, by, operator, layers: {name: side}

A layer with side 0, or without a line, gets none. The same plan gives the same bytes; the comments (parameters, score)
are for people only. `with_sizes` puts a plan into the config of the adapter, which checkpoints, portable adapters and
exports carry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import yaml

from mora_ds.adapters.config import MoRAConfig
from mora_ds.common.errors import UserError, nearest
from mora_ds.common.files import atomic_path, load_yaml
from mora_ds.common.untrusted import MAX_SIDE, file_name, shown, typed

TARGETS_FILE = "targets.yaml"
AUTO = "auto"
BY_WEIGHTS, BY_PROBE, BY_HAND = "weights", "probe", "hand"

_BUDGET = "--trainable_budget"
_FLAG = "--targets"
_HEAD = """\
# Which layers get a MoRA matrix, and of what side (r_hat; it has r_hat^2 parameters): --targets THIS_FILE.
# You may edit it: 0, or no line, is no matrix; sides are even for rotate, and at most the layer's longer side.
"""


@dataclass(frozen=True)
class TargetPlan:
    """Sides of the MoRA matrices of one model's layers."""

    model: str
    """Name of the model, for people."""
    fingerprint: str
    """`BaseCheckpoint.fingerprint` of the base that the plan is for."""
    sides: Mapping[str, int]
    """Layer -> r_hat, in the model's order; 0: no matrix."""
    budget: str = ""
    """The value of --trainable_budget, 0.5% or a number; "" for none."""
    by: str = BY_HAND
    """Where the scores come from: weights, probe, or hand for none."""
    operator: str = ""
    """The operator that the sides were made for; "" if unknown."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """For the comments in the file; not read back."""

    @property
    def parameters(self) -> int:
        return sum(side**2 for side in self.sides.values())

    def __str__(self) -> str:
        chosen = [side for side in self.sides.values() if side]
        within = f" of a budget of {self.budget}" if self.budget else ""
        return (
            f"plan by {self.by}: {len(chosen)} of {len(self.sides)} layers, sides {min(chosen)} to {max(chosen)}, "
            f"{self.parameters:,} parameters{within}"
        )

    def text(self) -> str:
        """The contents of the file."""
        facts = {
            "format": 1, "model": self.model, "fingerprint": self.fingerprint, "budget": self.budget, "by": self.by,
            "operator": self.operator,
        }  # fmt: skip
        lines = [f"  {_scalar(name)}: {side}{self._note(name, side)}" for name, side in self.sides.items()]
        return "\n".join([_HEAD + yaml.safe_dump(facts, sort_keys=False).rstrip(), "layers:", *lines, ""])

    def _note(self, name: str, side: int) -> str:
        notes = [f"{side**2:,} parameters"] if side else []
        notes += [f"score {self.scores[name]:.3e}"] if name in self.scores else []
        return f"    # {', '.join(notes)}" if notes else ""

    def write(self, path: Path) -> None:
        """Atomically. Raises `RunError` on a full disk."""
        with atomic_path(path) as beside:
            beside.write_text(self.text(), encoding="utf-8")


def read_plan(path: Path) -> TargetPlan:
    """The plan in a file. Raises `UserError` naming the file where it is no YAML, or a key or a side is wrong."""
    content = load_yaml(str(path), _FLAG)
    known = ("format", "model", "fingerprint", "budget", "by", "operator", "layers")
    for key in content:
        if key not in known:
            raise UserError(f"{_FLAG} {path}: unknown key {key!r}.{nearest(str(key), known)}")
    if content.get("format") != 1:
        raise UserError(f"{_FLAG} {path}: format is {content.get('format')!r}, and only 1 is known")
    for key in ("fingerprint", "layers"):
        if not content.get(key):
            raise UserError(f"{_FLAG} {path}: there is no {key!r} in it")
    layers = content["layers"]
    if not isinstance(layers, dict):
        raise UserError(f"{_FLAG} {path}: layers must be lines of `name: side`, not a {type(layers).__name__}")
    sides = {file_name(str(name), f"{_FLAG} {path}"): _side(path, name, side) for name, side in layers.items()}
    if not any(sides.values()):
        raise UserError(f"{_FLAG} {path}: no layer has a side above 0")
    texts = (str(content.get(key) or "") for key in known[1:6])
    model, fingerprint, budget, by, operator = (typed(str, text, f"{_FLAG} {path}") for text in texts)
    return TargetPlan(model, fingerprint, sides, budget, by or BY_HAND, operator)


def check_model(plan: TargetPlan, path: Path, model: str, fingerprint: str) -> None:
    """Raises `UserError` when the plan is for another model's weights."""
    if plan.fingerprint != fingerprint:
        raise UserError(
            f"{_FLAG} {path} is a plan for {plan.model or 'a model'} with the fingerprint {plan.fingerprint}; "
            f"{model} has {fingerprint}: make one for it (mora-ds analyze --write)"
        )


def with_sizes(config: MoRAConfig, sides: Mapping[str, int], where: str = _FLAG) -> MoRAConfig:
    """`config` with MoRA matrices of these sides on these layers and no others. Raises `UserError` naming `where` for a
    side that the operator does not take."""
    try:
        return replace(config, layer_sizes=tuple((name, side) for name, side in sides.items() if side))
    except UserError as error:
        raise UserError(str(error).replace(_FLAG, where)) from error


def parse_budget(text: str, parameters: int | None = None) -> int:
    """The number of parameters that "0.5%" (of the model's `parameters`) or "250000" stands for; without `parameters`
    the text is only checked. Raises `UserError` naming --trainable_budget where it is no budget."""
    number, is_share = text.strip().removesuffix("%").replace("_", ""), text.strip().endswith("%")
    try:
        value = Decimal(number)
    except InvalidOperation:
        raise UserError(f"{_BUDGET} must be like 0.5% or 250000, got {text!r}") from None
    if not (value.is_finite() and value > 0):
        raise UserError(f"{_BUDGET} must be above 0, got {text!r}")
    if value >= 2**63:
        raise UserError(f"{_BUDGET} must be below {2**63}, got {text!r}")
    if is_share:
        return int(value * (parameters or 0) / 100)
    if value != value.to_integral_value():
        raise UserError(f"{_BUDGET} {text} is no whole number of parameters: did you mean {text}%?")
    return int(value)


def _scalar(text: str) -> str:
    """A string as a YAML scalar, quoted where it must be."""
    return yaml.safe_dump(text, width=10_000).removesuffix("\n").removesuffix("\n...")


def _side(path: Path, name: Any, side: Any) -> int:
    if isinstance(side, bool) or not isinstance(side, int) or not 0 <= side <= MAX_SIDE:
        raise UserError(f"{_FLAG} {path}: the side of {name} must be a whole number, 0 for none, got {shown(side)}")
    return side
