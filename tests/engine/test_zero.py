"""Sharded equals unsharded: under every ZeRO stage, 2 and 3 ranks follow one plain PyTorch process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from mora_ds.adapters.inject import frozen_buffers, mora_layers
from mora_ds.engine import zero
from mora_ds.engine.initialize import initialize
from mora_ds.engine.traffic import CollectiveCounter
from tests.helpers.engines import (
    ACCUMULATION,
    CLIP,
    EPSILON,
    LEARNING_RATE,
    ROWS,
    STEPS,
    CountedBelow,
    ds_config,
)
from tests.helpers.gloo import run_ranks
from tests.helpers.models import adapted_model, causal_loss, tokens

pytestmark = pytest.mark.gloo

OPERATORS = ("truncate", "share", "decouple", "rotate")


def plain_run(operator: str) -> dict[str, Any]:
    """One process, no DeepSpeed, the complete global batch at once."""
    model = adapted_model(operator=operator)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, eps=EPSILON, weight_decay=0.0)
    losses, first = [], {}
    for step in range(STEPS):
        loss = causal_loss(model, tokens(ROWS * ACCUMULATION, seed=step))
        loss.backward()
        if step == 0:
            first = {name: layer.square.grad.clone() for name, layer in mora_layers(model).items()}
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "gradients": first, "squares": {n: m.square.data for n, m in mora_layers(model).items()}}


def sharded_run(operator: str, stage: int, **changes: Any) -> dict[str, Any]:
    """The same on this rank of several."""
    world, rank = dist.get_world_size(), dist.get_rank()
    micro = ROWS // world
    model = adapted_model(operator=operator)
    engine, *_ = initialize(model=model, config=ds_config(stage, micro, **changes))
    losses, gradients = [], {}
    for step in range(STEPS):
        total = 0.0
        rows = tokens(ROWS * ACCUMULATION, seed=step).view(ACCUMULATION, world, micro, -1)
        for index in range(ACCUMULATION):
            loss = causal_loss(engine, rows[index, rank])
            engine.backward(loss)
            if step == 0 and index == ACCUMULATION - 1:
                from deepspeed.utils import safe_get_full_grad

                gradients = {name: safe_get_full_grad(m.square).clone() for name, m in mora_layers(model).items()}
            engine.step()
            total += loss.item() / ACCUMULATION
        mean = torch.tensor(total)
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
    squares = {name: zero.full_fp32(engine, layer.square) for name, layer in mora_layers(model).items()}
    return {"losses": losses, "gradients": gradients, "squares": squares}


def several_operators(operators: tuple[str, ...], stage: int) -> list[dict[str, Any]]:
    return [sharded_run(operator, stage) for operator in operators]


@pytest.mark.parametrize(
    ("world", "stage", "operators"),
    [(2, 3, OPERATORS), (3, 3, ("rotate",)), (2, 2, ("share",)), (2, 1, ("decouple",)), (2, 0, ("truncate",))],
)
def test_every_operator_follows_one_process(world: int, stage: int, operators: tuple[str, ...]) -> None:
    ranks = run_ranks(world, several_operators, operators, stage)
    for index, operator in enumerate(operators):
        expected = plain_run(operator)
        for found in (results[index] for results in ranks):
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
            for name, square in expected["squares"].items():
                torch.testing.assert_close(found["squares"][name], square, rtol=1e-4, atol=2e-5)
            for name, gradient in expected["gradients"].items() if stage == 3 else ():
                assert (found["gradients"][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


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
    ("passes", "accumulation", "settings"),
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
