"""Arithmetic and traffic of tensor parallelism, counted from shapes: one micro-batch, forward and backward.

    costs(model, degree, replicas, tokens)      of an injected model, on any device (the meta device will do)

`tokens` are those that a tensor-parallel group computes together. A rank's arithmetic is counted in
multiply-accumulates (MACs); the head, the attention scores and gradient checkpointing are left out. Traffic is a list
of collectives: `payload` counts complete tensors, `wire` what each rank of a ring sends: (k-1)/k of an all-gather or a
reduce-scatter, twice that of an all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn

from mora_ds.adapters.domains import domain_layers
from mora_ds.adapters.experts import MoRAExperts, find_stacks
from mora_ds.adapters.inject import count_parameters, mora_layers
from mora_ds.adapters.layer import ExpertStack, linear_shape
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.target_modules import output_head
from mora_ds.adapters.tp_plan import Style, TensorPlan, plan_of

GATHERS_A_MICRO_BATCH = 2
"""ZeRO-3 gathers a MoRA matrix in forward and again in backward."""


class Collective(str, Enum):
    """A kind of communication between ranks."""

    GATHER = "gather"
    SCATTER = "scatter"
    SUM = "sum"


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind and size."""

    what: str
    """square: a MoRA matrix M. activation: everything else."""
    collective: Collective
    ranks: int
    elements: int
    """Elements of the complete tensor."""
    times: int = 1

    @property
    def payload(self) -> int:
        return self.elements * self.times

    @property
    def wire(self) -> float:
        factor = 2 if self.collective is Collective.SUM else 1
        return self.payload * factor * (self.ranks - 1) / self.ranks


@dataclass(frozen=True)
class Costs:
    """Arithmetic, storage and traffic of one rank and one micro-batch."""

    base_macs: int
    square_macs: int
    traffic: tuple[Traffic, ...]
    base_elements: int
    """Elements of the base, which every rank stores unsharded."""
    square_elements: float
    """Elements of all MoRA matrices (or LoRA's factors) that a rank stores: 1 / world of each."""
    trained: str = "MoRA matrices"
    """The name of what is trained, for messages."""

    @property
    def macs(self) -> int:
        return self.base_macs + self.square_macs

    def wire(self, what: str | None = None) -> float:
        """Elements that a rank sends, of all traffic or of one kind."""
        return sum(item.wire for item in self.traffic if what in (None, item.what))

    def payload(self, *collectives: Collective) -> int:
        """Elements of all tensors that collectives of these kinds carry."""
        return sum(item.payload for item in self.traffic if item.collective in collectives)

    def __str__(self) -> str:
        return (
            f"each rank stores the unsharded base ({self.base_elements:,} elements) and {self.square_elements:,.0f} "
            f"elements of the {self.trained}\n"
            f"each rank computes {self.macs / 1e9:,.3f} G multiply-accumulates a micro-batch (base "
            f"{self.base_macs / 1e9:,.3f}, {self.trained} {self.square_macs / 1e9:,.3f}) and sends "
            f"{self.wire() / 1e6:,.3f} M elements ({self.trained} {self.wire('square') / 1e6:,.3f}, "
            f"activations {self.wire('activation') / 1e6:,.3f}, base 0)"
        )


def costs(model: nn.Module, degree: int, replicas: int, tokens: int) -> Costs:
    """The costs of an injected model that has not been split yet."""
    plan, layers, own = plan_of(model, degree), mora_layers(model), domain_layers(model)
    base = square = 0
    traffic: list[Traffic] = []
    head = output_head(model)
    for name, style in plan.styles.items():
        module: Any = model.get_submodule(name)
        d_in, d_out = linear_shape(module)
        times = module.experts_per_token if isinstance(module, MoRAExperts) else 1
        if module is not head:
            base += 2 * d_in * d_out * tokens * times // (1 if style is Style.WHOLE else degree)
        if name not in layers:
            continue
        spec = layers[name].spec
        if not isinstance(spec, OperatorSpec):  # at t = 1 only
            square += tokens * spec.macs_per_token * times
            traffic += _zero_traffic(layers[name].value.numel(), replicas)
            continue
        square += 3 * tokens * _square_macs(spec, style, degree)
        if isinstance(layers[name].value, nn.Parameter):  # a frozen M is unsharded on every rank
            traffic += _square_traffic(spec, style, degree, replicas, tokens)
        if (domain := own.get(name)) is not None:
            if domain.own_spec != spec:  # while the operators are equal, M + M_k is one matrix
                square += 3 * tokens * _square_macs(domain.own_spec, Style.WHOLE, 1)
            if isinstance(domain.domain_squares, nn.Parameter):
                traffic += _zero_traffic(domain.domain_squares.numel(), replicas)
    for stack in find_stacks(model).values():  # frozen experts
        if isinstance(stack, ExpertStack):
            base += 2 * stack.in_features * stack.out_features * tokens * stack.experts_per_token
    traffic += _block_traffic(model, plan, tokens)
    squares = sum(value.numel() for layer in layers.values() for value in layer.parameters(recurse=False))
    frozen = count_parameters(model) - sum(parameter.numel() for parameter in model.parameters())
    is_lora = any(layer.spec.value_name == "factors" for layer in layers.values())
    trained = "factors" if is_lora else "MoRA matrices"
    return Costs(base, square, tuple(traffic), frozen, squares / degree / replicas, trained)


def _square_macs(spec: OperatorSpec, style: Style, degree: int) -> int:
    """MACs of a token in one of the three products over activations: M compress(x), its transpose, the gradient of M.

    (When the weight is formed instead, only the last of them is computed; for decouple and rotate, of this rank's
    input blocks.)
    """
    if style is Style.WHOLE or _is_aligned(spec, style, degree):
        return spec.blocks * spec.r_hat**2 // degree
    rows = spec.r_hat
    if style is Style.COLWISE and not spec.blockwise:
        rows = min(rows, spec.d_out // degree)
    return spec.blocks * spec.r_hat * rows


def _square_traffic(spec: OperatorSpec, style: Style, degree: int, replicas: int, tokens: int) -> Iterator[Traffic]:
    square = spec.r_hat**2
    yield from _zero_traffic(-(-spec.r_hat // degree) * spec.r_hat, replicas)
    if degree == 1 or _is_aligned(spec, style, degree):
        return
    if style is not Style.WHOLE:
        yield Traffic("square", Collective.GATHER, degree, square, 2)
        yield Traffic("square", Collective.SCATTER, degree, square)
        return
    compressed = tokens * spec.r_hat * spec.blocks
    yield Traffic("activation", Collective.GATHER, degree, compressed)
    yield Traffic("activation", Collective.SUM, degree, compressed)


def _zero_traffic(elements: int, replicas: int) -> Iterator[Traffic]:
    if replicas > 1:
        yield Traffic("square", Collective.GATHER, replicas, elements, GATHERS_A_MICRO_BATCH)
        yield Traffic("square", Collective.SCATTER, replicas, elements)


def _block_traffic(model: nn.Module, plan: TensorPlan, tokens: int) -> Iterator[Traffic]:
    """The sum of a rowwise layer's outputs, and of the gradients at the block's input."""
    for block in plan.blocks if plan.degree > 1 else ():
        rowwise = next(
            name for name, style in plan.styles.items() if style is Style.ROWWISE and name.rpartition(".")[0] == block
        )
        d_out = linear_shape(model.get_submodule(rowwise))[1]
        yield Traffic("activation", Collective.SUM, plan.degree, tokens * d_out, 2)


def _is_aligned(spec: OperatorSpec, style: Style, degree: int) -> bool:
    segments = {Style.COLWISE: spec.out_segments, Style.ROWWISE: spec.in_segments}.get(style, 1)
    return segments > 1 and segments % degree == 0
