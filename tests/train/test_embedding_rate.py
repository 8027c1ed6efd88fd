"""--embedding_learning_rate: other trained parameters have their own learning rate at every
ZeRO stage.
"""

import itertools

import pytest

from mora_ds import initialize
from mora_ds.adapters.inject import mora_layers
from mora_ds.engine import zero
from tests.helpers.engines import ds_config
from tests.helpers.models import micro_step, model_with_mora, tokens
from tests.helpers.pool import run_pooled

RATE = 0.05
SHARE = 0.125


def first_step(stage):
    """How far Adam's first step moves the MoRA matrices and the embeddings at most: their
    learning rates.
    """
    model = model_with_mora(train_embeddings=True)
    engine, *_ = initialize(model=model, config=ds_config(stage, 2, 1))
    groups = [
        [layer.square for layer in mora_layers(model).values()],
        [model.get_input_embeddings().weight],
    ]
    before = [[zero.full_fp32(value).clone() for value in group] for group in groups]
    zero.set_learning_rate(engine, RATE, SHARE)
    micro_step(engine, tokens(2))
    return [
        max(
            (zero.full_fp32(value) - then).abs().max().item()
            for value, then in zip(group, old, strict=True)
        )
        for group, old in zip(groups, before, strict=True)
    ]


def first_steps(stages):
    return [first_step(stage) for stage in stages]


def test_matrices_and_embeddings_have_their_own_learning_rates_at_every_stage():
    for moved in itertools.chain(*run_pooled(2, first_steps, [1, 2, 3])):
        assert moved == pytest.approx([RATE, RATE * SHARE], rel=2e-2)
