"""How a budget of parameters is divided among layers."""

from __future__ import annotations

import random

import pytest

from mora_ds.adapters.rank_allocation import TOLERANCE, Candidate, spend
from mora_ds.common.errors import UserError

PROJECTIONS = [Candidate(f"layers.{n}.{name}", 64, 64, 64, 0.5) for n in range(4) for name in "abcd"]


def used(sides: dict[str, int]) -> int:
    return sum(side**2 for side in sides.values())


@pytest.mark.parametrize("step", [1, 2])
def test_any_budget_is_held_within_one_per_cent(step: int) -> None:
    chance = random.Random(step)
    for _ in range(300):
        shapes = [(chance.choice((16, 32, 56, 64)), chance.choice((16, 32, 56, 64))) for _ in range(14)]
        candidates = [Candidate(f"l{n}", *shape, max(shape), chance.random()) for n, shape in enumerate(shapes)]
        budget = chance.randint(700, sum(max(shape) ** 2 for shape in shapes))
        sides = spend(candidates, budget, step)
        assert (1 - TOLERANCE) * budget <= used(sides) <= budget
        assert all(side % step == 0 and side <= max(shape) for side, shape in zip(sides.values(), shapes, strict=True))


def test_sides_are_multiples_where_such_sides_meet_the_budget() -> None:
    """60 layers of a 7B Llama's shapes; of one layer, no multiple of 16 comes within 1%."""
    shapes = [(4096, 4096), (4096, 11008), (11008, 4096)] * 20
    candidates = [Candidate(f"l{n}", *shape, max(shape), 1 + n % 7) for n, shape in enumerate(shapes)]
    for budget in (2_000_000, 20_000_000):
        sides = spend(candidates, budget, smallest=2, multiple=16)
        assert (1 - TOLERANCE) * budget <= used(sides) <= budget
        assert all(side % 16 == 0 for side in sides.values())
    one = [Candidate("only", 512, 512, 512)]
    assert spend(one, 104**2, 1, multiple=16) == {"only": 104}
    assert spend(one, 105**2, 1, multiple=16) == {"only": 105}
    assert spend(one, 112**2, 1, multiple=16) == {"only": 112}
    large = [Candidate("only", 1024, 1024, 1024)]
    assert spend(large, 88404, 1, multiple=16) == {"only": 296}, "a multiple of 8, although 297 is nearer to the budget"


def test_sizes_follow_scores_and_shapes() -> None:
    candidates = [
        Candidate("plain", 64, 64, 64, 0.4), Candidate("twice", 64, 64, 64, 0.8), Candidate("wide", 64, 192, 192, 0.4),
    ]  # fmt: skip
    sides = spend(candidates, 4_000)
    assert sides["twice"] ** 2 == pytest.approx(2 * sides["plain"] ** 2, rel=0.1)
    assert sides["wide"] ** 2 == pytest.approx(2 * sides["plain"] ** 2, rel=0.1)


def test_a_layer_is_never_given_more_than_its_longer_side() -> None:
    sides = spend([Candidate("a", 16, 16, 16, 1.0), Candidate("b", 64, 64, 64, 0.1)], 256 + 900)
    assert sides == {"a": 16, "b": 30}
    assert set(spend(PROJECTIONS, 16 * 64**2).values()) == {64}, "as much as all layers can hold"


def test_a_small_budget_goes_to_the_best_layers() -> None:
    candidates = [Candidate(f"l{n}", 32, 32, 32, score) for n, score in enumerate((0.2, 0.9, 0.1, 0.8))]
    assert spend(candidates, 200) == {"l0": 0, "l1": 10, "l2": 0, "l3": 10}


def test_the_same_numbers_give_the_same_sides_in_any_order() -> None:
    sides = spend(PROJECTIONS, 5_000, smallest=2)
    shuffled = random.Random(0).sample(PROJECTIONS, len(PROJECTIONS))
    assert spend(shuffled, 5_000, smallest=2) == sides and list(sides) == [each.name for each in PROJECTIONS]
    noisy = [Candidate(each.name, 64, 64, 64, 0.5 * (1 + 1e-9 * n)) for n, each in enumerate(PROJECTIONS)]
    assert spend(noisy, 5_000, smallest=2) == sides


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (63, r"63 parameters are too few for one MoRA matrix: the smallest, of side 11 on layers\.0\.a, has 121"),
        (16 * 64**2 + 1, "65,537 parameters are more than the 16 layers can hold: 65,536"),
    ],
)
def test_budgets_that_cannot_be(budget: int, message: str) -> None:
    with pytest.raises(UserError, match=f"--trainable_budget: {message}"):
        spend(PROJECTIONS, budget)


def test_a_budget_between_two_squares_is_refused_with_what_can_be_had() -> None:
    with pytest.raises(UserError, match=r"come within 1% of 206 parameters; the nearest below is 196"):
        spend([Candidate("only", 32, 32, 32, 1.0)], 206)
    small_and_large = [Candidate("small", 16, 16, 16, 0.5), Candidate("large", 400, 400, 400, 1.0)]
    with pytest.raises(UserError, match=r"come within 1% of 300 parameters; the nearest below is 256"):
        spend(small_and_large, 300)
    with pytest.raises(UserError, match="no layer has a score above 0"):
        spend([Candidate("only", 32, 32, 32, 0.0)], 206)
