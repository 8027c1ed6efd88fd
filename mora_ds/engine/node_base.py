"""The frozen base in host memory, which the processes of a node share
(`runtime/node_memory.py`).

    share_base(model, ranks)      in `mora_ds.initialize`: moves the weights to memory of the node
    node_base_of(model)           which processes share them, for a merge (`remora.merge.rebuild_weights`)

No other run ever trusts this memory: a resumed run forms its weights from the original
ones and the merge ledger, as one that shares nothing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mora_ds.adapters.inject import frozen_buffers, put_frozen
from mora_ds.common.errors import RunError
from mora_ds.common.tensor_files import Tensors
from mora_ds.models.decoder_layers import LINE, within_line
from mora_ds.runtime.node_memory import SharedMemory, node_members, require_memory, trim
from mora_ds.runtime.ranks import Ranks, balanced

logger = logging.getLogger(__name__)


@dataclass
class NodeBase:
    """What the processes of a node share of a base, and what this one writes of it."""

    ranks: Ranks | None = None
    """None where no process of the run shares anything."""
    members: tuple[int, ...] = (0,)
    """Ranks of the processes that share it; this one alone if none do."""
    slots: Tensors = field(default_factory=dict)
    """Name of a buffer -> its place in the memory of the node."""

    def copy(self, frozen: Tensors) -> None:
        """Copy this process's part of the buffers into the memory of the node."""
        sizes = {name: slot.nbytes for name, slot in self.slots.items()}
        for name in self.written_here(sizes):
            self.slots[name].copy_(frozen[name])

    def shares(self, layer: str) -> bool:
        """Whether the weight of this adapted layer lies in the memory of the node."""
        return f"{layer}.weight" in self.slots

    def written_here(self, sizes: Mapping[str, int]) -> list[str]:
        """The names that this process writes: about an equal part of the sum of
        sizes."""
        if self.ranks is None:
            return list(sizes)
        mine = set(
            balanced(sizes, len(self.members))[self.members.index(self.ranks.rank)]
        )
        return [name for name in sizes if name in mine]


_NODE_BASES: WeakKeyDictionary[nn.Module, NodeBase] = WeakKeyDictionary()


def node_base_of(model: nn.Module) -> NodeBase:
    """What `share_base` made of the model's base, or a base of this process alone."""
    return _NODE_BASES.get(model) or NodeBase()


# -- the start -------------------------------------------------------------------------


def share_base(model: nn.Module, ranks: Ranks) -> None:
    """Let the processes of a node share what lies in host memory of a frozen base.

    Collective; the base must be the same on all processes.
    """
    frozen = {
        name: tensor
        for name, tensor in frozen_buffers(model, once=True).items()
        if tensor.device.type == "cpu"
    }
    before = node_base_of(model).slots
    if before and all(frozen.get(name) is slot for name, slot in before.items()):
        # Another engine for the same model
        return
    base = _NODE_BASES[model] = _shared(frozen, ranks)
    ranks.agree(
        "copy of the base to the memory of the node",
        partial(base.copy, frozen),
        long=True,
    )
    put_frozen(model, base.slots)
    del frozen
    trim()


def _shared(frozen: Tensors, ranks: Ranks) -> NodeBase:
    members = node_members(ranks)
    layout = _Layout.of(frozen)
    is_shared = len(members) > 1
    is_first_of_node = is_shared and ranks.rank == members[0]

    def check_room() -> None:
        if is_first_of_node:
            what = "the base that the processes of this node share"
            require_memory(layout.size, what, ": --base_bits 8 takes less")

    ranks.agree("memory for the base of the node", check_room)
    storage, problem = _map(ranks, members, layout if is_shared else None)
    if problem:
        logger.warning(
            "warning: each process has a frozen base of its own: %s", problem
        )
    any_shares = any(ranks.gather("processes that share a base", storage is not None))
    if storage is None:
        return NodeBase(ranks if any_shares else None, (ranks.rank,))
    slots = {name: layout.view(storage, name, frozen[name]) for name in frozen}
    return NodeBase(ranks, members, slots)


@dataclass(frozen=True)
class _Layout:
    """Where each buffer lies in the memory of the node."""

    offsets: dict[str, int]
    size: int
    digest: str

    @classmethod
    def of(cls, frozen: Tensors) -> _Layout:
        offsets = {}
        end = 0
        for name, tensor in frozen.items():
            offsets[name] = -(-end // LINE) * LINE + within_line(tensor)
            end = offsets[name] + tensor.nbytes
        facts = [
            (offsets[name], tensor.shape, tensor.stride(), tensor.dtype)
            for name, tensor in frozen.items()
        ]
        return cls(offsets, end, hashlib.sha256(repr(facts).encode()).hexdigest())

    def view(self, storage: torch.UntypedStorage, name: str, like: Tensor) -> Tensor:
        """The buffer's place in the memory of the node, shaped as `like`."""
        # The strides of `like`, unless its elements overlap
        strides = torch.empty_like(like, device="meta").stride()
        slot = torch.empty(0, dtype=like.dtype)
        slot.set_(storage, self.offsets[name] // like.itemsize, like.shape, strides)
        vars(slot).update(vars(like))
        return slot


def _map(
    ranks: Ranks,
    members: tuple[int, ...],
    layout: _Layout | None,
) -> tuple[torch.UntypedStorage | None, str]:
    """(memory of the node, mapped into this process; what kept one of its processes
    from it). Collective; `layout` None on a node that shares nothing."""
    mine = None
    problem = ""
    if layout is not None and ranks.rank == members[0]:
        try:
            mine = SharedMemory.create(layout.size, layout.digest)
        # AttributeError where there is no memfd_create, which only Linux has
        except (OSError, AttributeError) as error:
            problem = f"no memory can be shared: {error}"
    facts = None if mine is None else astuple(mine)
    offer, problem = ranks.gather("memory of the node", (facts, problem))[members[0]]
    storage = None
    if layout is not None and offer is not None:
        try:
            storage = SharedMemory(*offer).map(layout.digest)
        except RunError as error:
            problem = str(error)
    problems = ranks.gather("mapping of the memory of the node", problem)
    if mine is not None:
        mine.close()
    problem = next(filter(None, (problems[rank] for rank in members)), "")
    return (None if problem else storage), problem
