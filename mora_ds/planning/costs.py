"""Traffic of trained matrices and of tensor parallelism, counted from shapes: one micro-batch, forward and backward.

    costs(model, degree, replicas, tokens)      of an injected model, on any device (the meta device will do)

`tokens` are those that a tensor-parallel group computes together. Traffic is a list of collectives: `payload` counts
complete tensors, `wire` what each rank of a ring sends: (k-1)/k of an all-gather or a reduce-scatter, twice that of an
all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from torch import nn

from mora_ds.adapters.domains import domain_layers
from mora_ds.adapters.inject import count_parameters, mora_layers
from mora_ds.adapters.layer import linear_shape
from mora_ds.adapters.ops.mora import OperatorSpec, operator_of
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
    """What one rank stores, and what it sends in one micro-batch."""

    traffic: tuple[Traffic, ...]
    base_elements: int
    """Elements of the base, which every rank stores unsharded."""
    square_elements: float
    """Elements of all MoRA matrices (or LoRA's factors) that a rank stores: 1 / world of each."""
    trained: str = "MoRA matrices"
    """The name of what is trained, for messages."""

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
            f"each rank sends {self.wire() / 1e6:,.3f} M elements a micro-batch ({self.trained} "
            f"{self.wire('square') / 1e6:,.3f}, activations {self.wire('activation') / 1e6:,.3f}, base 0)"
        )


def costs(model: nn.Module, degree: int, replicas: int, tokens: int) -> Costs:
    """The costs of an injected model that has not been split yet."""
    plan = plan_of(model, degree)
    layers = mora_layers(model)
    domains = domain_layers(model)
    traffic: list[Traffic] = []
    for name, layer in layers.items():
        value = layer.value
        if isinstance(value, nn.Parameter):  # a frozen M is unsharded on every rank
            traffic += _zero_traffic(-(-len(value) // degree) * value[0].numel(), replicas)
            if degree > 1:
                traffic += _group_traffic(operator_of(layer.spec, name), plan.styles[name], degree, tokens)
        if name in domains and isinstance(domains[name].domain_squares, nn.Parameter):
            traffic += _zero_traffic(domains[name].domain_squares.numel(), replicas)
    traffic += _block_traffic(model, plan, tokens)
    squares = sum(value.numel() for layer in layers.values() for value in layer.parameters(recurse=False))
    frozen = count_parameters(model) - sum(parameter.numel() for parameter in model.parameters())
    titles = {layer.spec.values_title for layer in layers.values()}
    return Costs(tuple(traffic), frozen, squares / degree / replicas, " and ".join(sorted(titles)))


def _group_traffic(spec: OperatorSpec, style: Style, degree: int, tokens: int) -> Iterator[Traffic]:
    """What a tensor-parallel group exchanges for one layer's M."""
    square = spec.r_hat**2
    if _is_aligned(spec, style, degree):
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
