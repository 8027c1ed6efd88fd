"""The frozen base of a node, which its processes share where it is in host memory.

    the model's files, mapped      as long as they hold the live weights: the same dtype, and nothing merged
    memory of the node             for all other weights, and from the first merge on (`runtime/node_memory.py`)

    share_base(model, "auto", ranks)      in `mora_ds.initialize`
    node_base_of(model).form(...)         a merge, a replay: each layer is written by one process of the node

No other run ever trusts this memory: a resumed run forms its weights from the original ones and the merge ledger, as
one that shares nothing. All processes wait for each other before the first weight is written, when none reads them any
more, and after the last one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mora_ds.adapters.inject import frozen_buffers, mora_layers, put_frozen
from mora_ds.common.errors import RunError
from mora_ds.runtime.mappings import Mappings, give_back, trim
from mora_ds.runtime.node_memory import Offer, Sharing, check_room, node_members
from mora_ds.runtime.ranks import Ranks, balanced

Item = TypeVar("Item")
Result = TypeVar("Result")

_LINE = 64
"""Bytes of a cache line. A weight keeps its place within one: matrix products may round otherwise at another."""


@dataclass
class NodeBase:
    """What the processes of this node share of a model's frozen base, and which part of it this process writes."""

    ranks: Ranks | None = None
    """None where no process of the run shares anything."""
    members: tuple[int, ...] = (0,)
    """Ranks of the processes that share it: this one alone, where it has a base of its own."""
    slots: dict[str, Tensor] = field(default_factory=dict)
    """Name of a buffer -> its place in the memory of the node."""
    waiting: tuple[str, ...] = ()
    """Names of those that are mapped files until the first `form`; their places in memory are not used yet."""
    text: str = ""
    """What was chosen, for the start of a run."""

    def layers(self, model: nn.Module) -> list[str]:
        """Names of the adapted layers whose frozen weights this process writes: its part of those that are shared, and
        all others, which lie on its device."""
        layers = mora_layers(model)
        written_here = set(self._owned({name: layers[name].weight.numel() for name in layers if self._is_shared(name)}))
        return [name for name in layers if name in written_here or not self._is_shared(name)]

    def _is_shared(self, layer: str) -> bool:
        return f"{layer}.weight" in self.slots

    def form(
        self,
        model: nn.Module,
        items: Iterable[tuple[str, Item]],
        work: Callable[[str, Item], Result],
    ) -> dict[str, Result]:
        """{name: work(name, item)} for an item of each of this process's `layers`, whose frozen weight `work` writes.

        Collective, if `items` are, or if any processes share a base: all then have their items before the first weight
        is written, and an error of one process is one of all.
        """
        if self.ranks is None:
            return {name: work(name, item) for name, item in items}
        ready = list(items)
        self._begin(model)
        return self.ranks.agree(
            "forming of the base", lambda: {name: work(name, item) for name, item in ready}, long=True
        )

    def of_all(
        self,
        rows: Mapping[str, Sequence[Tensor]],
        names: Sequence[str],
        width: int,
    ) -> Tensor:
        """(names, width) fp32 on the CPU: a row of scalars for each name, of which `rows` has those of this process's
        `layers`. Collective as `form` is."""
        table = torch.zeros(len(names), width)
        for index, name in enumerate(names):
            # Other nodes have the same rows, and so have the other processes of this one where nothing is shared.
            counts = self.ranks is None or (0 in self.members if self._is_shared(name) else self.ranks.is_first)
            if name in rows and counts:
                table[index] = torch.stack(list(rows[name]))
        return table if self.ranks is None else self.ranks.sum(table)

    def is_in_place(self, frozen: Mapping[str, Tensor]) -> bool:
        """Whether these buffers are still the ones that the processes share."""
        return all(frozen.get(name) is slot for name, slot in self.slots.items() if name not in self.waiting)

    def copy(self, frozen: Mapping[str, Tensor], names: Collection[str]) -> None:
        """Copy this process's part of the buffers `names` into the memory of the node."""
        for name in self._owned({name: frozen[name].nbytes for name in names}):
            self.slots[name].copy_(frozen[name])

    def use(
        self,
        model: nn.Module,
        frozen: Mapping[str, Tensor],
        names: Collection[str],
    ) -> None:
        """Let the model's buffers `names` be those in the memory of the node, once all are copied."""
        if not names:
            return
        put_frozen(model, {name: self.slots[name] for name in names})
        mappings = Mappings.read()
        for tensor in (frozen[name] for name in names):
            if mappings.place_of(tensor) is not None:
                give_back(tensor)

    def _begin(self, model: nn.Module) -> None:
        """Wait until no process reads the weights; those that are files are in the memory of the node from here on."""
        assert self.ranks is not None
        frozen = frozen_buffers(model)

        def prepare() -> None:
            if not self.is_in_place(frozen):
                raise RunError("frozen weights were replaced after the start: they are not those that processes share")
            self.copy(frozen, self.waiting)

        self.ranks.agree("begin of the forming of the base", prepare, long=True)
        self.use(model, frozen, self.waiting)
        self.waiting = ()

    def _owned(self, sizes: Mapping[str, int]) -> list[str]:
        """Those of the names that this process writes, in their order: about an equal part of the sizes' sum."""
        if self.ranks is None:
            return list(sizes)
        mine = set(balanced(sizes, len(self.members))[self.members.index(self.ranks.rank)])
        return [name for name in sizes if name in mine]


_NODE_BASES: WeakKeyDictionary[nn.Module, NodeBase] = WeakKeyDictionary()


def node_base_of(model: nn.Module) -> NodeBase:
    """What `share_base` made of the model's base; for another model, a base of this process alone."""
    return _NODE_BASES.get(model) or NodeBase()


# -- the start ---------------------------------------------------------------------------------------------------------


def share_base(
    model: nn.Module,
    choice: str,
    ranks: Ranks,
    at_once: bool = False,
) -> NodeBase:
    """Let the processes of each node share what lies in host memory of an injected model's frozen base, as `choice`
    (a `Sharing`) says; `at_once`: without waiting for the first merge.

    Collective; the base must be the same on all processes. Raises `UserError` where memory does not suffice.
    """
    frozen = {name: tensor for name, tensor in _distinct(frozen_buffers(model)).items() if tensor.device.type == "cpu"}
    before = _NODE_BASES.get(model)
    if before is None or not before.slots or not before.is_in_place(frozen):  # else another engine for the same model
        _NODE_BASES[model] = _shared(model, frozen, choice, ranks, at_once)
        del frozen
        trim()
    return _NODE_BASES[model]


def _shared(
    model: nn.Module,
    frozen: Mapping[str, Tensor],
    choice: str,
    ranks: Ranks,
    at_once: bool,
) -> NodeBase:
    members = node_members(ranks)
    is_private = choice == Sharing.PRIVATE.value
    wants = len(members) > 1 and not is_private
    layout = _Layout.of(model, frozen, everything=at_once)
    is_first = wants and ranks.rank == members[0]
    needed = sum(frozen[name].nbytes for name in layout.now)
    ranks.agree("room for the base of the node", lambda: check_room(needed) if is_first else None)
    storage, problem = _map(ranks, members, layout if wants else None)
    meets = any(ranks.gather("processes that share a base", storage is not None))
    why = problem or (f"node_base={choice}" if is_private else "one process on this node")
    text = f"frozen base: each process has a copy of its own of what merges change ({why})"
    base = NodeBase(ranks if meets else None, (ranks.rank,), text=text)
    if storage is not None:
        slots = {name: layout.view(storage, name, frozen[name]) for name in layout.offsets}
        base = NodeBase(ranks, members, slots, layout.later, layout.text(frozen, len(members)))
    now = layout.now if base.slots else ()
    ranks.agree(
        "copy of the base to the memory of the node",
        lambda: base.copy(frozen, now),
        long=True,
    )
    base.use(model, frozen, now)
    return base


@dataclass(frozen=True)
class _Layout:
    """Where each buffer lies in the memory of the node."""

    offsets: dict[str, int]
    size: int
    now: tuple[str, ...]
    """Names of those that are copied there at once."""
    later: tuple[str, ...]
    """Names of those that the first merge writes there, and that are mapped files until then."""
    digest: str

    @classmethod
    def of(
        cls,
        model: nn.Module,
        frozen: Mapping[str, Tensor],
        everything: bool,
    ) -> _Layout:
        """`everything`: files that hold the live weights are copied too."""
        mappings = Mappings.read()
        offsets = {}
        end = 0
        written = {f"{name}.weight" for name in mora_layers(model)}
        is_file = {name: mappings.place_of(tensor) is not None for name, tensor in frozen.items()}
        now = tuple(name for name in frozen if everything or not is_file[name])
        later = tuple(name for name in frozen if name in written and name not in now)
        for name in (*now, *later):
            tensor = frozen[name]
            within = tensor.data_ptr() % _LINE // tensor.itemsize * tensor.itemsize
            offsets[name] = -(-end // _LINE) * _LINE + within
            end = offsets[name] + tensor.nbytes
        facts = [(n, at, frozen[n].shape, frozen[n].stride(), frozen[n].dtype, n in now) for n, at in offsets.items()]
        return cls(offsets, end, now, later, hashlib.sha256(repr(facts).encode()).hexdigest())

    def view(
        self,
        storage: torch.UntypedStorage,
        name: str,
        like: Tensor,
    ) -> Tensor:
        """The buffer's place in the memory of the node, with the shape, strides and attributes of `like`."""
        strides = torch.empty_like(like, device="meta").stride()  # those of `like`, unless its elements overlap
        slot = torch.empty(0, dtype=like.dtype).set_(
            storage,
            self.offsets[name] // like.itemsize,
            like.shape,
            strides,
        )
        vars(slot).update(vars(like))
        return slot

    def text(self, frozen: Mapping[str, Tensor], processes: int) -> str:
        now, later = (sum(frozen[name].nbytes for name in names) / 1e6 for names in (self.now, self.later))
        files = sum(tensor.nbytes for name, tensor in frozen.items() if name not in self.now) / 1e6
        return (
            f"frozen base: one for {processes} processes, {files:,.1f} MB mapped from files, {now:,.1f} MB shared; "
            f"the first merge adds {later:,.1f} MB"
        )


def _distinct(frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tied tensor once, by its first name."""
    first: dict[int, str] = {}
    for name, tensor in frozen.items():
        first.setdefault(id(tensor), name)
    return {name: frozen[name] for name in first.values()}


def _map(
    ranks: Ranks,
    members: tuple[int, ...],
    layout: _Layout | None,
) -> tuple[torch.UntypedStorage | None, str]:
    """(memory of the node, mapped into this process; what kept one of its processes from it). Collective; `layout` None
    on a node that shares nothing."""
    mine = None
    problem = ""
    if layout is not None and ranks.rank == members[0]:
        try:
            mine = Offer.make(layout.size, layout.digest)
        except (OSError, AttributeError) as error:  # AttributeError: no memfd_create, which is Linux's
            problem = f"no memory can be shared: {error}"
    offer, problem = ranks.gather("memory of the node", (mine, problem))[members[0]]
    storage = None
    if layout is not None and offer is not None:
        try:
            storage = offer.map(layout.digest)
        except RunError as error:
            problem = str(error)
    problems = ranks.gather("mapping of the memory of the node", problem)
    if mine is not None:
        mine.close()
    problem = next(filter(None, (problems[rank] for rank in members)), "")
    return (None if problem else storage), problem
