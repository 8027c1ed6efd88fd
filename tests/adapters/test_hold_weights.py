"""--hold_weights: W0 + update is formed once a step and kept for backward: the same bits, the planned memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoConfig

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.held_weights import hold_weights, weights_held
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.ops import blocks, linear
from mora_ds.planning.step import Work, step_memory
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import job, playground, refusal
from tests.helpers.models import FAMILIES, tiny_model, tokens
from tests.helpers.resume import assert_same_tensors, checkpoint_tensors


class Counted:
    """A function that forms a weight, and how often it was called."""

    def __init__(self, form: Any) -> None:
        self.form, self.times = form, 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.times += 1
        return self.form(*arguments, **named)


def trained(config: MoRAConfig, holds: bool, checkpointing: bool = False) -> tuple[list[float], list[Any], int]:
    """Losses of three micro-batches, of which the last follows a step, and after another step; gradients; how often a
    weight was formed."""
    model: Any = tiny_model("llama")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inject(model, config)
    if holds:
        hold_weights(model)
    generator = torch.Generator().manual_seed(0)
    values = [layer.value for layer in mora_layers(model.train()).values()]
    for value in values:
        value.data = torch.randn(value.shape, generator=generator) / 20
    ids = tokens(6)
    losses = []
    whole, by_blocks = Counted(linear.effective_weight), Counted(blocks.form)
    with patch.object(linear, "effective_weight", whole), patch.object(blocks, "form", by_blocks):
        for micro_batches in (ids[:4].chunk(2), [ids[4:]]):
            with weights_held(model):
                for rows in micro_batches:
                    loss = model(input_ids=rows, labels=rows).loss
                    loss.backward()
                    losses.append(loss.item())
            for value in values:
                value.data -= 0.1 * value.grad
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    return losses, [value.grad for value in values], whole.times + by_blocks.times


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("operator", "compute"), [("share", "weight"), ("rotate", "weight"), ("rotate", "blocks")])
def test_a_weight_is_formed_once_a_step_and_the_numbers_are_the_same(
    operator: str, compute: str, checkpointing: bool
) -> None:
    config = MoRAConfig(rank=4, operator=operator, compute=compute)
    losses, gradients, often = trained(config, holds=False, checkpointing=checkpointing)
    again, held, once = trained(config, holds=True, checkpointing=checkpointing)
    assert again == losses and all(torch.equal(a, b) for a, b in zip(held, gradients, strict=True))
    assert once == 3 * len(gradients) and often > 2 * once


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compute", ["auto", "weight"])
def test_a_plan_counts_them(compute: str, checkpointing: bool) -> None:
    config = AutoConfig.for_model("llama", **FAMILIES["llama"])
    work = Work(config, MoRAConfig(rank=4, operator="share", compute="weight"), 64, 2, torch.float32)
    work = replace(work, checkpointing=checkpointing)
    held = step_memory(replace(work, hold_weights=True, adapter=replace(work.adapter, compute=compute)))
    layers = mora_layers(_injected())
    weights = sum(4 * layer.in_features * layer.out_features for layer in layers.values())
    assert held.saved - step_memory(work).saved == weights


def _injected() -> Any:
    model = tiny_model("llama")
    inject(model, MoRAConfig(rank=4))
    return model


def formed(argv: list[str]) -> tuple[int, int]:
    """How often a run forms a weight; layers times steps. For `run_ranks`."""
    with patch.object(linear, "effective_weight", Counted(linear.effective_weight)) as form:
        steps = job(argv)["steps"]
    return form.times, len(mora_layers(_injected())) * steps


@pytest.mark.gloo
def test_a_run_ends_with_the_same_bits_and_contradictions_are_named(tmp_path: Path) -> None:
    user = playground(tmp_path)
    weight = ["--compute", "weight", "--gradient_accumulation_steps", 4]
    often, once = (
        run_ranks(1, formed, user.flags(tmp_path / name, *flags))
        for name, flags in (("whole", weight), ("held", [*weight, "--hold_weights"]))
    )
    (whole, products), (held, _) = *often, *once
    assert whole - held > 5 * products, "in place of 8 times a step, but for layers whose input needs no gradient"
    assert_same_tensors(checkpoint_tensors(tmp_path / "held"), checkpoint_tensors(tmp_path / "whole"))
    for more, message in (
        (("--adapter", "lora"), "--hold_weights is for MoRA matrices, and --adapter is lora"),
        (("--compute", "activation"), "--hold_weights: layers that are computed over activations"),
        (("--tensor_parallel_size", 2), "--hold_weights: layers that are split by --tensor_parallel_size keep nothing"),
    ):
        assert message in refusal(user.flags(tmp_path / "no", "--hold_weights", *more))
