"""--hold_weights: W0 + update is formed once a micro-batch and kept for backward: the same bits, the planned memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoConfig

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import hold_weights, inject, mora_layers
from mora_ds.adapters.ops import blocks, linear
from mora_ds.planning.step import Work, step_memory
from tests.helpers.jobs import playground, refusal, run
from tests.helpers.models import FAMILIES, tiny_model, tokens
from tests.helpers.resume import assert_same_tensors, checkpoint_tensors


def trained(config: MoRAConfig, holds: bool) -> tuple[float, list[Any], int]:
    """Loss, gradients, and how often a weight was formed."""
    formed = 0

    def counted(form: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal formed
            formed += 1
            return form(*arguments)

        return call

    model: Any = tiny_model("llama")
    inject(model, config)
    if holds:
        hold_weights(model)
    generator = torch.Generator().manual_seed(0)
    layers = mora_layers(model.train())
    for layer in layers.values():
        layer.value.data = torch.randn(layer.value.shape, generator=generator) / 20
    ids = tokens(2)
    with (
        patch.object(linear, "effective_weight", counted(linear.effective_weight)),
        patch.object(blocks, "form", counted(blocks.form)),
    ):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    return loss.item(), [layer.value.grad for layer in layers.values()], formed


@pytest.mark.parametrize(("operator", "compute"), [("share", "weight"), ("rotate", "weight"), ("rotate", "blocks")])
def test_a_weight_is_formed_once_and_the_numbers_are_the_same(operator: str, compute: str) -> None:
    config = MoRAConfig(rank=4, operator=operator, compute=compute)
    loss, gradients, twice = trained(config, holds=False)
    again, held, once = trained(config, holds=True)
    assert again == loss and all(torch.equal(a, b) for a, b in zip(held, gradients, strict=True))
    assert once == len(gradients) and twice > 1.5 * once


@pytest.mark.parametrize("compute", ["auto", "weight"])
def test_a_plan_counts_them(compute: str) -> None:
    config = AutoConfig.for_model("llama", **FAMILIES["llama"])
    work = Work(config, MoRAConfig(rank=4, operator="share", compute="weight"), 64, 2, torch.float32)
    held = step_memory(replace(work, hold_weights=True, adapter=replace(work.adapter, compute=compute)))
    layers = mora_layers(_injected())
    weights = sum(4 * layer.in_features * layer.out_features for layer in layers.values())
    assert held.saved - step_memory(work).saved == weights


def _injected() -> Any:
    model = tiny_model("llama")
    inject(model, MoRAConfig(rank=4))
    return model


@pytest.mark.gloo
def test_a_run_ends_with_the_same_bits_and_contradictions_are_named(tmp_path: Path) -> None:
    user = playground(tmp_path)
    for name, more in (("whole", ()), ("held", ("--hold_weights",))):
        run(1, user.flags(tmp_path / name, "--compute", "weight", *more))
    assert_same_tensors(checkpoint_tensors(tmp_path / "held"), checkpoint_tensors(tmp_path / "whole"))
    for more, message in (
        (("--adapter", "lora"), "--hold_weights is for MoRA matrices, and --adapter is lora"),
        (("--compute", "activation"), "--hold_weights: layers that are computed over activations"),
        (("--tensor_parallel_size", 2), "--hold_weights: layers that are split by --tensor_parallel_size keep nothing"),
    ):
        assert message in refusal(user.flags(tmp_path / "no", "--hold_weights", *more))
