"""The optimizer section of a DeepSpeed config: AdamW for all parameters, or Muon for the
MoRA matrices and AdamW for the other trained parameters.

    match_optimizer       fills in type, learning rates and momentum from the flags
    optimizer_problems    sets our defaults, and returns problems of the config
    uses_muon             whether a resolved config trains the MoRA matrices with Muon

Written against DeepSpeed 0.19.8: runtime/engine.py, `_configure_basic_optimizer`,
`_muon_param_groups`.
"""

import json
from collections.abc import Iterator

from mora_ds.engine.ds_keys import (
    ONLY_FOR_ADAM,
    ONLY_FOR_MUON,
    REFUSED_WITH_MUON,
    DsConfig,
    at,
    fill,
    refused_keys,
)
from mora_ds.engine.settings import OptimizerKind

NEVER = 2**31 - 1
"""Value of `steps_per_print` that disables DeepSpeed's logs, because the trainer
logs."""

MUON_MOMENTUM = 0.95
"""Decay of Muon's momentum."""


_NAMES = {OptimizerKind.ADAMW: "AdamW", OptimizerKind.MUON: "Muon"}
"""Optimizer -> its name in DeepSpeed."""


def match_optimizer(
    config: DsConfig,
    kind: OptimizerKind,
    learning_rate: float,
    other_learning_rate: float,
) -> Iterator[str]:
    """Fill in the values of the flags. Yields a message for each contradiction."""
    main_rate = f"--learning_rate = {learning_rate}"
    named = f"--optimizer = {kind.value}"
    yield from fill(config, ("optimizer.type", _NAMES[kind], named))
    if kind is not OptimizerKind.MUON:
        yield from fill(config, ("optimizer.params.lr", learning_rate, main_rate))
        return
    rest_rate = f"--embedding_learning_rate = {other_learning_rate}"
    yield from fill(
        config,
        ("optimizer.params.momentum", MUON_MOMENTUM, f"it is {MUON_MOMENTUM} here"),
        ("optimizer.params.muon_lr", learning_rate, main_rate),
        ("optimizer.params.lr", other_learning_rate, rest_rate),
    )


def uses_muon(ds_config: DsConfig) -> bool:
    """Whether a resolved config trains the MoRA matrices with Muon."""
    return at(ds_config, "optimizer.type") == _NAMES[OptimizerKind.MUON]


def optimizer_problems(config: DsConfig) -> Iterator[str]:
    """Set our defaults: torch's AdamW, which needs no compiler, also for states
    offloaded to the CPU; and no logs of DeepSpeed. Yields the problems of the
    config."""
    optimizer = config.setdefault("optimizer", {})
    kind = optimizer.setdefault("type", "AdamW")
    params = optimizer.setdefault("params", {})
    config.setdefault("steps_per_print", NEVER)
    config.setdefault("wall_clock_breakdown", False)
    if kind not in _NAMES.values():
        yield f"optimizer.type must be AdamW or Muon, got {json.dumps(kind)}: merges reset the optimizer's state"
        return
    why = "DeepSpeed's own Adam keeps its steps elsewhere"
    yield from fill(config, ("optimizer.params.torch_adam", True, why))
    misplaced = params.keys() & (ONLY_FOR_ADAM if uses_muon(config) else ONLY_FOR_MUON)
    for key in sorted(misplaced):
        yield f"optimizer.params.{key} is not for {kind}"
    if params.get("fused") and params.get("foreach"):
        yield "optimizer.params.fused and foreach exclude each other: set one of them"
    if uses_muon(config):
        yield from _muon(config)


def _muon(config: DsConfig) -> Iterator[str]:
    """Set values required by Muon. Yields a message for each setting that Muon does
    not support."""
    zero = config["zero_optimization"]
    yield from refused_keys(config, REFUSED_WITH_MUON)
    if zero.get("stage") == 3:
        unsharded = "Muon needs unsharded gradients at stage 3"
        yield from fill(config, ("zero_optimization.reduce_scatter", False, unsharded))
        # Otherwise gradients and Muon's momentum would be gathered in low precision,
        # and the momentum also stored in it
        precise = "Muon's momentum is kept in that dtype at stage 3"
        yield from fill(config, ("communication_data_type", "fp32", precise))
    if at(zero, "offload_optimizer.device") not in (None, "none"):
        yield "zero_optimization.offload_optimizer is for AdamW: --optimizer muon keeps a single momentum"
    method = at(config, "optimizer.params.ns_method")
    if method not in (None, "gram", "standard"):
        yield f'optimizer.params.ns_method must be "gram" or "standard", got {json.dumps(method)}'
    if zero.get("compute_grad_norm") is False:
        yield "zero_optimization.compute_grad_norm must stay true with Muon, because clipping needs it"
