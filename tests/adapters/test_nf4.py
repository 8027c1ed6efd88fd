"""A frozen weight in 4 bits: its error, the terms of merged cycles, and that a layer on it
computes what one on the dense weight does."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from mora_ds.adapters import nf4
from mora_ds.adapters.config import LoRAConfig, MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.nf4 import BLOCK, NF4Weight, quantize
from mora_ds.adapters.ops import index_tables
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from mora_ds.adapters.ops.updates import join, merged_weight
from mora_ds.adapters.quantized import base_bits_of, merge_bytes, quantized_bytes
from tests.helpers.errors import user_error
from tests.helpers.models import tiny_model, tokens
from tests.helpers.operators import (
    assert_same_bits_for_every_number_of_threads,
    random,
    specs_of_tables,
)
from tests.helpers.quantized import (
    LORA,
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

pytest.importorskip("bitsandbytes", reason="needs the extra bits4")

SHARE = OperatorSpec(OperatorKind.SHARE, 40, 24, 10, Grouping.PERMUTED, seed=1)


def held(weight):
    return NF4Weight(*quantize(weight), weight.shape)


def next_cycle(spec, cycle):
    """The spec of a later cycle: other permutations, or the same (LoRA, plain)."""
    permuted = isinstance(spec, OperatorSpec) and spec.grouping is Grouping.PERMUTED
    return replace(spec, seed=100 + cycle) if permuted else spec


def some_terms(spec, cycles=3):
    return [
        (next_cycle(spec, cycle), 0.1 * random(*spec.adapter_weight_shape, seed=cycle))
        for cycle in range(cycles)
    ]


# -- numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(40, 64), (9, 33), (5, 7), (1, 1), (1, 2), (130, 70)]
)
def test_a_number_is_off_by_half_a_gap_of_its_block_at_most(shape):
    weight = random(*shape).float()
    quantized = held(weight)
    assert quantized.values.dtype is torch.uint8
    assert quantized.values.numel() == -(-weight.numel() // 2)
    assert quantized.scales.dtype is torch.float32
    assert quantized.scales.numel() == -(-weight.numel() // BLOCK)
    for planned, part in zip(
        quantize(weight.to("meta")), quantize(weight), strict=True
    ):
        assert (planned.shape, planned.dtype) == (part.shape, part.dtype)
    error = (quantized.dense(torch.float32) - weight).abs()
    blocks = (
        nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK))
        .view(-1, BLOCK)
        .abs()
        .amax(dim=1)
    )
    bound = blocks.repeat_interleave(BLOCK)[: weight.numel()].view(shape)
    assert (error <= bound * 0.1525).all()
    assert error.max() <= quantized.largest_error * 1.01
    assert quantized.largest_error == pytest.approx(0.152 * blocks.max().item())
    assert (error == 0).sum() >= len(blocks)  # the largest number of a block is exact


def test_dense_is_rounded_once_and_bits_do_not_depend_on_threads_layout_or_the_files_dtype():
    weight = random(300, 500).to(torch.bfloat16)
    quantized = held(weight)
    with_terms = replace(held(weight[:24, :40]), terms=tuple(some_terms(SHARE)))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for one in (quantized, with_terms):
            assert torch.equal(one.dense(dtype), one.dense(torch.float32).to(dtype))
    for variant in (weight.float(), weight.T.contiguous().T, weight.double()):
        assert all(map(torch.equal, quantize(variant), quantize(weight)))
    for part in (0, 1):
        assert_same_bits_for_every_number_of_threads(
            lambda part=part: quantize(weight)[part]
        )
    assert_same_bits_for_every_number_of_threads(
        lambda: quantized.dense(torch.bfloat16)
    )


def test_numbers_that_cannot_be_held():
    assert_not_finite_is_refused(quantize, "not finite cannot be held in 4 bits")
    assert not held(torch.zeros(3, 5)).dense(torch.float32).any()


# -- terms -----------------------------------------------------------------------------


def test_updates_of_equal_operators_are_one_term():
    plain = replace(SHARE, grouping=Grouping.STRIDED, seed=0)
    turn = [plain, replace(plain, grouping=Grouping.CONTIGUOUS)]
    # As --grouping alternate
    updates = [
        (turn[cycle % 2], random(10, 10, seed=cycle).float()) for cycle in range(5)
    ]
    terms = join(updates)
    assert [spec for spec, _ in terms] == turn
    assert torch.equal(terms[0][1], updates[0][1] + updates[2][1] + updates[4][1])
    assert len(join(some_terms(SHARE, 5))) == 5
    assert len(join(some_terms(LORA[0], 5))) == 1, "factors are lined up"
    ((_, value),) = join([(plain, random(10, 10).bfloat16())])
    assert value.dtype is torch.float32
    assert join([]) == ()


# -- layers ----------------------------------------------------------------------------


in_4_bits = partial(in_bits, bits=4)


@every_spec(5)
def test_a_layer_is_the_layer_over_the_dense_sum(spec, monkeypatch):
    """Its merged cycles act as if they were in the weight."""
    assert_computes_as_over_dense(
        spec, 4, some_terms(spec), monkeypatch, rtol=1e-5, atol=2e-5
    )


# -- merging ---------------------------------------------------------------------------


def test_merges_and_a_replay_never_round_a_conv1d_again():
    """In fp32 to the bit the rounded original plus all deltas. (Linear layers:
    tests/train/test_quantized_run.py.)
    """
    original = base_of(SHARE, True, torch.float32).weight.data
    updates = [(spec, value.float()) for spec, value in some_terms(SHARE)]
    merged, replayed = (
        in_4_bits(adapt(base_of(SHARE, True, torch.float32), SHARE)) for _ in range(2)
    )
    right = merged_weight(merged.read(), updates, True, torch.float32)
    for cycle, (_, value) in enumerate(updates, start=1):
        merged.merge(original, updates[:cycle], value)
    replayed.rebuild_weight(original, updates)
    assert torch.equal(merged.read(), right)
    assert torch.equal(replayed.read(), right)


@pytest.mark.parametrize(
    "config",
    [MoRAConfig(rank=4, operator="share", compute="activation"), LoRAConfig(rank=4)],
)
def test_a_merge_in_bf16_leaves_the_live_function_as_it_was(config):
    """The matrix goes on acting in the same dtype: nothing is rounded to the weight's
    grid.
    """
    model = tiny_model("llama", dtype=torch.bfloat16).eval()
    inject(model, replace(config, base_bits=4))
    for index, layer in enumerate(mora_layers(model).values()):
        layer.adapter_weight.data += (
            0.02 * random(*layer.adapter_weight.shape, seed=index)
        ).to(torch.bfloat16)
    ids = tokens(2)
    before = model(input_ids=ids).logits.float()
    for layer in mora_layers(model).values():
        value = layer.adapter_weight.data.float()
        layer.merge(torch.empty(0), [(layer.spec, value)], value)
        layer.adapter_weight.data.zero_()
    after = model(input_ids=ids).logits.float()
    assert (after - before).norm() < 0.01 * before.norm()


def test_a_layer_keeps_the_tables_of_its_merged_cycles(monkeypatch):
    """Merged cycles keep their tables as the current cycle does, however many other
    operators a model has."""
    specs = specs_of_tables(monkeypatch)
    layer = in_4_bits(adapt(base_of(SHARE, False, torch.float32), SHARE))
    layer.set_merged(some_terms(SHARE))
    for _ in range(2):
        layer(random(2, 40).float()).sum().backward()
        index_tables.tables_of.cache_clear()  # as 64 other operators do
    assert sorted(spec.seed for spec in specs) == [1, 100, 101, 102]


# -- models ----------------------------------------------------------------------------


def test_only_adapted_weights_are_packed_and_casts_leave_them():
    model, small = model_in_few_bits(MoRAConfig(rank=4, base_bits=4))
    layers = mora_layers(model)
    numels = sum(layer.in_features * layer.out_features for layer in layers.values())
    assert quantized_bytes(model) == small == pytest.approx(numels * 4.5 / 8, rel=0.02)
    assert base_bits_of(model) == 4
    plain, _ = model_in_few_bits(MoRAConfig(rank=4, base_bits=4, grouping="plain"))
    mora_matrices = sum(layer.adapter_weight.numel() for layer in layers.values())
    assert merge_bytes(plain) == 4 * mora_matrices, (
        "all layers of one shape have the same tables"
    )
    for layer in layers.values():
        layer.set_merged(some_terms(layer.spec))
    assert_casts_leave_scales(model)
    assert {value.dtype for layer in layers.values() for _, value in layer.merged} == {
        torch.bfloat16
    }


# -- bad input -------------------------------------------------------------------------


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(nf4, "find_spec", lambda name: None)
    with user_error(
        r"`base_bits` 4 needs the package bitsandbytes: .*mora_ds\[bits4\]"
    ):
        nf4.check_installed()


def test_no_kernel_is_fetched_while_the_package_is_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    for before in (None, sys):
        if before is not None:
            monkeypatch.setitem(sys.modules, "kernels", before)
        with nf4._quiet_and_offline(), pytest.raises(ImportError):
            import kernels  # noqa: F401
        assert sys.modules.get("kernels") is before


def test_weights_that_are_not_finite():
    assert_layer_that_is_not_finite_is_named(4)
