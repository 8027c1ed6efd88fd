"""Experts of a mixture as targets: which tensors they are, what they compute, how they are
named and read.
"""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.experts import MoRAExperts, find_stacks
from mora_ds.adapters.inject import base_weights, inject, mora_layers, set_cycle
from mora_ds.adapters.ops import grouped, index_tables
from mora_ds.adapters.ops.frozen import dense
from mora_ds.adapters.ops.grouped import grouped_linear
from mora_ds.adapters.ops.int8 import Int8Weight, quantize
from mora_ds.adapters.ops.mora import adjoint
from mora_ds.adapters.ops.updates import merged_weight
from mora_ds.adapters.registry import spec_from_dict
from mora_ds.adapters.target_modules import match_targets
from mora_ds.common.errors import UserError
from mora_ds.models.base import BaseCheckpoint, map_model
from mora_ds.models.load import load_base
from mora_ds.remora.ledger import LayerEntry, agree_on_layers
from mora_ds.research.spectrum import histories
from tests.helpers.errors import user_error
from tests.helpers.models import (
    MIXTURES,
    adapted_model,
    alone,
    causal_loss,
    tiny_model,
    tokens,
)
from tests.helpers.operators import specs_of_tables
from tests.helpers.tables import each_row, parsed

EVERYWHERE = ("all-linear", "experts")
OPERATORS = dict(
    zip(MIXTURES, ("share", "rotate", "decouple", "truncate"), strict=True)
)
STACKS = {"gate_up_proj": (4, 112, 32), "down_proj": (4, 32, 56)}


def adapted(family="mixtral", **settings):
    """A model whose matrices are not zero, in all layers unless `settings` say
    otherwise."""
    everywhere = {"operator": OPERATORS[family], "target_modules": EVERYWHERE}
    return adapted_model(family, **{**everywhere, **settings})


def live_of(model, family):
    """A plain model with the updates of an adapted one in its weights, computed by
    transformers.
    """
    live = tiny_model(family)
    live.set_experts_implementation("eager")
    parameters = dict(live.named_parameters())
    for name, layer in mora_layers(model).items():
        delta = layer.spec.delta_weight(layer.mora_matrix.data)
        parameters[layer.spec.weight_name(name)].data += (
            delta.mT if layer.transposed else delta
        )
    return live


def stacks_in(model):
    return {
        name: layer
        for name, layer in mora_layers(model).items()
        if isinstance(layer, MoRAExperts)
    }


# -- what they compute -----------------------------------------------------------------


@pytest.mark.parametrize("family", MIXTURES)
def test_outputs_and_gradients_are_those_of_the_weights_that_the_matrices_stand_for(
    family,
):
    """Each class of transformers computes, by its own code, what its marks say. This is
    also a contract test."""
    model = adapted(family)
    ids = tokens(2)
    live = live_of(model, family)
    loss = causal_loss(model, ids)
    expected = causal_loss(live, ids)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert stacks_in(model)
    parameters = dict(live.named_parameters())
    for name, layer in mora_layers(model).items():
        gradient = parameters[layer.spec.weight_name(name)].grad
        gradient = gradient.mT if layer.transposed else gradient
        if isinstance(layer, MoRAExperts):
            wanted = torch.stack(
                [adjoint(layer.spec.operator, matrix) for matrix in gradient]
            )
        else:
            wanted = adjoint(layer.spec, gradient)
        assert_close(
            layer.mora_matrix.grad,
            wanted,
            rtol=1e-4,
            atol=1e-5 * float(wanted.abs().max()),
        )


def test_one_projection_alone_dropout_checkpointing_and_evaluation():
    ids = tokens(2)
    for family, pattern in product(
        ("mixtral", "gpt_oss"), ("experts.down_proj", "experts.gate_up_proj")
    ):
        model = adapted(family, target_modules=(pattern,))
        assert len(mora_layers(model)) == 2
        with torch.no_grad():
            expected = live_of(model, family)(input_ids=ids).logits
            assert_close(model(input_ids=ids).logits, expected)
    dropping = adapted(dropout=0.5)
    dropping.train()
    assert causal_loss(dropping, ids).item() != causal_loss(dropping.eval(), ids).item()
    plain = adapted()
    checkpointed = adapted(checkpointing=True)
    for variant in (plain, checkpointed):
        causal_loss(variant.train(), ids).backward()
    for one, another in zip(
        mora_layers(plain).values(), mora_layers(checkpointed).values(), strict=True
    ):
        assert torch.equal(one.mora_matrix.grad, another.mora_matrix.grad)


def test_bf16_and_8_bits_compute_what_their_weights_say():
    half = adapted(model={"dtype": torch.bfloat16})
    assert torch.isfinite(causal_loss(half, tokens(2)))
    assert half.dtype == torch.bfloat16
    for family in ("mixtral", "gpt_oss"):  # weights (out, in), and (in, out)
        model = adapted(family, base_bits=8)
        live = live_of(model, family)
        ids = tokens(2)
        for name, layer in mora_layers(model).items():
            weight = live.get_parameter(layer.spec.weight_name(name))
            assert layer.weight.dtype is torch.int8
            assert layer.weight.shape == weight.shape
            delta = layer.spec.delta_weight(layer.mora_matrix.data)
            weight.data = layer.read() + (delta.mT if layer.transposed else delta)
        loss = causal_loss(model, ids)
        loss.backward()
        assert loss.item() == pytest.approx(causal_loss(live, ids).item(), rel=1e-5)
        assert all(
            layer.mora_matrix.grad.abs().sum() > 0
            for layer in mora_layers(model).values()
        )


def one_by_one(x, weights, ends):
    segments = x.tensor_split(ends[:-1].tolist())
    return torch.cat(
        [segment @ weight.T for segment, weight in zip(segments, weights, strict=True)]
    )


with_kernel = pytest.param(
    True,
    marks=pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="needs torch 2.10"),
)


@pytest.mark.parametrize("kernel", [False, with_kernel])
@pytest.mark.parametrize("bits", [8, 16])
def test_grouped_products_and_their_gradients(monkeypatch, kernel, bits):
    """The way of a GPU too, whose product torch has for CPUs as well. One matrix has no
    rows.
    """
    monkeypatch.setattr(grouped, "has_kernel", lambda x, width: kernel)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 16, generator=generator)
    weights = torch.randn(4, 8, 16, generator=generator)
    ends = torch.tensor([5, 5, 18, 20], dtype=torch.int32)
    stack = weights if bits == 16 else Int8Weight(*quantize(weights))
    formed = dense(stack, torch.float32)
    inputs = x.clone().requires_grad_()
    wanted = x.clone().requires_grad_()
    trained = formed.clone().requires_grad_()
    reference = formed.clone().requires_grad_()
    g = torch.randn(20, 8, generator=generator)
    output = grouped_linear(inputs, trained if bits == 16 else stack, ends)
    output.backward(g)
    expected = one_by_one(wanted, reference, ends)
    expected.backward(g)
    assert_close(output, expected)
    assert_close(inputs.grad, wanted.grad)
    if bits == 16:
        assert_close(trained.grad, reference.grad)


GROUPED = """
8 | 16 | 8  | bfloat16 | cuda | true
8 | 12 | 8  | bfloat16 | cuda | false
8 | 16 | 12 | bfloat16 | cuda | false
8 | 16 | 8  | float16  | cuda | false
8 | 16 | 8  | bfloat16 | cpu  | false
7 | 16 | 8  | bfloat16 | cuda | false
"""
"""Compute capability | inputs | outputs | dtype | device | whether there is a kernel: in
bf16 from Ampere on, of rows whose bytes are a multiple of 16."""


@each_row("capability, inputs, width, dtype, device, has_kernel", GROUPED)
def test_which_grouped_products_a_gpu_has_a_kernel_for(
    monkeypatch, capability, inputs, width, dtype, device, has_kernel
):
    monkeypatch.setattr(F, "grouped_mm", None, raising=False)
    known = (int(capability), 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: known)
    shape = (4, int(inputs))
    of_x = {"dtype": getattr(torch, dtype), "device": torch.device(device)}
    x = SimpleNamespace(shape=shape, **of_x)
    assert grouped.has_kernel(x, int(width)) == parsed(has_kernel)


def test_a_frozen_stack_saves_no_rows_for_backward():
    saved = []
    x = torch.randn(6, 4, requires_grad=True)
    ends = torch.tensor([2, 6], dtype=torch.int32)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(tuple(t.shape)) or t, lambda t: t
    ):
        grouped_linear(x, torch.randn(2, 3, 4), ends)
    assert (6, 4) not in saved
    assert (2, 3, 4) in saved


def test_experts_keep_the_tables_of_their_operator(monkeypatch):
    specs = specs_of_tables(monkeypatch)
    model = adapted()
    for _ in range(2):
        causal_loss(model, tokens(2)).backward()
        index_tables.tables_of.cache_clear()  # as 64 other operators do
    assert len(specs) == len(mora_layers(model))


# -- operators and sizes ---------------------------------------------------------------


def test_a_stack_is_its_members():
    model = adapted()
    layer = next(iter(stacks_in(model).values()))
    spec = layer.spec
    value = layer.mora_matrix.data
    assert spec_from_dict(spec.to_dict()) == spec
    assert hash(spec) == hash(replace(spec))
    assert tuple(value.shape) == spec.adapter_weight_shape == (4, spec.size, spec.size)
    for index, (name, member_spec, mora_matrix) in enumerate(spec.members("a", value)):
        assert name == f"a.{index}"
        assert torch.equal(
            spec.delta_weight(value)[index], member_spec.delta_weight(mora_matrix)
        )
    original = torch.randn(4, spec.d_out, spec.d_in)
    full = merged_weight(
        original, [(spec, value), (spec, value)], False, torch.bfloat16
    )
    turned = merged_weight(
        original.mT.contiguous(), [(spec, value), (spec, value)], True, torch.bfloat16
    )
    matrices = [
        merged_weight(
            original[e], [(spec.operator, value[e])] * 2, False, torch.bfloat16
        )
        for e in range(4)
    ]
    assert torch.equal(full, torch.stack(matrices))
    assert torch.equal(full, turned.mT)
    both = list(histories("a", [(spec, value), (spec, value)]))
    assert [name for name, _ in both] == [f"a.{index}" for index in range(4)]
    assert len(both[0][1]) == 2
    for damaged in ({"count": 0}, {"count": 2**40}, {"operator": {}}, {"more": 1}):
        with pytest.raises(UserError):
            spec_from_dict({**spec.to_dict(), **damaged})
    known = {"a": LayerEntry("a", False, spec)}
    fewer = LayerEntry("a", False, spec_from_dict({**spec.to_dict(), "count": 3}))
    with user_error("a is another layer than in earlier cycles"):
        agree_on_layers(known, {"a": fewer}, "a file")
    with user_error("no operator of a stack"):
        merged_weight(original, [(spec.operator, value[0])], False, torch.float32)


def test_the_rank_of_an_expert_and_fresh_permutations():
    def sides(**settings):
        model = adapted("qwen3_moe", **{"rank": 16, "r_hat_multiple": 1, **settings})
        return {
            name.rpartition(".")[2]: layer.spec
            for name, layer in stacks_in(model).items()
        }

    by_rule = sides()
    # 16, and two experts a token
    linear = MoRAConfig(rank=8, operator="rotate", r_hat_multiple=1)
    assert by_rule["down_proj"].size == linear.mora_matrix_size(24, 32)
    assert by_rule["gate_up_proj"].size == linear.mora_matrix_size(32, 48)
    assert sides(rank=1)["down_proj"].size == replace(linear, rank=1).mora_matrix_size(
        24, 32
    ), "not rank 1 // 2"
    by_rank = sides(operator="auto", rank=64)["down_proj"].operator
    assert by_rank.kind.value == "share", "as the linear layers of rank 64"
    config = MoRAConfig(rank=16, target_modules=("experts",))
    model = tiny_model("mixtral")
    inject(model, config)
    seeds = {layer.spec.operator.seed for layer in stacks_in(model).values()}
    set_cycle(model, config, 1)
    assert (
        len(seeds | {layer.spec.operator.seed for layer in stacks_in(model).values()})
        == 8
    )


def test_the_report_and_the_names_of_frozen_weights():
    model = tiny_model("mixtral")
    parameters = dict(model.named_parameters())
    report = inject(model, MoRAConfig(rank=4, target_modules=EVERYWHERE))
    rows = {row.name: row for row in report.rows}
    assert rows["down_proj"].count == 2
    assert rows["down_proj"].params == 2 * 4 * rows["down_proj"].size ** 2
    frozen = base_weights(model)
    assert frozen.keys() == parameters.keys()
    assert all(
        frozen[name].data_ptr() == parameters[name].data_ptr() for name in frozen
    ), "not copied"


# -- which tensors are targets ---------------------------------------------------------


def names(pattern, family="mixtral"):
    return {
        name.removeprefix("model.layers.")
        for name in match_targets(tiny_model(family), (pattern,))
    }


def test_only_patterns_with_the_word_reach_experts():
    both = {f"{layer}.mlp.experts.{name}" for layer in (0, 1) for name in STACKS}
    assert (
        names("experts")
        == names("re:.*\\.experts\\..*")
        == names("*.experts.*")
        == both
    )
    assert names("experts.down_proj") == {
        name for name in both if name.endswith("down_proj")
    }
    assert names("model.layers.1.mlp.experts") == {
        name for name in both if name.startswith("1.")
    }
    assert not any("experts" in name for name in names("all-linear") | names("re:.*"))
    assert names("down_proj", "deepseek_v3") == {
        "0.mlp.down_proj",
        "1.mlp.shared_experts.down_proj",
    }
    assert names("re:.*shared_experts.*", "deepseek_v3") == {
        f"1.mlp.shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    }
    for pattern in ("experts.gate_proj", "down_proj"):
        with user_error(r"matches no linear layer; there are: .*experts\.down_proj"):
            names(pattern)
    with user_error("'experts' matches no linear layer"):
        names("experts", "llama")


def test_an_unknown_layout_is_refused_by_name_and_stays_frozen_when_left_out():
    def odd(**changes):
        model = tiny_model("mixtral")
        for name, value in changes.items():
            setattr(model.model.layers[1].mlp.experts, name, value)
        return model

    unmarked = odd()
    del unmarked.model.layers[1].mlp.experts.is_transposed
    another_name = odd(proj=nn.Parameter(torch.zeros(4, 2, 2)))
    for model in (unmarked, another_name, odd(_is_expert_parallel=True)):
        with user_error(r"model\.layers\.1\.mlp\.experts\..*layout.*Leave them out"):
            inject(model, MoRAConfig(rank=4, target_modules=("experts",)))
        inject(model, MoRAConfig(rank=4))
        assert "down_proj" in dict(model.model.layers[1].mlp.experts.named_buffers())
    silent = tiny_model("mixtral")
    for layer in silent.model.layers:
        layer.mlp.experts.config = SimpleNamespace(hidden_size=32)
    with user_error("does not tell how many experts"):
        inject(silent, MoRAConfig(rank=4, target_modules=("experts",)))


def test_how_many_experts_a_token_has():
    """HunYuan's config has a number for each layer."""
    for value, count in ((3, 3), ([2, 2], 2), ([2, 3], 0), ([], 0), (None, 0)):
        model = tiny_model("mixtral")
        for layer in model.model.layers:
            layer.mlp.experts.config = SimpleNamespace(hidden_size=32, moe_topk=value)
        assert {stack.experts_per_token for stack in find_stacks(model).values()} == {
            count
        }


def test_experts_have_no_domains():
    config = MoRAConfig(rank=4, domains=("a", "b"), target_modules=("experts",))
    with user_error("research.domain_adapters"):
        inject(tiny_model("mixtral"), config)


# -- files -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", MIXTURES)
def test_stacks_are_read_from_the_files_of_their_experts(
    tmp_path, model_folder, family
):
    tiny_model(family).save_pretrained(model_folder, max_shard_size="40KB")
    loaded = load_base(model_folder, tmp_path / "own", alone(), torch.float32, "eager")
    assert loaded.base.folder == model_folder
    assert not (tmp_path / "own").exists()
    stacks = {
        name: key for name, key in loaded.keys.items() if name.endswith(tuple(STACKS))
    }
    assert stacks
    assert all(("*" in key) == (family != "gpt_oss") for key in stacks.values())
    for name, key in stacks.items():
        live = loaded.model.get_parameter(name)
        assert key in loaded.base
        assert loaded.base.shape_dtype(key) == (tuple(live.shape), torch.float32)
        assert torch.equal(loaded.base.read(key), live)


def test_a_stack_without_all_of_its_files_is_no_tensor(tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    base = BaseCheckpoint.open(tmp_path)
    key = map_model(base, model, ["model.layers.0.mlp.experts.down_proj"])[
        "model.layers.0.mlp.experts.down_proj"
    ]
    assert base.members(key) == [[key.replace("*", str(index))] for index in range(4)]
    assert "nothing.*.weight" not in base
    assert base.members("nothing.*.weight") == []
    mixed = key + " + model.layers.0.self_attn.q_proj.weight"
    assert mixed not in base
