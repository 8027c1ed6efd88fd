"""How --targets auto divides a budget of parameters among layers: the side r_hat of each layer's MoRA matrix.

    score     of a layer: what a parameter is worth there, from its weights or from gradients
    r_hat^2   = lambda * score * (d_in + d_out)      MoRA's own size, r_hat^2 = rank * (d_in + d_out), with a rank in
                                                     proportion to the score; lambda uses the budget up

A layer gets a matrix if its rank lambda * score is 1 or more, so that a small budget goes to the layers of the highest
scores; the side is at most the largest that adds anything. Sides are rounded down as those of `--mora_rank` are
(`round_side`), then changed by single steps, those furthest below the rule first, until the sum of r_hat^2 is within
`TOLERANCE` below the budget. Where no such sides are, as with few or small layers, multiples of 8 are tried, then every
side that the operator takes. Scores count to four digits and ties go by name: the same scores give the same sides, in
any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from mora_ds.adapters.ops.spec import round_side
from mora_ds.common.errors import UserError

TOLERANCE = 0.01
"""Share of the budget that may be left over."""

_GOOD_ENOUGH = 0.005
"""Share left over at which no more sides are changed: the fewer changes, the nearer to the rule."""

_MOST_STEPS = 2
"""Steps that a side may end away from the rule."""

_FALLBACKS = (8, 1)
"""Multiples for budgets that the wanted one does not meet; of bf16 numbers, 8 are 16 bytes."""


@dataclass(frozen=True)
class Candidate:
    """A layer that may get a MoRA matrix."""

    name: str
    d_in: int
    d_out: int
    largest: int
    """Largest side that adds anything there."""
    score: float = 1.0
    """Not negative; only ratios matter."""


@dataclass(frozen=True)
class _Grid:
    """The sides to choose among: those that `round_side` gives."""

    multiple: int
    smallest: int

    def down(self, side: float) -> int:
        """The largest one that is at most `side`."""
        return round_side(int(side), self.multiple, self.smallest)

    def up(self, side: int) -> int:
        """The one above `side`."""
        above = side + 1
        while self.down(above) <= side:
            above += 1
        return above


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
    ideal: float = 0.0
    """The side by the rule, not rounded."""
    side: int = 0

    def cost(self, to: int) -> int:
        """Parameters that the side `to` takes more."""
        return to**2 - self.side**2


_Move = tuple[tuple[_Layer, int], ...]
"""Layers, and the side that each changes to."""


def spend(
    candidates: Sequence[Candidate],
    budget: int,
    smallest: int = 1,
    multiple: int = 1,
    flag: str = "--trainable_budget",
) -> dict[str, int]:
    """Name -> side (0: no matrix), in the order of `candidates`. `smallest` and `multiple`: as for `round_side`.

    Raises `UserError` naming `flag` for a budget that is too small for one matrix, more than all layers can hold, or
    that no sides come within `TOLERANCE` of.
    """
    check_budget([each for each in candidates if each.score > 0], budget, smallest, flag)
    nearest = 0
    for each in (multiple, *(other for other in _FALLBACKS if other < multiple)):
        grid = _Grid(each, smallest)
        layers = [layer for layer in _usable(candidates, grid) if layer.score > 0 and layer.least**2 <= budget]
        layers.sort(key=lambda layer: (-layer.score, layer.name))
        chosen, used = _fitting(layers, budget, grid) if layers else ({}, 0)
        if chosen:
            return {candidate.name: chosen.get(candidate.name, 0) for candidate in candidates}
        nearest = max(nearest, used)
    raise UserError(
        f"{flag}: no sides (multiples of {smallest}) of these layers' matrices come within 1% of {budget:,} "
        f"parameters; the nearest below is {nearest:,}"
    )


def check_budget(
    candidates: Iterable[Candidate], budget: int, smallest: int = 1, flag: str = "--trainable_budget"
) -> None:
    """Raises those `UserError`s of `spend` that do not depend on scores."""
    _check(_usable(candidates, _Grid(1, smallest)), budget, flag)


def _usable(candidates: Iterable[Candidate], grid: _Grid) -> list[_Layer]:
    layers = []
    for each in candidates:
        sides, score = each.d_in + each.d_out, float(f"{each.score:.3e}")
        least, most = max(grid.down(math.isqrt(sides)), grid.smallest), grid.down(each.largest)
        if least <= most:
            layers.append(_Layer(each.name, score, score * sides, least, most))
    return layers


def _check(layers: Sequence[_Layer], budget: int, flag: str) -> None:
    if not layers:
        raise UserError(f"{flag}: no layer has a score above 0 and is large enough for a MoRA matrix")
    smallest = min(layers, key=lambda each: (each.least, each.name))
    if budget < smallest.least**2:
        raise UserError(
            f"{flag}: {budget:,} parameters are too few for one MoRA matrix: the smallest, of side {smallest.least} on "
            f"{smallest.name}, has {smallest.least**2:,}"
        )
    if budget > (capacity := _capacity(layers)):
        raise UserError(
            f"{flag}: {budget:,} parameters are more than the {len(layers)} layers can hold: {capacity:,}, with the "
            "largest matrices that add anything"
        )


def _capacity(layers: Iterable[_Layer]) -> int:
    return sum(each.most**2 for each in layers)


def _used(layers: Iterable[_Layer]) -> int:
    return sum(each.side**2 for each in layers)


def _fitting(layers: list[_Layer], budget: int, grid: _Grid) -> tuple[dict[str, int], int]:
    """Sides within the tolerance, of as many layers as the rule gives. Of fewer or of more only where every side is on
    the grid, and finer ones are none. Without such sides {}; and the number of parameters that is nearest below."""
    wanted = _how_many(layers, budget)
    others = (*range(wanted - 1, 0, -1), *range(wanted + 1, len(layers) + 1)) if grid.multiple == 1 else ()
    nearest = full if (full := _capacity(layers)) < budget else 0
    for count in (wanted, *others):
        chosen = layers[:count]
        if _capacity(chosen) < budget or sum(each.least**2 for each in chosen) > budget:
            continue
        _round(chosen, budget, grid)
        used = _used(chosen)
        if (1 - TOLERANCE) * budget <= used <= budget:
            return {each.name: each.side for each in chosen}, used
        nearest = max(nearest, used if used <= budget else 0)
    return {}, nearest


def _how_many(layers: Sequence[_Layer], budget: int) -> int:
    """The largest number of first layers of which the last one still has rank 1: fewer layers leave more to each."""
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
    """The factor that uses the budget up; what full layers cannot take goes to the others."""
    left, weight, factor = float(budget), math.fsum(each.weight for each in layers), math.inf
    for layer in sorted(layers, key=lambda each: (each.most**2 / each.weight, each.name)):
        factor = left / weight
        if layer.most**2 > factor * layer.weight:
            break
        left, weight = left - layer.most**2, max(weight - layer.weight, math.ulp(1.0))
    return factor


def _round(layers: Sequence[_Layer], budget: int, grid: _Grid) -> None:
    """Sets `ideal` and `side` of each layer: rounded down, then up in turn, then changed until little is left over."""
    factor = _lambda(layers, budget)
    for layer in layers:
        layer.ideal = min(float(layer.most), math.sqrt(factor * layer.weight))
        layer.side = max(layer.least, grid.down(layer.ideal))
    left = budget - _used(layers)
    for layer in sorted(layers, key=lambda each: each.side - each.ideal):
        above = grid.up(layer.side)
        if above <= layer.most and layer.cost(above) <= left:
            left -= layer.cost(above)
            layer.side = above
    good = int(_GOOD_ENOUGH * budget)

    def rating(move: _Move) -> tuple[bool, int]:
        """Too much is worse than any too little, and up to `good` nothing is too little."""
        rest = left - sum(layer.cost(to) for layer, to in move)
        return rest < 0, 0 if 0 <= rest <= good else abs(rest)

    def distance(move: _Move) -> float:
        """Sum of the distances from the rule."""
        return sum(abs(to - layer.ideal) for layer, to in move)

    while not 0 <= left <= good:
        best = min(_moves(layers, grid), key=lambda move: (rating(move), distance(move)))
        if rating(best) >= rating(()):
            return
        left -= sum(layer.cost(to) for layer, to in best)
        for layer, to in best:
            layer.side = to


def _moves(layers: Sequence[_Layer], grid: _Grid) -> Iterator[_Move]:
    """No change, one side up or down, or one up and another down; of layers with the same side two are tried."""
    yield ()
    up, down = _movable(layers, grid.up), _movable(layers, lambda side: grid.down(side - 1))
    yield from ((each,) for each in (*up, *down))
    yield from ((one, other) for one in up for other in down if one[0] is not other[0])


def _movable(layers: Sequence[_Layer], moved: Callable[[int], int]) -> list[tuple[_Layer, int]]:
    of_side: dict[int, list[tuple[_Layer, int]]] = {}
    for layer in layers:
        to = moved(layer.side)
        if layer.least <= to <= layer.most and abs(to - layer.ideal) <= _MOST_STEPS * abs(to - layer.side):
            of_side.setdefault(layer.side, []).append((layer, to))
    return [each for same in of_side.values() for each in same[:2]]
