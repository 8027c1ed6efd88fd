"""What tensor parallelism costs, counted from shapes: products and traffic of one micro-batch, forward and backward.

    costs(model, degree, replicas, tokens)      a model, injected, on any device (meta will do)
    cost_table(...)                             ways to spend so many ranks, side by side

`tokens` are those that a group computes together. A rank's products are counted in multiply-accumulates; the head, the
attention scores and gradient checkpointing are left out. Traffic is a list of collectives: `payload` is what a counter
of whole tensors sees, `wire` what a ring sends from each rank: (k-1)/k of a gather or a scatter, twice that of a sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from torch import nn

from mora_ds.adapters.domains import DomainLinear, domain_layers
from mora_ds.adapters.inject import count_parameters, mora_layers
from mora_ds.adapters.layer import AdaptedLinear
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.tp_plan import Style, TensorPlan, is_attention, plan_of
from mora_ds.parallel.saved_inputs import Saved, TPInputs, plan_inputs

PASSES_GATHERED = 2
"""ZeRO-3 gathers a square's shares in forward and again in backward."""


class Collective(str, Enum):
    """What moves elements."""

    GATHER = "gather"
    SCATTER = "scatter"
    SUM = "sum"


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind and size."""

    what: str
    """square: M itself. activation: everything else."""
    collective: Collective
    ranks: int
    elements: int
    """Of the whole tensor."""
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
    """Of one rank and one micro-batch."""

    base_macs: int
    square_macs: int
    traffic: tuple[Traffic, ...]
    base_elements: int
    """Stored whole on every rank."""
    square_elements: float
    """Stored of all squares: r_hat^2 / world each."""
    trained: str = "squares"
    """What it calls them: LoRA has factors."""

    @property
    def macs(self) -> int:
        return self.base_macs + self.square_macs

    def wire(self, what: str | None = None) -> float:
        """Elements that a rank sends."""
        return sum(item.wire for item in self.traffic if what in (None, item.what))

    def payload(self, *collectives: Collective) -> int:
        """Elements of all tensors that collectives of these kinds carry."""
        return sum(item.payload for item in self.traffic if item.collective in collectives)

    def __str__(self) -> str:
        return (
            f"each rank stores the whole base ({self.base_elements:,} elements) and {self.square_elements:,.0f} "
            f"elements of the {self.trained}\n"
            f"each rank computes {self.macs / 1e9:,.3f} G multiply-accumulates a micro-batch (base "
            f"{self.base_macs / 1e9:,.3f}, {self.trained} {self.square_macs / 1e9:,.3f}) and sends "
            f"{self.wire() / 1e6:,.3f} M elements ({self.trained} {self.wire('square') / 1e6:,.3f}, "
            f"activations {self.wire('activation') / 1e6:,.3f}, "
            "base 0)"
        )


def costs(
    model: nn.Module, degree: int, replicas: int, tokens: int, split: bool = True, inputs: TPInputs = TPInputs.AUTO
) -> Costs:
    """Of an injected model that has not been split yet, `tokens` a group and micro-batch. Without `split`: as if every
    layer fell back."""
    plan, layers, own = plan_of(model, degree), mora_layers(model), domain_layers(model)
    if not split:
        plan = replace(plan, styles=dict.fromkeys(plan.styles, Style.WHOLE), blocks=())
    base = square = 0
    traffic: list[Traffic] = []
    for name, style in plan.styles.items():
        module: Any = model.get_submodule(name)
        d_in, d_out = _shape(module)
        if module is not _head(model):
            base += 2 * d_in * d_out * tokens // (1 if style is Style.WHOLE else degree)
        if name in layers:
            spec = layers[name].spec
            if isinstance(spec, OperatorSpec):
                square += 3 * tokens * _square_macs(spec, style, degree)
                if isinstance(layers[name].value, nn.Parameter):  # a frozen square is whole on every rank
                    traffic += _square_traffic(spec, style, degree, replicas, tokens)
                if name in own:
                    square += 3 * tokens * _own_macs(own[name])
                    traffic += _own_traffic(own[name], replicas)
            else:  # at t = 1 only
                square += tokens * spec.macs_per_token
                traffic += _zero_traffic(layers[name].value.numel(), replicas)
    traffic += _block_traffic(model, plan, tokens)
    traffic += _input_traffic(model, plan, tokens, inputs)
    squares = sum(value.numel() for layer in layers.values() for value in layer.parameters(recurse=False))
    whole = count_parameters(model) - sum(parameter.numel() for parameter in model.parameters())
    trained = "factors" if any(layer.spec.value_name == "factors" for layer in layers.values()) else "squares"
    return Costs(base, square, tuple(traffic), whole, squares / degree / replicas, trained)


@dataclass(frozen=True)
class Row:
    """One way to spend the ranks, per rank: multiply-accumulates and elements on the wire, both in all."""

    name: str
    macs: float
    wire: float


def cost_table(
    gathered: nn.Module, aligned: nn.Module | None, ranks: int, degrees: Sequence[int], tokens: int
) -> list[Row]:
    """`gathered`, `aligned`: the model injected without and with segments; `tokens` a rank, whatever the degree."""
    alone = costs(gathered, 1, ranks, tokens)
    rows = [Row("data parallel only, base whole", alone.macs, alone.wire())]
    for degree in degrees:
        spent = (degree, ranks // degree, tokens * degree)
        repeated = costs(gathered, *spent, split=False)
        rows.append(Row(f"every rank repeats the base, t = {degree}", repeated.macs, repeated.wire()))
        models = {"gathered": gathered} if aligned is None else {"gathered": gathered, "aligned": aligned}
        for name, model in models.items():
            for inputs, words in {TPInputs.WHOLE: "", TPInputs.SPLIT: ", inputs split"}.items():
                way = costs(model, *spent, inputs=inputs)
                rows.append(Row(f"split, squares {name}{words}, t = {degree}", way.macs, way.wire()))
    sharded = PASSES_GATHERED * _linear_elements(gathered) * (ranks - 1) / ranks
    rows.append(Row("ZeRO-3 with the base sharded too", alone.macs, alone.wire() + sharded))
    for degree in degrees:
        moved = 2 * tokens * _attention_widths(gathered) * (degree - 1) / degree
        rows.append(Row(f"sequence parallel (Ulysses), s = {degree}", alone.macs, alone.wire() + moved))
    return rows


def _linear_elements(model: nn.Module) -> int:
    return sum(layer.in_features * layer.out_features for layer in mora_layers(model).values())


def _attention_widths(model: nn.Module) -> int:
    """Elements a token that Ulysses exchanges in a forward: queries, keys, values and what attention makes of them."""
    total = 0
    for name, style in plan_of(model, 1).styles.items():
        if is_attention(model.get_submodule(name.rpartition(".")[0])) and style is not Style.WHOLE:
            d_in, d_out = _shape(model.get_submodule(name))
            total += d_out if style is Style.COLWISE else d_in
    return total


def _square_macs(spec: OperatorSpec, style: Style, degree: int) -> int:
    """A token's, in one of the three products over activations: M compress(x), its transpose, the gradient. Of these
    the weight path has the last alone, for decouple and rotate in this rank's lanes only."""
    blocks = spec.blocks_in if spec.blockwise else 1
    if style is Style.WHOLE or _is_aligned(spec, style, degree):
        return blocks * spec.r_hat**2 // degree
    rows = spec.r_hat
    if style is Style.COLWISE and not spec.blockwise:
        rows = min(rows, spec.d_out // degree)
    return blocks * spec.r_hat * rows


def _own_macs(layer: DomainLinear) -> int:
    """Of a domain's square, beside the shared one's: none while both are wired alike, as M + M_k is one square then."""
    spec = layer.own_spec
    return 0 if spec == layer.spec else _square_macs(spec, Style.WHOLE, 1)


def _own_traffic(layer: DomainLinear, replicas: int) -> Iterator[Traffic]:
    if isinstance(layer.domain_squares, nn.Parameter):
        yield from _zero_traffic(layer.domain_squares.numel(), replicas)


def _square_traffic(spec: OperatorSpec, style: Style, degree: int, replicas: int, tokens: int) -> Iterator[Traffic]:
    square = spec.r_hat**2
    yield from _zero_traffic(-(-spec.r_hat // degree) * spec.r_hat, replicas)
    if degree == 1 or _is_aligned(spec, style, degree):
        return
    if style is not Style.WHOLE:
        yield Traffic("square", Collective.GATHER, degree, square, 2)
        yield Traffic("square", Collective.SCATTER, degree, square)
        return
    lanes = tokens * spec.r_hat * (spec.blocks_in if spec.blockwise else 1)
    yield Traffic("activation", Collective.GATHER, degree, lanes)
    yield Traffic("activation", Collective.SUM, degree, lanes)


def _zero_traffic(elements: int, replicas: int) -> Iterator[Traffic]:
    if replicas > 1:
        yield Traffic("square", Collective.GATHER, replicas, elements, PASSES_GATHERED)
        yield Traffic("square", Collective.SCATTER, replicas, elements)


def _block_traffic(model: nn.Module, plan: TensorPlan, tokens: int) -> Iterator[Traffic]:
    """The sum of a rowwise layer's outputs, and of the gradients at the block's input."""
    for block in plan.blocks if plan.degree > 1 else ():
        rowwise: Any = next(
            model.get_submodule(name)
            for name, style in plan.styles.items()
            if style is Style.ROWWISE and name.rpartition(".")[0] == block
        )
        yield Traffic("activation", Collective.SUM, plan.degree, tokens * _shape(rowwise)[1], 2)


def _input_traffic(model: nn.Module, plan: TensorPlan, tokens: int, inputs: TPInputs) -> Iterator[Traffic]:
    """What ranks kept their tokens of, gathered again in backward."""
    kept, padded = plan_inputs(model, plan, inputs), -(-tokens // plan.degree) * plan.degree
    blocks = dict.fromkeys(name.rpartition(".")[0] for name, how in kept.items() if how is Saved.INPUT_SHARD)
    for block in blocks:
        name = next(name for name, how in kept.items() if how is Saved.INPUT_SHARD and name.startswith(f"{block}."))
        yield Traffic("activation", Collective.GATHER, plan.degree, padded * _shape(model.get_submodule(name))[0])
    for name, how in kept.items():
        if how is Saved.FOLDED_SHARD:
            layer: Any = model.get_submodule(name)
            yield Traffic("activation", Collective.GATHER, plan.degree, padded * layer.spec.r_hat)


def _is_aligned(spec: OperatorSpec, style: Style, degree: int) -> bool:
    segments = {Style.COLWISE: spec.out_segments, Style.ROWWISE: spec.in_segments}.get(style, 1)
    return segments > 1 and segments % degree == 0


def _shape(module: Any) -> tuple[int, int]:
    if isinstance(module, AdaptedLinear):
        return module.in_features, module.out_features
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)


def _head(model: Any) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if get else None
