"""What a rank keeps of a split layer's input until backward, where the gradient of its square needs the folded input.

A block's colwise layers all read the whole of its input, on every rank. Kept whole it would not shrink as ranks are
added, so each rank keeps its tokens of it and gathers the others again, as Megatron's sequence parallelism does
(Korthikanti et al. 2022, section 4.2.2): either once for all layers of the block, or folded, a layer each, whichever is
less (`tensor_plan.kept_inputs`). Of a rowwise layer's input a rank has its own features only.

    block.enter(x) -> layers: block.keeping(kept, x) -> keep(x) ... block.leave() ... backward: recall(saved)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mora_ds.adapters.layer import AdaptedLinear
from mora_ds.adapters.tp_plan import Style, TensorPlan, _config, _parent, is_attention
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


class TPInputs(str, Enum):
    """How a rank keeps the input that the layers of a split block share, until M's gradient needs it."""

    AUTO = "auto"
    """SPLIT, but WHOLE under gradient checkpointing: it is then there for a moment only."""
    SPLIT = "split"
    """Its tokens of it; the others are gathered again."""
    WHOLE = "whole"


class Kept(Enum):
    """What a split layer keeps of its input."""

    SMALLER = "input, or folded input where that is smaller"
    INPUT = "input"
    OWN_INPUT = "this rank's tokens of the block's input, once for all its layers"
    OWN_FOLDED = "this rank's tokens of the folded input"


def kept_inputs(model: nn.Module, plan: TensorPlan, inputs: TPInputs = TPInputs.AUTO) -> dict[str, Kept]:
    """Of every split layer of an injected model that has a square."""
    if plan.degree == 1:
        return {}
    if inputs is TPInputs.AUTO:
        recomputed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        inputs = TPInputs.WHOLE if recomputed else TPInputs.SPLIT
    kept = {}
    for block in plan.blocks:
        layers: dict[str, Any] = {name: model.get_submodule(name) for name in plan.styles if _parent(name) == block}
        specs = {name: layer.spec for name, layer in layers.items() if isinstance(layer, AdaptedLinear)}
        colwise = [name for name in specs if plan.styles[name] is Style.COLWISE]
        whole = inputs is TPInputs.WHOLE or not colwise
        shared = Kept.SMALLER if whole else _shared_input([specs[name] for name in colwise])
        rowwise = Kept.INPUT if _keeps_output(model, block) else Kept.SMALLER
        kept.update({name: shared if name in colwise else rowwise for name in specs})
    return kept


def _shared_input(specs: list[Any]) -> Kept:
    """The smaller: the input that layers share, or what each folds of it. Decouple and rotate fold nothing away."""
    folds = all(not spec.blockwise for spec in specs) and sum(spec.r_hat for spec in specs) < specs[0].d_in
    return Kept.OWN_FOLDED if folds else Kept.OWN_INPUT


def _keeps_output(model: nn.Module, block: str) -> bool:
    """Whether a block's attention keeps what it gives to its rowwise layer: all but eager do."""
    return is_attention(model.get_submodule(block)) and getattr(_config(model), "_attn_implementation", "") != "eager"
