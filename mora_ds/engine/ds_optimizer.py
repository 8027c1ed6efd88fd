"""The optimizer's part of a DeepSpeed config: AdamW for everything, or Muon for the squares and AdamW for the rest.

    match_optimizer       fill type, muon_lr and momentum from the flags
    optimizer_problems    our defaults, and what cannot be
    uses_muon             of a resolved config

Facts about DeepSpeed are those of 0.19.8: runtime/engine.py, `_configure_basic_optimizer`, `_muon_param_groups`.
"""

from __future__ import annotations

import json
from enum import Enum
from typing import Any

from mora_ds.engine.ds_keys import AUTO, ONLY_FOR_ADAM, ONLY_FOR_MUON, REFUSED_WITH_MUON, at, fill, refused_keys

NEVER = 2**31 - 1
"""`steps_per_print` that keeps DeepSpeed quiet: the trainer logs."""


class OptimizerKind(str, Enum):
    """What trains the squares; all else is trained by AdamW."""

    ADAMW = "adamw"
    MUON = "muon"


_NAMES = {OptimizerKind.ADAMW: ("AdamW", "Adam"), OptimizerKind.MUON: ("Muon",)}
"""What DeepSpeed calls them; the first is what "auto" becomes."""


def match_optimizer(config: dict[str, Any], kind: OptimizerKind, muon_rate: float, momentum: float) -> list[str]:
    """Fills what the flags say, and names what contradicts them."""
    names, found = _NAMES[kind], at(config, "optimizer.type")
    others = {name.lower() for other, of_it in _NAMES.items() if other is not kind for name in of_it}
    taken = found not in (None, AUTO) and str(found).lower() not in others  # an unknown one is told of later
    name = found if taken else names[0]
    wanted: list[tuple[str, Any, str]] = [("optimizer.type", name, f"--optimizer = {kind.value}")]
    if kind is OptimizerKind.MUON:
        wanted.append(("optimizer.params.muon_lr", muon_rate, f"--muon_learning_rate = {muon_rate}"))
        wanted.append(("optimizer.params.momentum", momentum, f"--muon_momentum = {momentum}"))
    return [problem for path, value, flag in wanted for problem in fill(config, path, value, flag)]


def uses_muon(ds_config: dict[str, Any]) -> bool:
    """Whether a resolved config trains the squares by Muon."""
    return str(at(ds_config, "optimizer.type")).lower() == OptimizerKind.MUON.value


def optimizer_problems(config: dict[str, Any]) -> list[str]:
    """AdamW of torch, which needs no compiler, also for states offloaded to the CPU; and a quiet engine."""
    optimizer = config.setdefault("optimizer", {})
    kind = optimizer.setdefault("type", "AdamW")
    # "torch_adam": false gives DeepSpeed's own: FusedAdam, or CPUAdam with offload_optimizer, built at first use.
    params = optimizer.setdefault("params", {})
    if params.setdefault("torch_adam", True) and "bias_correction" in params:
        return ['optimizer.params.bias_correction is for DeepSpeed\'s own Adam ("torch_adam": false)']
    config.setdefault("steps_per_print", NEVER)
    config.setdefault("wall_clock_breakdown", False)
    known = {name.lower() for of_it in _NAMES.values() for name in of_it}
    if not isinstance(kind, str) or kind.lower() not in known:
        return [
            f"optimizer.type must be AdamW, Adam or Muon, got {json.dumps(kind)}: merges reset the optimizer's state"
        ]
    misplaced = params.keys() & (ONLY_FOR_ADAM if uses_muon(config) else ONLY_FOR_MUON)
    problems = [f"optimizer.params.{key} is not for {kind}" for key in sorted(misplaced)]
    return [*problems, *_muon(config)] if uses_muon(config) else problems


def _muon(config: dict[str, Any]) -> list[str]:
    """What Muon needs of the rest, and what it cannot run with (mora_ds/muon.py says what is mended instead)."""
    zero = config["zero_optimization"]
    problems = refused_keys(config, REFUSED_WITH_MUON)
    wanted: list[tuple[str, Any, str]] = []
    if zero.get("stage") == 3:
        wanted.append(("zero_optimization.reduce_scatter", False, "Muon needs whole gradients at stage 3"))
        # In low precision gradients and Muon's momentum would be gathered, and the momentum kept, in that.
        wanted.append(("communication_data_type", "fp32", "Muon's momentum is kept in that dtype at stage 3"))
    method = at(config, "optimizer.params.ns_method")
    if method not in (None, "gram", "standard"):
        problems.append(f'optimizer.params.ns_method must be "gram" or "standard", got {json.dumps(method)}')
    if at(zero, "offload_optimizer.device") == "nvme":
        problems.append('zero_optimization.offload_optimizer.device = "nvme" has not been tried with Muon: use "cpu"')
    if zero.get("compute_grad_norm") is False:
        problems.append("zero_optimization.compute_grad_norm must stay true with Muon, which is clipped by it")
    return problems + [problem for path, value, why in wanted for problem in fill(config, path, value, why)]
