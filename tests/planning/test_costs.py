"""Traffic of one micro-batch counted by hand, for each kind of layer. The bytes of real ranks: tests/parallel."""

from typing import Any

from mora_ds.adapters.config import LoRAConfig, MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.planning.costs import Collective, Costs, Traffic, costs
from tests.helpers.models import tiny_model

TOKENS = 10


def injected(config: Any) -> Any:
    model = tiny_model()
    inject(model, config)
    return model


def test_a_rank_stores_the_base_and_its_share_of_the_matrices() -> None:
    """What ranks send is compared with real ones in tests/parallel."""
    model = injected(MoRAConfig(rank=4, operator="share"))
    squares = sum(layer.value.numel() for layer in mora_layers(model).values())
    alone = costs(model, 1, 1, TOKENS)
    assert alone.traffic == ()
    assert alone.wire() == 0
    assert (alone.square_elements, alone.trained) == (squares, "MoRA matrices")
    assert alone.base_elements == sum(tensor.numel() for tensor in tiny_model().parameters())
    cost = costs(model, 1, 4, TOKENS)
    assert cost.wire() == cost.wire("square") == 3 * squares * 3 / 4
    assert cost.square_elements == squares / 4


def test_factors_of_lora() -> None:
    cost = costs(injected(LoRAConfig(rank=4, target_modules=["q_proj"])), 1, 2, TOKENS)
    factors = 2 * 4 * (32 + 32)
    assert cost.trained == "factors"
    assert cost.square_elements == factors / 2
    assert cost.payload(Collective.GATHER) == 2 * factors


def test_a_domains_matrix_is_gathered_beside_the_shared_one() -> None:
    """And a frozen shared one is not sent."""
    both = injected(MoRAConfig(rank=4, domains=("law", "code")))
    shared, two, frozen = (
        costs(model, 1, 2, TOKENS).payload(Collective.SCATTER)
        for model in (
            injected(MoRAConfig(rank=4)),
            both,
            injected(MoRAConfig(rank=4, domains=("law", "code"), freeze="shared")),
        )
    )
    domain_elements = sum(layer.domain_squares.numel() for layer in mora_layers(both).values())
    assert two == shared + domain_elements
    assert frozen == domain_elements


def test_what_a_rank_does_is_said() -> None:
    traffic = (
        Traffic("square", Collective.GATHER, 4, 1_000_000, 2),
        Traffic("activation", Collective.SUM, 2, 3_000_000),
    )
    assert [item.wire for item in traffic] == [1_500_000, 3_000_000]
    assert traffic[0].payload == 2_000_000
    assert str(Costs(traffic, 1234567, 89.6, "factors")).splitlines() == [
        "each rank stores the unsharded base (1,234,567 elements) and 90 elements of the factors",
        "each rank sends 4.500 M elements a micro-batch (factors 1.500, activations 3.000, base 0)",
    ]
