"""Costs of tensor parallelism counted by hand, for each kind of layer. The bytes of real ranks: tests/parallel."""

from __future__ import annotations

from typing import Any

from mora_ds.adapters.config import LoRAConfig, MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.planning.costs import Collective, Costs, Traffic, costs
from tests.helpers.models import tiny_model

BASE = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 56)
"""Weights of the linear layers of the tiny Llama's two decoder layers."""
TOKENS = 10


def sides(model: Any) -> list[int]:
    return [layer.value.shape[0] for layer in mora_layers(model).values()]


def test_one_rank_computes_all_and_sends_nothing() -> None:
    """Two products of the base (its weight has no gradient), three of M."""
    model = tiny_model()
    inject(model, MoRAConfig(rank=4, operator="share"))
    squares = sum(side**2 for side in sides(model))
    found = costs(model, 1, 1, TOKENS)
    assert (found.base_macs, found.square_macs) == (2 * BASE * TOKENS, 3 * squares * TOKENS)
    assert found.macs == found.base_macs + found.square_macs and found.traffic == () and found.wire() == 0
    assert (found.square_elements, found.trained) == (squares, "MoRA matrices")
    assert found.base_elements == sum(tensor.numel() for tensor in tiny_model().parameters())


def test_replicas_gather_each_matrix_twice_and_sum_its_gradient_once() -> None:
    model = tiny_model()
    inject(model, MoRAConfig(rank=4, operator="share"))
    squares = sum(side**2 for side in sides(model))
    found = costs(model, 1, 4, TOKENS)
    assert {(item.what, item.ranks, item.times) for item in found.traffic} == {("square", 4, 2), ("square", 4, 1)}
    assert found.payload(Collective.GATHER) == 2 * squares and found.payload(Collective.SCATTER) == squares
    assert found.payload(*Collective) == 3 * squares and found.payload(Collective.SUM) == 0
    assert found.wire() == found.wire("square") == 3 * squares * 3 / 4 and found.wire("activation") == 0
    assert found.square_elements == squares / 4


def test_the_heads_own_product_is_left_out_but_not_its_matrix() -> None:
    model = tiny_model()
    inject(model, MoRAConfig(rank=4, operator="share", target_modules=["q_proj", "lm_head"]))
    found = costs(model, 1, 1, TOKENS)
    assert found.base_macs == 2 * BASE * TOKENS
    assert found.square_macs == 3 * sum(side**2 for side in sides(model)) * TOKENS and len(sides(model)) == 3


def test_factors_of_lora() -> None:
    model = tiny_model()
    inject(model, LoRAConfig(rank=4, target_modules=["q_proj"]))
    found = costs(model, 1, 2, TOKENS)
    factors = 2 * 4 * (32 + 32)
    assert found.trained == "factors" and found.square_elements == factors / 2
    assert found.square_macs == TOKENS * sum(layer.spec.macs_per_token for layer in mora_layers(model).values())
    assert found.square_macs == 3 * TOKENS * factors
    assert found.payload(Collective.GATHER) == 2 * factors and found.base_macs == 2 * BASE * TOKENS


def test_a_domains_matrix_is_gathered_beside_the_shared_one() -> None:
    """While their operators are equal, their sum is one matrix; and a frozen shared one is not sent."""
    shared, both = tiny_model(), tiny_model()
    inject(shared, MoRAConfig(rank=4))
    inject(both, MoRAConfig(rank=4, domains=("law", "code")))
    one, two = (costs(model, 1, 2, TOKENS) for model in (shared, both))
    assert two.square_macs == one.square_macs and two.base_macs == one.base_macs
    own = sum(layer.domain_squares.numel() for layer in mora_layers(both).values())
    assert two.payload(Collective.SCATTER) == one.payload(Collective.SCATTER) + own
    frozen = tiny_model()
    inject(frozen, MoRAConfig(rank=4, domains=("law", "code"), freeze="shared"))
    assert costs(frozen, 1, 2, TOKENS).payload(Collective.SCATTER) == own


def test_what_a_rank_does_is_said() -> None:
    traffic = (
        Traffic("square", Collective.GATHER, 4, 1_000_000, 2),
        Traffic("activation", Collective.SUM, 2, 3_000_000),
    )
    assert [item.wire for item in traffic] == [1_500_000, 3_000_000] and traffic[0].payload == 2_000_000
    spent = Costs(2_000_000_000, 500_000_000, traffic, 1234567, 89.6, "factors")
    assert str(spent).splitlines() == [
        "each rank stores the unsharded base (1,234,567 elements) and 90 elements of the factors",
        "each rank computes 2.500 G multiply-accumulates a micro-batch (base 2.000, factors 0.500) and sends "
        "4.500 M elements (factors 1.500, activations 3.000, base 0)",
    ]
