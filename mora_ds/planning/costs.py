"""What a tensor-parallel group exchanges in one micro-batch, forward and backward, counted from shapes.

    group_traffic(model, degree, tokens)      of an injected model, on any device (the meta device will do)

`tokens` are those that the group computes together. Traffic is a list of collectives: `payload` counts complete
tensors, `wire` what each rank of a ring sends: (k-1)/k of an all-gather or a reduce-scatter, twice that of an
all-reduce. What ZeRO gathers and reduces among the groups is counted by `memory`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from torch import nn

from mora_ds.adapters.inject import mora_layers
from mora_ds.adapters.layer import linear_shape
from mora_ds.adapters.ops.mora import OperatorSpec, operator_of
from mora_ds.adapters.ops.spec import Style
from mora_ds.adapters.tp_plan import TensorPlan, plan_of


class Collective(str, Enum):
    """A kind of communication between ranks."""

    GATHER = "gather"
    SCATTER = "scatter"
    SUM = "sum"


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind and size."""

    kind: Collective
    ranks: int
    elements: int
    """Elements of the complete tensor."""
    times: int = 1

    @property
    def payload(self) -> int:
        return self.elements * self.times

    @property
    def wire(self) -> float:
        factor = 2 if self.kind is Collective.SUM else 1
        return self.payload * factor * (self.ranks - 1) / self.ranks


def group_traffic(model: nn.Module, degree: int, tokens: int) -> Iterator[Traffic]:
    """The traffic of an injected model that has not been split yet, in a group of `degree` ranks."""
    plan = plan_of(model, degree)
    for name, layer in mora_layers(model).items():
        if isinstance(layer.value, nn.Parameter):  # a frozen M is unsharded on every rank
            yield from _square_traffic(
                operator_of(layer.spec, name),
                plan.styles[name],
                degree,
                tokens,
            )
    yield from _block_traffic(model, plan, tokens)


def _square_traffic(spec: OperatorSpec, style: Style, degree: int, tokens: int) -> Iterator[Traffic]:
    """What the update of one layer takes."""
    segments = {Style.COLWISE: spec.out_segments, Style.ROWWISE: spec.in_segments}.get(style, 1)
    if segments > 1 and segments % degree == 0:  # every rank has the segments that it needs of M
        return
    if style is not Style.WHOLE:
        yield Traffic(Collective.GATHER, degree, spec.r_hat**2, 2)
        yield Traffic(Collective.SCATTER, degree, spec.r_hat**2)
        return
    compressed = tokens * spec.r_hat * spec.blocks
    yield Traffic(Collective.GATHER, degree, compressed)
    yield Traffic(Collective.SUM, degree, compressed)


def _block_traffic(model: nn.Module, plan: TensorPlan, tokens: int) -> Iterator[Traffic]:
    """The sum of a rowwise layer's outputs, and of the gradients at the block's input."""
    for block in plan.blocks:
        rowwise = next(
            name for name, style in plan.styles.items() if style is Style.ROWWISE and name.rpartition(".")[0] == block
        )
        d_out = linear_shape(model.get_submodule(rowwise))[1]
        yield Traffic(Collective.SUM, plan.degree, tokens * d_out, 2)
