"""The optimizer's part of a DeepSpeed config: AdamW for everything, or Muon for the MoRA
matrices and AdamW for the other trained parameters.

    match_optimizer       fills type, learning rates and momentum from the flags
    optimizer_problems    sets our defaults, and lists what is refused
    uses_muon             whether a resolved config trains the MoRA matrices by Muon

Facts about DeepSpeed are those of 0.19.8: runtime/engine.py, `_configure_basic_optimizer`,
`_muon_param_groups`.
"""

import json
from enum import Enum

from mora_ds.engine.ds_keys import (
    ONLY_FOR_ADAM,
    ONLY_FOR_MUON,
    REFUSED_WITH_MUON,
    DsConfig,
    at,
    fill,
    refused_keys,
)

NEVER = 2**31 - 1
"""The value of `steps_per_print` with which DeepSpeed prints nothing: the trainer logs."""

MUON_MOMENTUM = 0.95
"""Muon's decay of the momentum."""


class OptimizerKind(str, Enum):
    """The optimizer of the MoRA matrices; the other trained parameters always have
    AdamW.
    """

    ADAMW = "adamw"
    MUON = "muon"


_NAMES = {OptimizerKind.ADAMW: "AdamW", OptimizerKind.MUON: "Muon"}
"""DeepSpeed's names of them."""


def match_optimizer(
    config: DsConfig,
    kind: OptimizerKind,
    learning_rate: float,
    other_learning_rate: float,
) -> list[str]:
    """Fill in the values of the flags. Returns what contradicts them."""
    problems = fill(config, ("optimizer.type", _NAMES[kind], f"--optimizer = {kind.value}"))
    rates = {"optimizer.params.lr": ("--learning_rate", learning_rate)}
    if kind is OptimizerKind.MUON:
        rates = {
            "optimizer.params.muon_lr": ("--learning_rate", learning_rate),
            "optimizer.params.lr": ("--embedding_learning_rate", other_learning_rate),
        }
        problems += fill(
            config,
            ("optimizer.params.momentum", MUON_MOMENTUM, f"it is {MUON_MOMENTUM} here"),
        )
    return problems + fill(
        config, *((path, rate, f"{flag} = {rate}") for path, (flag, rate) in rates.items())
    )


def uses_muon(ds_config: DsConfig) -> bool:
    """Whether a resolved config trains the MoRA matrices by Muon."""
    return bool(at(ds_config, "optimizer.type") == _NAMES[OptimizerKind.MUON])


def optimizer_problems(config: DsConfig) -> list[str]:
    """Set our defaults: torch's AdamW, which needs no compiler, also for states offloaded
    to the CPU; and an engine that prints nothing. Returns what is refused."""
    optimizer = config.setdefault("optimizer", {})
    kind = optimizer.setdefault("type", "AdamW")
    params = optimizer.setdefault("params", {})
    own_adam = fill(
        config,
        (
            "optimizer.params.torch_adam",
            True,
            "DeepSpeed's own Adam keeps its steps elsewhere",
        ),
    )
    config.setdefault("steps_per_print", NEVER)
    config.setdefault("wall_clock_breakdown", False)
    if kind not in _NAMES.values():
        return [
            f"optimizer.type must be AdamW or Muon, got {json.dumps(kind)}: merges reset the optimizer's state"
        ]
    if params.get("fused") and params.get("foreach"):
        return [
            "optimizer.params.fused and foreach are two ways to the same step: take one"
        ]
    misplaced = params.keys() & (ONLY_FOR_ADAM if uses_muon(config) else ONLY_FOR_MUON)
    problems = own_adam + [
        f"optimizer.params.{key} is not for {kind}" for key in sorted(misplaced)
    ]
    return [*problems, *_muon(config)] if uses_muon(config) else problems


def _muon(config: DsConfig) -> list[str]:
    """Set what Muon needs. Returns what it does not run with (`engine/muon.py` has what is
    repaired instead).
    """
    zero = config["zero_optimization"]
    problems = refused_keys(config, REFUSED_WITH_MUON)
    if zero.get("stage") == 3:
        problems += fill(
            config,
            (
                "zero_optimization.reduce_scatter",
                False,
                "Muon needs unsharded gradients at stage 3",
            ),
            # Else gradients and Muon's momentum would be gathered, and the momentum stored,
            # in low precision.
            (
                "communication_data_type",
                "fp32",
                "Muon's momentum is kept in that dtype at stage 3",
            ),
        )
    if at(zero, "offload_optimizer.device") not in (None, "none"):
        problems.append(
            "zero_optimization.offload_optimizer is for AdamW: Muon keeps a single momentum"
        )
    method = at(config, "optimizer.params.ns_method")
    if method not in (None, "gram", "standard"):
        problems.append(
            f'optimizer.params.ns_method must be "gram" or "standard", got {json.dumps(method)}'
        )
    if zero.get("compute_grad_norm") is False:
        problems.append(
            "zero_optimization.compute_grad_norm must stay true with Muon, which is clipped by it"
        )
    return problems
