"""A budget of parameters -> the side of each layer's square: how --targets auto spends it.

    score     of a layer: what a parameter is worth there, from its weights or from gradients
    r_hat^2   = lambda * score * (d_in + d_out)      MoRA's own size, r_hat^2 = rank * (d_in + d_out), with a rank in
                                                     proportion to the score; lambda is what uses the budget up

A layer gets a square as long as its rank lambda * score is 1 or more, so that a small budget goes to the layers of the
highest scores; the side is at most what the layer can use. Sides are whole numbers, even for rotate: rounded down, then
moved by single steps, those furthest behind first, until the sum of squares is within `TOLERANCE` below the budget.
Scores count to four digits and ties go by name: the same numbers give the same sides, whatever their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mora_ds.errors import UserError

TOLERANCE = 0.01
"""Share of the budget that may be left over."""

_GOOD_ENOUGH = 0.005
"""Share at which no more sides are moved: the fewer moves, the nearer to the rule."""

_STRAY = 2
"""Steps that a side may end away from its due."""


@dataclass(frozen=True)
class Candidate:
    """A layer that may get a square."""

    name: str
    d_in: int
    d_out: int
    largest: int
    """Side of the largest square that adds anything there."""
    score: float = 1.0
    """Not negative; only ratios matter."""


@dataclass
class _Layer:
    """A candidate with its bounds, while its side is chosen."""

    name: str
    score: float
    weight: float
    """score * (d_in + d_out)."""
    least: int
    """Side at rank 1."""
    most: int
    due: float = 0.0
    """The side by the rule, not rounded."""
    side: int = 0


def spend(
    candidates: Sequence[Candidate], budget: int, step: int = 1, flag: str = "--trainable_budget"
) -> dict[str, int]:
    """Name -> side, a multiple of `step` (0: no square), in the order of `candidates`.

    Raises `UserError` naming `flag` for a budget that is too small for one square, more than all layers can hold, or
    that no sides come within `TOLERANCE` of.
    """
    layers = [each for each in (_layer(each, step) for each in candidates) if each.least <= each.most]
    layers = sorted((each for each in layers if each.score > 0), key=lambda each: (-each.score, each.name))
    _check(layers, budget, flag)
    layers = [each for each in layers if each.least**2 <= budget]
    chosen = _fitting(layers, budget, step, flag)
    return {each.name: chosen.get(each.name, 0) for each in candidates}


def check_budget(candidates: Iterable[Candidate], budget: int, step: int = 1, flag: str = "--trainable_budget") -> None:
    """Raises the same `UserError`s as far as can be told before there are scores."""
    layers = [_layer(each, step) for each in candidates]
    _check([each for each in layers if each.least <= each.most], budget, flag)


def _layer(candidate: Candidate, step: int) -> _Layer:
    sides, score = candidate.d_in + candidate.d_out, float(f"{candidate.score:.3e}")
    least = max(math.isqrt(sides) // step, 1) * step
    return _Layer(candidate.name, score, score * sides, least, candidate.largest // step * step)


def _check(layers: Sequence[_Layer], budget: int, flag: str) -> None:
    if not layers:
        raise UserError(f"{flag}: there is no layer with a score above 0 and room for a square")
    smallest = min(layers, key=lambda each: (each.least, each.name))
    if budget < smallest.least**2:
        raise UserError(
            f"{flag}: {budget:,} parameters are too few for one square: the smallest, of side {smallest.least} on "
            f"{smallest.name}, has {smallest.least**2:,}"
        )
    if budget > (capacity := _capacity(layers)):
        raise UserError(
            f"{flag}: {budget:,} parameters are more than the {len(layers)} layers can hold: {capacity:,}, with the "
            "largest squares that add anything"
        )


def _capacity(layers: Iterable[_Layer]) -> int:
    return sum(each.most**2 for each in layers)


def _fitting(layers: list[_Layer], budget: int, step: int, flag: str) -> dict[str, int]:
    """Sides within the tolerance: of as many layers as the rule has, else of fewer, else of more."""
    wanted = _how_many(layers, budget)
    nearest = full if (full := _capacity(layers)) < budget else 0
    for count in (*range(wanted, 0, -1), *range(wanted + 1, len(layers) + 1)):
        chosen = layers[:count]
        if _capacity(chosen) < budget or sum(each.least**2 for each in chosen) > budget:
            continue
        _round(chosen, budget, step)
        used = _used(chosen)
        if (1 - TOLERANCE) * budget <= used <= budget:
            return {each.name: each.side for each in chosen}
        nearest = max(nearest, used if used <= budget else 0)
    raise UserError(
        f"{flag}: no squares of whole sides (multiples of {step}) come within 1% of {budget:,} parameters on these "
        f"layers; {nearest:,} can be had"
    )


def _how_many(layers: Sequence[_Layer], budget: int) -> int:
    """Of the first layers, the most whose last one still has rank 1: fewer layers leave more to each."""
    low, high = 1, len(layers)
    while low < high:
        count = (low + high + 1) // 2
        if _lambda(layers[:count], budget) * layers[count - 1].score >= 1:
            low = count
        else:
            high = count - 1
    while low < len(layers) and _capacity(layers[:low]) < budget:
        low += 1
    return low


def _lambda(layers: Iterable[_Layer], budget: int) -> float:
    """What uses the budget up; where layers are full the others have more."""
    left, weight, found = float(budget), math.fsum(each.weight for each in layers), math.inf
    for layer in sorted(layers, key=lambda each: (each.most**2 / each.weight, each.name)):
        found = left / weight
        if layer.most**2 > found * layer.weight:
            break
        left, weight = left - layer.most**2, max(weight - layer.weight, math.ulp(1.0))
    return found


def _round(layers: Sequence[_Layer], budget: int, step: int) -> None:
    """Sets `due` and `side` of each: rounded down, then up in turn, then moved until little is left."""
    factor = _lambda(layers, budget)
    for layer in layers:
        layer.due = min(float(layer.most), math.sqrt(factor * layer.weight))
        layer.side = max(layer.least, int(layer.due) // step * step)
    left = budget - _used(layers)
    for layer in sorted(layers, key=lambda each: each.side - each.due):
        if layer.side + step <= layer.most and _cost(layer, step) <= left:
            left -= _cost(layer, step)
            layer.side += step
    good = int(_GOOD_ENOUGH * budget)
    while not 0 <= left <= good:
        best = min(_moves(layers, step), key=lambda move: (_badness(left - _price(move), good), _stray(move)))
        if _badness(left - _price(best), good) >= _badness(left, good):
            return
        left -= _price(best)
        for layer, by in best:
            layer.side += by


_Move = tuple[tuple[_Layer, int], ...]
"""Layers, and by how much the side of each changes."""


def _moves(layers: Sequence[_Layer], step: int) -> Iterator[_Move]:
    """None, one side up or down, or one up and another down; of layers with the same side two stand for all."""
    yield ()
    up, down = _movable(layers, step), _movable(layers, -step)
    yield from (((layer, step),) for layer in up)
    yield from (((layer, -step),) for layer in down)
    yield from (((one, step), (other, -step)) for one in up for other in down if one is not other)


def _movable(layers: Sequence[_Layer], by: int) -> list[_Layer]:
    held: dict[int, list[_Layer]] = {}
    for layer in layers:
        side = layer.side + by
        if layer.least <= side <= layer.most and abs(side - layer.due) <= _STRAY * abs(by):
            held.setdefault(layer.side, []).append(layer)
    return [layer for same in held.values() for layer in same[:2]]


def _used(layers: Iterable[_Layer]) -> int:
    return sum(each.side**2 for each in layers)


def _cost(layer: _Layer, by: int) -> int:
    """Parameters that another side takes."""
    return (layer.side + by) ** 2 - layer.side**2


def _price(move: _Move) -> int:
    return sum(_cost(layer, by) for layer, by in move)


def _badness(left: int, good: int) -> tuple[bool, int]:
    """Too much is worse than any too little, and up to `good` nothing is too little."""
    return left < 0, 0 if 0 <= left <= good else abs(left)


def _stray(move: _Move) -> float:
    """How far from its due each side comes to be, in all."""
    return sum(abs(layer.side + by - layer.due) for layer, by in move)
