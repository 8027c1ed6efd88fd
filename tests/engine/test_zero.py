"""Sharded equals unsharded: under every ZeRO stage, 2 and 3 ranks follow one plain PyTorch process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import mora_ds
from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import frozen_buffers, inject, mora_layers
from mora_ds.adapters.ops.mora import delta_weight
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
    merge_by_hand,
)
from tests.helpers.gloo import run_ranks
from tests.helpers.models import causal_loss, tiny_model, tokens

pytestmark = pytest.mark.gloo

OPERATORS = ("truncate", "share", "decouple", "rotate")


def squares_model(operator: str, **config: Any) -> torch.nn.Module:
    """A tiny model whose squares are not zero, so that every path carries a gradient."""
    model = tiny_model("llama")
    inject(model, MoRAConfig(rank=4, operator=operator, **config))
    for index, layer in enumerate(mora_layers(model).values()):
        layer.square.data = 0.02 * torch.randn(layer.square.shape, generator=torch.Generator().manual_seed(index))
    return model


def plain_run(operator: str, merge_at: int | None = None) -> dict[str, Any]:
    """One process, no DeepSpeed, the whole global batch at once."""
    model = squares_model(operator)
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
        if step + 1 == merge_at:
            optimizer.state.clear()
            for layer in mora_layers(model).values():
                layer.weight += delta_weight(layer.spec, layer.square.data)
                layer.square.data.zero_()
    return {"losses": losses, "gradients": first, "squares": {n: m.square.data for n, m in mora_layers(model).items()}}


def sharded_run(operator: str, stage: int, merge_at: int | None = None, **changes: Any) -> dict[str, Any]:
    """The same on this rank of several."""
    world, rank = dist.get_world_size(), dist.get_rank()
    micro = ROWS // world
    model = squares_model(operator)
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
        if step + 1 == merge_at:
            merge_by_hand(engine)
    squares = {name: zero.full_fp32(engine, layer.square) for name, layer in mora_layers(model).items()}
    return {"losses": losses, "gradients": gradients, "squares": squares}


def all_operators(stage: int) -> list[dict[str, Any]]:
    return [sharded_run(operator, stage) for operator in OPERATORS]


@pytest.mark.parametrize(("world", "stage"), [(2, 3), (3, 3), (2, 2), (2, 1), (2, 0)])
def test_every_operator_follows_one_process(world: int, stage: int) -> None:
    ranks = run_ranks(world, all_operators, stage)
    for index, operator in enumerate(OPERATORS):
        expected = plain_run(operator)
        for results in ranks:
            assert_same_run(results[index], expected, gradients=stage == 3)


def assert_same_run(found: dict[str, Any], expected: dict[str, Any], gradients: bool = False) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for name, square in expected["squares"].items():
        torch.testing.assert_close(found["squares"][name], square, rtol=1e-4, atol=2e-5)
    for name, gradient in expected["gradients"].items() if gradients else ():
        scale = gradient.abs().max()
        assert (found["gradients"][name] - gradient).abs().max() <= 1e-5 * scale, name


def merged_runs(stage: int) -> list[dict[str, Any]]:
    return [sharded_run(operator, stage, merge_at=2) for operator in ("share", "rotate")]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_merge_resets_master_copies_and_moments(stage: int) -> None:
    """After the merge the run follows a plain one whose optimizer starts afresh: nothing of the old square is left."""
    ranks = run_ranks(2, merged_runs, stage)
    for index, operator in enumerate(("share", "rotate")):
        expected = plain_run(operator, merge_at=2)
        for results in ranks:
            assert_same_run(results[index], expected)


def half_merge(stage: int, dtype: str) -> dict[str, Any]:
    """Low precision: after a reset master and copies are exactly zero, and the first update is one learning rate."""
    model = squares_model("share")
    extra = {dtype: {"enabled": True}}
    if stage:
        extra["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, *_ = initialize(model=model, config=ds_config(stage, 3, **extra))
    layers = mora_layers(model)

    def step(seed: int) -> float:
        for index in range(ACCUMULATION):
            loss = causal_loss(engine, tokens(ROWS, seed=10 * seed + index)[dist.get_rank() * 3 :][:3])
            engine.backward(loss)
            engine.step()
        return loss.item()

    for seed in range(3):
        step(seed)
    probe = tokens(4, seed=99)
    with torch.no_grad():
        before = causal_loss(engine, probe).item()
    merge_by_hand(engine)
    masters = [zero.full_fp32(engine, layer.square).abs().max().item() for layer in layers.values()]
    with torch.no_grad():
        after = causal_loss(engine, probe).item()
    step(4)
    first = max(zero.full_fp32(engine, layer.square).abs().max().item() for layer in layers.values())
    return {"masters": masters, "before": before, "after": after, "first": first}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_merge_in_bf16_leaves_nothing_behind(stage: int) -> None:
    for result in run_ranks(2, half_merge, stage, "bf16"):
        assert max(result["masters"]) == 0.0
        assert result["after"] == pytest.approx(result["before"], abs=5e-3)
        assert result["first"] == pytest.approx(LEARNING_RATE, rel=0.01)  # 2.94 x this with the old step count


def count_bytes(accumulation: int, zero_settings: dict[str, int]) -> dict[str, Any]:
    """Everything torch.distributed itself carries while one step runs, counted below DeepSpeed."""
    model = squares_model("share")
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


def test_public_api_is_what_the_tests_use() -> None:
    assert mora_ds.initialize is initialize
