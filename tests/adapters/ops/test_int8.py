"""A frozen weight in 8 bits: its error, and that a layer on it computes what one on the
dense weight does.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mora_ds.adapters.config import LoRAConfig, MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.ops.frozen import dense
from mora_ds.adapters.ops.int8 import Int8Weight, quantize
from mora_ds.adapters.ops.mora import OperatorSpec, delta_weight
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from mora_ds.adapters.ops.updates import merged_weight
from mora_ds.adapters.quantized import quantized_bytes
from mora_ds.planning.memory_meter import MemoryMeter
from tests.helpers.errors import user_error
from tests.helpers.models import causal_loss, enable_checkpointing, tiny_model, tokens
from tests.helpers.operators import (
    assert_same_bits_for_every_number_of_threads,
    random,
)
from tests.helpers.pairwise import pairwise
from tests.helpers.quantized import (
    adapt,
    assert_casts_leave_scales,
    assert_computes_as_over_dense,
    assert_layer_that_is_not_finite_is_named,
    assert_not_finite_is_refused,
    base_of,
    every_spec,
    in_bits,
    model_in_few_bits,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def matrix(rows, columns, dtype=torch.float32):
    """Rows of very different sizes."""
    return (random(rows, columns) * torch.logspace(-6, 2, rows).unsqueeze(1)).to(dtype)


# -- numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_is_off_by_half_a_step_of_its_row_at_most(dtype):
    weight = matrix(400, 700, dtype)  # more than one block
    values, scales = quantize(weight)
    assert Int8Weight(values, scales).largest_error == pytest.approx(
        float(scales.max()) / 2
    )
    assert values.dtype is torch.int8
    assert scales.dtype is torch.float32
    assert values.is_contiguous()
    largest = weight.double().abs().amax(dim=1)
    assert_close(scales.double(), largest / 127, rtol=1e-6, atol=1e-12)
    assert (values.abs().amax(dim=1)[largest > 0] == 127).all()
    assert values.min() >= -127
    error = (dense(Int8Weight(values, scales), torch.float64) - weight.double()).abs()
    assert (error <= scales.double().unsqueeze(1) * (0.5 + 1e-4)).all()


def test_rows_of_zeros_and_subnormal_scales():
    weight = torch.zeros(3, 5)
    # 127 steps of it are below what fp32 knows
    weight[1] = torch.tensor([1e-44, -1e-44, 0, 0, 0])
    values, scales = quantize(weight)
    assert not dense(Int8Weight(values, scales), torch.float32).abs().gt(1e-44).any()
    assert_not_finite_is_refused(quantize, "not finite")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dense_is_the_product_rounded_once(dtype):
    values, scales = quantize(matrix(500, 1100))  # more than one block
    expected = (values.float() * scales.unsqueeze(1)).to(dtype)
    assert torch.equal(dense(Int8Weight(values, scales), dtype), expected)
    view = values.T.contiguous().T
    assert not view.is_contiguous()
    assert torch.equal(dense(Int8Weight(view, scales), dtype), expected)


def test_bits_do_not_depend_on_threads_or_layout():
    weight = matrix(300, 2000)
    first = quantize(weight)
    for part in (0, 1):
        assert_same_bits_for_every_number_of_threads(
            lambda part=part: quantize(weight)[part]
        )
        assert torch.equal(first[part], quantize(weight.T.contiguous().T)[part])


# -- layers ----------------------------------------------------------------------------


in_8_bits = partial(in_bits, bits=8)


@every_spec(3)
def test_a_layer_is_the_layer_over_the_dense_weight(spec, monkeypatch):
    assert_computes_as_over_dense(spec, 8, [], monkeypatch, rtol=1e-11, atol=1e-10)


class Casting(nn.Module):
    """Casts its input to the dtype of a weight, as Falcon Mamba's head does."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.proj(x.to(self.proj.weight.dtype))


def test_activations_are_not_cast_to_integers():
    for config in (
        MoRAConfig(rank=1, base_bits=8),
        LoRAConfig(rank=1, base_bits=8, dropout=0.5),
    ):
        model = Casting()
        inject(model, config)
        with user_error(r"--base_bits 8: this model casts activations .* torch.int8"):
            model(torch.randn(2, 8))


# -- memory ----------------------------------------------------------------------------


CONFIGS = {
    "weight path": MoRAConfig(rank=4, operator="share", compute="weight"),
    "activation path": MoRAConfig(rank=4, operator="rotate", compute="activation"),
    "dropout": MoRAConfig(rank=4, operator="share", dropout=0.1),
    "lora": LoRAConfig(rank=4),
}


@pairwise({"config": list(CONFIGS), "checkpointing": [False, True], "bits": [8, 4]})
def test_nothing_of_a_weights_size_is_kept(config, checkpointing, bits):
    """A forward saves as many bytes for backward as on a dense base; in 4 bits with merged
    cycles too.
    """
    if bits == 4:
        pytest.importorskip("bitsandbytes", reason="needs the extra bits4")
    live_bytes = {}
    for bits_of_base in (16, bits):
        model = tiny_model("llama")
        if checkpointing:
            enable_checkpointing(model)
        inject(model, replace(CONFIGS[config], base_bits=bits_of_base))
        merged = []
        if bits_of_base == 4:
            for layer in mora_layers(model).values():
                layer.set_merged(
                    [(layer.spec, 0.1 * random(*layer.spec.adapter_weight_shape))]
                )
                merged += [value for _, value in layer.merged]
        ids = tokens(2)
        model = model.train()
        causal_loss(model, ids)  # makes the tables
        with MemoryMeter(
            (*model.parameters(), *model.buffers(), *merged, ids)
        ) as meter:
            loss = causal_loss(model, ids)
            live_bytes[bits_of_base] = meter.live
            loss.backward()
            del loss
    assert live_bytes[bits] == live_bytes[16]


def test_only_adapted_weights_are_int8():
    model, small = model_in_few_bits(MoRAConfig(rank=4, base_bits=8))
    assert quantized_bytes(model) == small
    assert_casts_leave_scales(model)
    assert model.lm_head.weight.dtype is torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight


# -- merging ---------------------------------------------------------------------------


def test_many_merges_of_a_conv1d_are_one():
    """The original plus all deltas, rounded once. (Of linear layers:
    tests/train/test_quantized_run.py.)
    """
    spec = OperatorSpec(OperatorKind.SHARE, 40, 24, 10, Grouping.PERMUTED, seed=1)
    base = base_of(spec, True, torch.float32)
    original = base.weight.data.clone()
    layer = in_8_bits(adapt(base, spec))
    updates = [
        (replace(spec, seed=cycle), 0.003 * random(10, 10, seed=cycle).float())
        for cycle in range(3)
    ]
    for cycles in (1, 2, 3):
        layer.rebuild_weight(original, updates[:cycles])
    values, scales = quantize(merged_weight(original, updates, True, torch.float32).T)
    assert torch.equal(layer.stored_weight, values)
    assert torch.equal(layer.get_buffer("weight_scales"), scales)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_norms_of_a_merge(bits, conv):
    """Norms of the matrix, of its delta, of the weight before the merge, and of the
    rounding error in 8 bits or bf16."""
    spec = OperatorSpec(OperatorKind.SHARE, 40, 24, 10, Grouping.PERMUTED, seed=1)
    base = base_of(spec, conv, torch.bfloat16)
    original = base.weight.data.clone()
    value = 0.05 * random(10, 10).float()
    layer = adapt(base, spec)
    if bits == 8:
        in_8_bits(layer)
    before = layer.read().double().clone()
    norms = layer.merge(original, [(spec, value)], value)
    delta = delta_weight(spec, value).double()
    lost = layer.read().double() - before - (delta.T if conv else delta)
    for norm, tensor in zip(norms, (value, delta, before, lost), strict=True):
        assert norm.item() == pytest.approx(tensor.norm().item(), rel=1e-4)
    assert norms.lost > 0
    assert abs(norms.weight - layer.read().double().norm()) > 1e-3 * norms.weight


# -- bad input -------------------------------------------------------------------------


def test_unsupported_numbers_of_bits_are_refused():
    for bits in (5, 0, 32):
        with user_error(f"`base_bits` must be 8 or 4, or 16 .* got {bits}"):
            MoRAConfig(base_bits=bits)


def test_weights_that_are_not_finite():
    assert_layer_that_is_not_finite_is_named(8)
