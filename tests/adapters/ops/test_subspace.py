"""The subspace operator: the contract of every operator, its layer and its settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.layer import SubspaceLinear
from mora_ds.adapters.ops.subspace import SubspaceSpec, subspace_update
from mora_ds.adapters.ops.update import spec_from_dict
from mora_ds.common.errors import UserError
from mora_ds.config.arguments import parse
from mora_ds.planning.step import Work, measure_step, planned_model
from mora_ds.train.dry_run import planned
from tests.helpers.jobs import Playground
from tests.helpers.models import tiny_model
from tests.helpers.operators import assert_same_bits_for_every_number_of_threads, random, saved_bytes
from tests.helpers.singular_vectors import MODULE, register_vectors

SHAPES = [(16, 16, 4), (12, 20, 5), (20, 12, 12), (13, 7, 7), (1, 9, 1), (9, 1, 1), (6, 6, 6)]
"""(d_in, d_out, r_hat)"""


@pytest.fixture(params=SHAPES, ids=str)
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> SubspaceSpec:
    d_in, d_out, r_hat = request.param
    name = register_vectors(random(d_out, d_in, seed=7), min(d_in, d_out), tmp_path)
    return SubspaceSpec(d_in, d_out, r_hat, MODULE, name)


# -- the contract ------------------------------------------------------------------------------------------------------


def test_delta_weight_is_the_update(spec: SubspaceSpec) -> None:
    square = random(spec.r_hat, spec.r_hat)
    x = random(2, 3, spec.d_in, seed=1)
    delta = spec.delta_weight(square)
    assert delta.shape == (spec.d_out, spec.d_in)
    a, b = spec.low_rank(square)
    assert_close(b @ a, delta, rtol=1e-12, atol=1e-12)
    vectors = spec.sides(x.device, x.dtype)
    assert_close(subspace_update(square, vectors, x), x @ delta.T, rtol=1e-12, atol=1e-12)


def test_adjoint_and_the_gradient_of_the_square(spec: SubspaceSpec) -> None:
    square = random(spec.r_hat, spec.r_hat).requires_grad_()
    gradient = random(spec.d_out, spec.d_in, seed=1)
    left = (spec.delta_weight(square) * gradient).sum()
    right = (square * spec.adjoint(gradient)).sum()
    assert_close(left, right, rtol=1e-12, atol=1e-12)
    x = random(3, spec.d_in, seed=1)
    g = random(3, spec.d_out, seed=2)
    update = subspace_update(square, spec.sides(x.device, x.dtype), x)
    (square_gradient,) = torch.autograd.grad(update, square, g)
    assert_close(square_gradient, spec.adjoint(g.T @ x), rtol=1e-12, atol=1e-12)


def test_gradcheck(tmp_path: Path) -> None:
    spec = SubspaceSpec(7, 5, 3, MODULE, register_vectors(random(5, 7), 3, tmp_path))
    vectors = spec.sides(torch.device("cpu"), torch.float64)
    inputs = random(3, 3).requires_grad_(), random(2, 7, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda square, x: subspace_update(square, vectors, x), inputs)


@pytest.mark.parametrize("kind", ["linear", "linear with bias", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_is_base_plus_delta(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base: Any = Conv1D(10, 14) if kind == "conv1d" else nn.Linear(14, 10, bias=kind == "linear with bias")
    weight = base.weight.T if kind == "conv1d" else base.weight
    base = base.to(dtype)
    spec = SubspaceSpec(14, 10, 6, MODULE, register_vectors(weight.detach(), 10, tmp_path))
    layer = SubspaceLinear(base, spec)
    x = torch.randn(3, 5, 14).to(dtype).requires_grad_()
    assert torch.equal(layer(x), base(x)), "a zero square changes nothing"
    layer.square.data.normal_()
    expected = base(x) + x @ spec.delta_weight(layer.square.data.float()).to(dtype).T
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.1}
    assert_close(layer(x), expected, **tolerance)
    layer(x).float().square().sum().backward()
    assert layer.square.grad is not None and layer.square.grad.any()
    assert [name for name, _ in layer.named_parameters()] == ["square"] == list(layer.state_dict())


def test_it_saves_tokens_by_r_hat(tmp_path: Path) -> None:
    tokens_seen = 40
    d = 64
    r_hat = 8
    spec = SubspaceSpec(d, d, r_hat, MODULE, register_vectors(random(d, d), r_hat, tmp_path))
    layer = SubspaceLinear(nn.Linear(d, d), spec)
    x = torch.randn(tokens_seen, d, requires_grad=True)
    assert saved_bytes(lambda: layer(x), layer.weight, layer.square, *layer._sides(x)) == tokens_seen * r_hat * 4


def test_delta_has_the_same_bits_for_every_number_of_threads(tmp_path: Path) -> None:
    spec = SubspaceSpec(300, 200, 40, MODULE, register_vectors(random(200, 300), 40, tmp_path))
    assert_same_bits_for_every_number_of_threads(lambda: spec.delta_weight(random(40, 40).float()))


def test_specs_survive_json_and_refuse_what_is_none() -> None:
    spec = SubspaceSpec(8, 6, 4, "a.b", "0123456789abcdef")
    assert spec_from_dict(spec.to_dict()) == spec and spec.describe() == "subspace"
    for changes in ({"r_hat": 7}, {"r_hat": 0}):
        with pytest.raises(UserError):
            replace(spec, **changes)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_every_cycle_takes_the_leading_vectors() -> None:
    config = MoRAConfig(rank=1, operator="subspace", vectors="v")
    assert {config.operator_for("m", 8, 8, cycle) for cycle in range(4)} == {SubspaceSpec(8, 8, 4, "m", "v")}
    assert MoRAConfig.from_dict(config.to_dict()) == config


def test_a_square_is_no_larger_than_the_shorter_side() -> None:
    model = tiny_model("llama")
    report = inject(model, MoRAConfig(rank=20, operator="subspace"))
    assert {row.name: (row.size, row.note) for row in report.rows}["k_proj"] == (
        16, "(rank 20 asks for 30: the shorter side is enough)",
    )  # fmt: skip
    assert report.operator == "subspace"
    assert all(isinstance(layer, SubspaceLinear) for layer in mora_layers(model).values())


def test_a_dry_run_plans_it_without_vectors(user: Playground) -> None:
    _, told = planned(parse(user.flags("out", "--operator", "subspace")), world=2)
    assert any("operator subspace" in text for text in told)
    adapter = MoRAConfig(rank=2, operator="subspace")
    work = Work(AutoConfig.from_pretrained(user.model), adapter, seq_len=32, dtype=torch.float32)
    layers = mora_layers(model := planned_model(work)).values()
    vector_bytes = sum((layer.in_features + layer.out_features) * layer.value.shape[0] * 4 for layer in layers)
    assert vector_bytes <= measure_step(model, work).tables < 1.1 * vector_bytes, "the vectors are counted"
