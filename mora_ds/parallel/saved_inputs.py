"""What a rank keeps of a split layer's input until backward, where the gradient of its square needs the folded input.

A block's colwise layers all read the whole of its input, on every rank. Kept whole it would not shrink as ranks are
added, so each rank keeps its tokens of it and gathers the others again, as Megatron's sequence parallelism does
(Korthikanti et al. 2022, section 4.2.2): either once for all layers of the block, or folded, a layer each, whichever is
less (`tensor_plan.kept_inputs`). Of a rowwise layer's input a rank has its own features only.

    block.enter(x) -> layers: block.keeping(kept, x) -> keep(x) ... block.leave() ... backward: recall(saved)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mora_ds.adapters.tp_plan import Kept
from mora_ds.parallel.topology import Topology
from mora_ds.parallel.windows import Window


class Keeping(Protocol):
    """Of one layer and pass."""

    @property
    def folds(self) -> bool:
        """Whether it keeps the folded input (..., N, columns), or else the input (..., w_in)."""

    def keep(self, x: Tensor) -> Tensor:
        """What to save of that."""

    def recall(self, saved: Tensor) -> Tensor:
        """That, of all tokens. May be collective."""


@dataclass(frozen=True)
class Whole:
    """As it is."""

    folds: bool

    def keep(self, x: Tensor) -> Tensor:
        return x

    def recall(self, saved: Tensor) -> Tensor:
        return saved


class OwnFolded:
    """This rank's tokens of the folded input."""

    folds = True

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def keep(self, x: Tensor) -> Tensor:
        self._shape = x.shape
        return _own_tokens(self._topology, x)

    def recall(self, saved: Tensor) -> Tensor:
        return _all_tokens(self._topology, saved, self._shape)


class OwnInput:
    """This rank's tokens of a block's input, saved once and gathered once for all layers that read it."""

    folds = False

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._own: Tensor | None = None
        self._whole: Tensor | None = None
        self._users = self._left = 0

    def keep(self, x: Tensor) -> Tensor:
        self._shape = x.shape
        self._users = self._left = self._users + 1
        if self._own is None:
            self._own = _own_tokens(self._topology, x)
        return self._own

    def forget(self) -> None:
        """Leaves the tokens to autograd, which frees them or, under gradient checkpointing, never has them."""
        self._own = None

    def recall(self, saved: Tensor) -> Tensor:
        if self._whole is None:
            self._whole = _all_tokens(self._topology, saved, self._shape)
        whole, self._left = self._whole, self._left - 1
        if not self._left:
            self._whole, self._left = None, self._users
        return whole


class BlockInput:
    """The input of a split block, while the block computes."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._x: Tensor | None = None
        self._shared = OwnInput(topology)

    def enter(self, x: Tensor) -> None:
        self._x, self._shared = x, OwnInput(self._topology)

    def leave(self) -> None:
        self._x = None
        self._shared.forget()

    def keeping(self, kept: Kept, x: Tensor) -> Keeping | None:
        """How a layer that is given `x` keeps it; None for whatever is smaller."""
        if kept is Kept.INPUT:
            return Whole(folds=False)
        if kept is Kept.OWN_FOLDED:
            return OwnFolded(self._topology)
        return self._shared if kept is Kept.OWN_INPUT and self._is(x) else None

    def _is(self, x: Tensor) -> bool:
        """Whether `x` is the block's input: DeepSpeed's hooks hand views of it on."""
        mine = self._x
        same = mine is not None and x.data_ptr() == mine.data_ptr()
        return same and mine is not None and (x.shape, x.stride()) == (mine.shape, mine.stride())


def smaller_of(part: Window) -> Keeping:
    """Input or folded input."""
    columns = part.columns[1] - part.columns[0]
    return Whole(folds=not part.spec.blockwise and columns < part.d_in)


def _own_tokens(topology: Topology, x: Tensor) -> Tensor:
    """(..., width) -> (tokens of this rank, width), in storage of its own."""
    tokens = x.flatten(0, -2)
    return tokens[slice(*topology.share(len(tokens)))].clone()


def _all_tokens(topology: Topology, own: Tensor, shape: torch.Size) -> Tensor:
    return topology.gather(own, shape[:-1].numel()).view(shape)
