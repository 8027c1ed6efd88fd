"""Layers over a base of few bits: what the tests of 8 and of 4 bits share."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import (
    count_parameters,
    frozen_buffers,
    inject,
    mora_layers,
    move_base,
)
from mora_ds.adapters.layer import LoRALinear, MoRALinear
from mora_ds.adapters.ops import mora
from mora_ds.adapters.ops.linear import Compute
from mora_ds.adapters.ops.lora import LoRASpec
from tests.helpers.errors import run_error, user_error
from tests.helpers.models import tiny_model
from tests.helpers.operators import random, spec_id, specs

LORA = [LoRASpec(12, 9, 3, 6.0), LoRASpec(7, 20, 2, 4.0)]


def every_spec(step):
    """Parametrize a test with every `step`-th MoRA operator, and LoRA's."""
    chosen = [*list(specs())[::step], *LORA]
    ids = [spec_id(spec) if hasattr(spec, "kind") else "lora" for spec in chosen]
    return pytest.mark.parametrize("spec", chosen, ids=ids)


def base_of(spec, conv, dtype=torch.float64):
    """A linear layer of the sides of `spec`, stored transposed with `conv`."""
    base = Conv1D(spec.d_out, spec.d_in) if conv else nn.Linear(spec.d_in, spec.d_out)
    weight = random(spec.d_out, spec.d_in, seed=2)
    base.weight.data = (weight.T.contiguous() if conv else weight).to(dtype)
    base.bias.data = random(spec.d_out, seed=3).to(dtype)
    return base


def adapt(base, spec, path=Compute.AUTO):
    """The layer that replaces `base`."""
    return (
        LoRALinear(base, spec, seed=1)
        if isinstance(spec, LoRASpec)
        else MoRALinear(base, spec, compute=path)
    )


def in_bits(layer, bits):
    """The layer with its frozen weight in `bits` bits."""
    layer.quantize(layer.weight, bits)
    return layer


def found_by(layer, spec):
    """y, dL/dx, dL/dM."""
    dtype = layer.adapter_weight.dtype
    x = random(2, 3, spec.d_in).to(dtype).requires_grad_()
    g = random(2, 3, spec.d_out, seed=4).to(dtype)
    y = layer(x)
    return (y, *torch.autograd.grad(y, (x, layer.adapter_weight), g))


def assert_computes_as_over_dense(spec, bits, merged, monkeypatch, rtol, atol):
    """A layer over a quantized weight and the merged cycles `merged` computes what a layer
    over the dense weight plus all their deltas computes: by both paths, as on a CPU and on
    a GPU, in a linear layer and in a Conv1D."""
    for sums, path, conv in product(
        (True, False), (Compute.ACTIVATION, Compute.WEIGHT), (False, True)
    ):
        monkeypatch.setattr(mora, "on_cpu", lambda x, sums=sums: sums)
        layer = in_bits(adapt(base_of(spec, conv), spec, path), bits)
        base = base_of(spec, conv)
        base.weight.data = layer.read().double()
        for update, value in merged:
            delta = update.delta_weight(value)
            base.weight.data += delta.T if conv else delta
        if merged:
            layer.set_merged(merged)
        over_dense = adapt(base, spec, path)
        value = random(*layer.adapter_weight.shape, seed=1)
        layer.adapter_weight.data = value
        over_dense.adapter_weight.data = value.clone()
        assert layer.weight.dtype is (torch.int8 if bits == 8 else torch.uint8)
        assert layer.shape == tuple(base.weight.shape)
        for one, right in zip(
            found_by(layer, spec), found_by(over_dense, spec), strict=True
        ):
            assert_close(one, right, rtol=rtol, atol=atol)


def model_in_few_bits(config):
    """A tiny model with tied embeddings and biases, of which the adapted weights alone are
    in few bits and every parameter still counts once; and the bytes of these weights with
    their scales."""
    model = tiny_model("qwen2")
    before = count_parameters(model)
    report = inject(model, config)
    layers = mora_layers(model)
    assert (
        report.total_params == before + report.adapter_params == count_parameters(model)
    )
    few_bits = torch.int8 if config.base_bits == 8 else torch.uint8
    for name, tensor in frozen_buffers(model).items():
        is_adapted = name.removesuffix(".weight") in layers
        assert tensor.dtype is (few_bits if is_adapted else torch.float32), name
    return model, sum(
        layer.weight.nbytes + layer.get_buffer("weight_scales").nbytes
        for layer in layers.values()
    )


def assert_casts_leave_scales(model):
    """Neither our cast of the base to 16 bits nor one of torch changes the scales of the
    adapted weights."""
    layers = mora_layers(model)
    scales = {
        name: layer.get_buffer("weight_scales").clone()
        for name, layer in layers.items()
    }
    move_base(model, "cpu", torch.bfloat16)
    model.to(torch.bfloat16)
    for name, layer in layers.items():
        assert torch.equal(layer.get_buffer("weight_scales"), scales[name]), name


def assert_not_finite_is_refused(quantize, words):
    for bad in (float("nan"), float("inf"), -float("inf")):
        with run_error(words):
            quantize(torch.tensor([[1.0, bad], [1.0, 2.0]]))


def assert_layer_that_is_not_finite_is_named(bits):
    """The error names the layer as the model does."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.full((4, 4), float("nan")))
    with user_error(rf"`base_bits` {bits}: 1.weight: .* not finite"):
        inject(model, MoRAConfig(rank=1, base_bits=bits))
