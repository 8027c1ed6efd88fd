"""What ZeRO-3 puts on the wire: the MoRA matrices, and nothing of the base."""

from typing import Any

import pytest

from mora_ds.adapters.inject import frozen_buffers, mora_layers
from mora_ds.engine.initialize import initialize
from mora_ds.engine.traffic import CollectiveCounter
from tests.helpers.engines import CountedBelow, ds_config
from tests.helpers.gloo import run_ranks
from tests.helpers.models import adapted_model, causal_loss, tokens


def count_bytes(accumulation: int, zero_settings: dict[str, int]) -> dict[str, Any]:
    """Everything torch.distributed itself carries while one step runs, counted below DeepSpeed."""
    model = adapted_model()
    config = ds_config(3, 3, accumulation)
    config["zero_optimization"].update(zero_settings)
    engine, *_ = initialize(model=model, config=config)
    counter = CollectiveCounter(frozen_buffers(model).values())
    seen: dict[str, int] = {}
    with counter.counting(), CountedBelow(seen):
        for step in range(3):
            counter.reset()
            seen.clear()
            for _ in range(accumulation):
                engine.backward(causal_loss(engine, tokens(3, seed=step)))
                engine.step()
        gathered = counter.gathered_bytes
    trainable = sum(layer.square.ds_numel for layer in mora_layers(model).values())
    padded = sum(-(-layer.square.ds_numel // 2) * 2 for layer in mora_layers(model).values())
    base = sum({t.data_ptr(): t.numel() for t in frozen_buffers(model).values()}.values())
    return {
        "gathered": gathered, "seen": dict(seen), "trainable": trainable, "padded": padded, "base": base,
        "base_bytes": counter.base_bytes,
    }  # fmt: skip


@pytest.mark.parametrize(
    "passes, accumulation, settings",
    [
        (1, 1, {}),  # gathered in forward, kept for backward
        (3, 3, {}),  # once a micro-batch
        (2, 1, {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}),  # forward and backward
        (1, 1, {"stage3_param_persistence_threshold": 10**6}),  # kept gathered, refreshed once a step
        (1, 3, {"stage3_param_persistence_threshold": 10**6}),
    ],
)
def test_collectives_carry_the_squares_and_nothing_else(
    passes: int, accumulation: int, settings: dict[str, int]
) -> None:
    for result in run_ranks(2, count_bytes, accumulation, settings):
        gathers = sum(count for name, count in result["seen"].items() if "gather" in name)
        assert result["gathered"] == gathers == passes * 4 * result["padded"]
        everything = sum(result["seen"].values())
        reductions = accumulation * 4 * result["padded"]
        assert everything <= gathers + reductions + 512 * accumulation  # + norms and flags
        assert result["base_bytes"] == 0
