"""Whether a node has room for the base that its processes share (--node_base), before any weight is read."""

from __future__ import annotations

from typing import Any

import torch

from mora_ds.adapters.layer import linear_shape
from mora_ds.adapters.target_modules import match_targets
from mora_ds.config.arguments import Arguments
from mora_ds.engine.device import is_cpu
from mora_ds.planning.step import Work, planned_model
from mora_ds.runtime.node_memory import Sharing, check_room, node_members
from mora_ds.runtime.ranks import Ranks


def check_node_base(arguments: Arguments, config: Any, dtype: torch.dtype, ranks: Ranks) -> None:
    """Raise `UserError` where a node lacks the memory for what will be written there.
    `config`: of the model. Collective. On a GPU, --base_device host has a check of its own."""
    if arguments.adapter.is_control or not is_cpu():
        return
    members = node_members(ranks)
    shares = arguments.model.node_base != Sharing.PRIVATE.value and len(members) > 1
    is_first = shares and ranks.rank == members[0]

    def check() -> None:
        if is_first and (needed := _bytes_written(arguments, config, dtype)):
            check_room(needed)

    ranks.agree("room for the base of the node", check)


def _bytes_written(arguments: Arguments, config: Any, dtype: torch.dtype) -> int:
    """Bytes of the weights that merges change, or that are held in 8 bits."""
    adapter = arguments.adapter
    if not (adapter.merge_every > 0 or adapter.base_bits == 8):
        return 0
    model = planned_model(
        Work(config, None, seq_len=1, dtype=dtype, trust_remote_code=arguments.model.trust_remote_code)
    )
    layers: list[Any] = list(match_targets(model, tuple(adapter.target_modules)).values())
    if adapter.base_bits == 8:  # and a scale in fp32 for each output
        return sum(layer.weight.numel() + 4 * layer.weight.numel() // linear_shape(layer)[0] for layer in layers)
    return sum(layer.weight.nbytes for layer in layers)
