"""--embedding_learning_rate: what is trained beside the squares has a rate of its own, whoever holds its state."""

from __future__ import annotations

import pytest

from mora_ds import MoRAConfig, initialize, inject
from mora_ds.adapters.inject import mora_layers
from mora_ds.engine import zero
from tests.helpers.engines import ds_config
from tests.helpers.gloo import run_ranks
from tests.helpers.models import causal_loss, tiny_model, tokens

RATE, SHARE = 0.05, 0.125


def first_steps(stages: list[int]) -> list[tuple[float, float]]:
    """How far Adam's first step moves the squares and the embeddings at most, which is the rate."""
    return [_first_step(stage) for stage in stages]


def _first_step(stage: int) -> tuple[float, float]:
    model = tiny_model("llama")
    inject(model, MoRAConfig(rank=4, train_embeddings=True))
    engine, *_ = initialize(model=model, config=ds_config(stage, 2, 1))
    groups = [[layer.square for layer in mora_layers(model).values()], [model.get_input_embeddings().weight]]
    before = [[zero.full_fp32(engine, each).clone() for each in group] for group in groups]
    zero.set_learning_rate(engine, RATE, SHARE)
    engine.backward(causal_loss(engine, tokens(2)))
    engine.step()
    moved = [
        max((zero.full_fp32(engine, each) - then).abs().max().item() for each, then in zip(group, old, strict=True))
        for group, old in zip(groups, before, strict=True)
    ]
    return moved[0], moved[1]


@pytest.mark.gloo
def test_squares_and_embeddings_have_their_own_rates_at_every_stage() -> None:
    for found in run_ranks(2, first_steps, [0, 1, 2, 3]):
        for squares, table in found:
            assert squares == pytest.approx(RATE, rel=2e-2)
            assert table == pytest.approx(RATE * SHARE, rel=2e-2)
