"""What a process saves of a split layer's input for the backward pass, where M's gradient needs the folded input.

The colwise layers of a block (attention, MLP) all read the block's complete input, on every process of a group. Saved
by each it would not shrink as processes are added, so a process saves the input of its share of the tokens and gathers
the other tokens again in backward, as Megatron's sequence parallelism does (Korthikanti et al. 2022, section 4.2.2):
either the input, once for all layers of the block, or each layer's folded input, whichever is smaller. Of a rowwise
layer's input a process has its own features only, and saves them as they are.

    block.enter(x) -> layers: block.saving(how, x) -> save(x) ... block.leave() ... backward: restore(saved)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from torch import Tensor, nn

from mora_ds.adapters.layer import AdaptedLinear
from mora_ds.adapters.tp_plan import Style, TensorPlan, is_attention, text_config
from mora_ds.parallel.topology import Topology
from mora_ds.parallel.windows import Window


class Saved(Enum):
    """What a split layer saves of its input."""

    SMALLER = "input, or folded input where that is smaller"
    INPUT = "input"
    INPUT_SHARD = "this process's tokens of the block's input, once for all its layers"
    FOLDED_SHARD = "this process's tokens of the folded input"


def plan_inputs(model: nn.Module, plan: TensorPlan) -> dict[str, Saved]:
    """Layer name -> what it saves, for every split layer of an injected model that has a MoRA matrix.

    Under gradient checkpointing a block's input is not shared out over the processes: it is recomputed, and there for a
    moment only.
    """
    if plan.degree == 1:
        return {}
    recomputed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    saved = {}
    for block in plan.blocks:
        layers: dict[str, Any] = {
            name: model.get_submodule(name) for name in plan.styles if name.rpartition(".")[0] == block
        }
        specs = {name: layer.spec for name, layer in layers.items() if isinstance(layer, AdaptedLinear)}
        colwise: list[Any] = [specs[name] for name in specs if plan.styles[name] is Style.COLWISE]
        shared = Saved.SMALLER
        if colwise and not recomputed:  # decouple and rotate fold nothing away
            folds = all(not spec.blockwise for spec in colwise) and sum(s.r_hat for s in colwise) < colwise[0].d_in
            shared = Saved.FOLDED_SHARD if folds else Saved.INPUT_SHARD
        # All attention implementations but eager save their output, which is the rowwise layer's input, anyway.
        attention = getattr(text_config(model), "_attn_implementation", "")
        saves_output = is_attention(model.get_submodule(block)) and attention != "eager"
        rowwise = Saved.INPUT if saves_output else Saved.SMALLER
        saved.update({name: shared if plan.styles[name] is Style.COLWISE else rowwise for name in specs})
    return saved


class Saving(Protocol):
    """How one layer saves its input in one pass."""

    @property
    def folds(self) -> bool:
        """Whether it saves the folded input (..., N, columns), or else the input (..., w_in)."""

    def save(self, x: Tensor) -> Tensor:
        """The part of x to save for backward."""

    def restore(self, saved: Tensor) -> Tensor:
        """x with all its tokens. May be collective."""


@dataclass(frozen=True)
class AllTokens:
    """Saves x as it is."""

    folds: bool

    def save(self, x: Tensor) -> Tensor:
        return x

    def restore(self, saved: Tensor) -> Tensor:
        return saved


class TokenShard:
    """Saves this process's tokens of x."""

    def __init__(self, topology: Topology, folds: bool) -> None:
        self._topology, self.folds = topology, folds

    def save(self, x: Tensor) -> Tensor:
        """(..., width) -> (tokens of this process, width), in new memory."""
        self._shape = x.shape
        tokens = x.flatten(0, -2)
        return tokens[slice(*self._topology.share(len(tokens)))].clone()

    def restore(self, saved: Tensor) -> Tensor:
        return self._topology.gather(saved, self._shape[:-1].numel()).view(self._shape)


class InputShard(TokenShard):
    """Saves this process's tokens of a block's input, once, and gathers them once for all layers that read it."""

    def __init__(self, topology: Topology) -> None:
        super().__init__(topology, folds=False)
        self._saved: Tensor | None = None
        self._restored: Tensor | None = None
        self._users = self._left = 0

    def save(self, x: Tensor) -> Tensor:
        self._users = self._left = self._users + 1
        if self._saved is None:
            self._saved = super().save(x)
        return self._saved

    def forget(self) -> None:
        """Leave the tokens to autograd, which frees them or, under gradient checkpointing, never has them."""
        self._saved = None

    def restore(self, saved: Tensor) -> Tensor:
        if self._restored is None:
            self._restored = super().restore(saved)
        restored, self._left = self._restored, self._left - 1
        if not self._left:
            self._restored, self._left = None, self._users
        return restored


class BlockInput:
    """The input of a split block while the block computes."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._x: Tensor | None = None
        self._shared = InputShard(topology)

    def enter(self, x: Tensor) -> None:
        self._x, self._shared = x, InputShard(self._topology)

    def leave(self) -> None:
        self._x = None
        self._shared.forget()

    def saving(self, saved: Saved, x: Tensor) -> Saving | None:
        """How a layer that is given `x` saves it; None for `smaller_of`."""
        if saved is Saved.INPUT:
            return AllTokens(folds=False)
        if saved is Saved.FOLDED_SHARD:
            return TokenShard(self._topology, folds=True)
        return self._shared if saved is Saved.INPUT_SHARD and self._is(x) else None

    def _is(self, x: Tensor) -> bool:
        """Whether `x` is the block's input: DeepSpeed's hooks hand views of it on."""
        own = self._x
        return own is not None and (x.data_ptr(), x.shape, x.stride()) == (own.data_ptr(), own.shape, own.stride())


def smaller_of(part: Window) -> Saving:
    """Saves all tokens of the input or of the folded input, whichever is smaller."""
    columns = part.columns[1] - part.columns[0]
    return AllTokens(folds=not part.spec.blockwise and columns < part.d_in)
