"""Injection: which layers match, what is replaced, frozen, counted and refused."""

import pytest
import torch
from torch import nn

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import (
    count_parameters,
    frozen_buffers,
    inject,
    mora_layers,
    move_base,
    set_cycle,
)
from mora_ds.adapters.ops.spec import Grouping, permutation_seed
from mora_ds.adapters.target_modules import match_targets
from mora_ds.common.errors import UserError
from tests.helpers.errors import user_error
from tests.helpers.models import causal_loss, model_with_mora, tiny_model, tokens
from tests.helpers.resume import assert_same_tensors
from tests.helpers.tables import each_row

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def matched(model, *patterns):
    return set(match_targets(model, patterns))


# -- matching --------------------------------------------------------------------------

PATTERNS = """
q_proj | 0 1 | self_attn.q_proj
self_attn.q_proj | 0 1 | self_attn.q_proj
model.layers.1.mlp.up_proj | 1 | mlp.up_proj
*.mlp.* | 0 1 | mlp.gate_proj mlp.up_proj mlp.down_proj
[m]odel.layers.0.mlp.up_proj | 0 | mlp.up_proj
re:.*layers\\.0\\..*(up|down)_proj | 0 | mlp.up_proj mlp.down_proj
q_proj v_proj q_proj | 0 1 | self_attn.q_proj self_attn.v_proj
all-linear | 0 1 | self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj \
mlp.gate_proj mlp.up_proj mlp.down_proj
"""
"""Patterns | layers | what they match there."""


@each_row("patterns, layers, paths", PATTERNS)
def test_patterns(patterns, layers, paths):
    assert matched(tiny_model(), *patterns.split()) == {
        f"model.layers.{layer}.{path}"
        for layer in layers.split()
        for path in paths.split()
    }


@pytest.mark.parametrize(
    "pattern",
    [
        "q_porj",
        "*.attention.*",
        r"re:layers\.9",
        r"re:model\.layers",
        "embed_tokens",
        "input_layernorm",
    ],
)
def test_a_pattern_without_a_match_is_an_error_that_lists_what_there_is(pattern):
    with pytest.raises(UserError) as error:
        inject(tiny_model(), MoRAConfig(target_modules=("q_proj", pattern)))
    message = str(error.value)
    assert "`target_modules`" in message
    assert repr(pattern) in message
    assert all(name in message for name in (*ATTENTION, *MLP, "lm_head"))
    assert ("Did you mean 'q_proj'?" in message) == (pattern == "q_porj")


def test_patterns_and_models_that_cannot_match():
    with user_error("no regular expression"):
        matched(tiny_model(), "re:layers.(0")
    with user_error(r"no nn\.Linear or Conv1D"):
        matched(nn.Sequential(nn.Embedding(3, 4)), "all-linear")
    with user_error("matches no linear layer"):
        matched(tiny_model(), "proj")  # the end of every name, but of no component


def test_all_linear_leaves_the_head_out_under_any_name():
    assert "lm_head" not in matched(tiny_model("gpt_neox"), "all-linear")
    all_linear = matched(tiny_model(), "all-linear")
    assert matched(tiny_model(), "all-linear", "lm_head") == {*all_linear, "lm_head"}
    assert matched(tiny_model("gpt2"), "all-linear") == {
        f"transformer.h.{index}.{path}"
        for index in (0, 1)
        for path in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


# -- refusing --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_a_mora_matrix_on_a_tied_head_is_refused(family):
    model = tiny_model(family)
    with user_error("tied"):
        inject(model, MoRAConfig(target_modules=("lm_head",)))
    assert not mora_layers(model)
    assert causal_loss(model, tokens(1)).isfinite()  # left as it was


def with_one_weight_twice(module):
    """A model two of whose layers are one module, or have one weight."""
    model = tiny_model()
    first, second = (model.model.layers[index].mlp for index in (0, 1))
    if module:
        second.up_proj = first.up_proj
    else:
        second.up_proj.weight = first.up_proj.weight
    return model


@pytest.mark.parametrize(
    "target", ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "up_proj"]
)
@pytest.mark.parametrize("module", [True, False])
def test_a_layer_that_shares_its_weight_is_refused(module, target):
    """An adapter of one would change or miss the other."""
    model = with_one_weight_twice(module)
    with user_error(
        "matches no linear layer" if module and ".1." in target else "tied"
    ):
        inject(model, MoRAConfig(target_modules=(target,)))
    inject(model, MoRAConfig(target_modules=("down_proj",)))


@pytest.mark.parametrize(
    "d_in, message",
    [(1, "no two dimensions that rotate could pair"), (2, "`rank` 1 is too small")],
)
def test_a_layer_without_a_pair_to_rotate_is_refused(d_in, message):
    with user_error(message):
        inject(nn.Sequential(nn.Linear(d_in, 1)), MoRAConfig(rank=1, operator="rotate"))


# -- freezing --------------------------------------------------------------------------


def test_kernels_of_the_hub_are_reset(monkeypatch):
    model = tiny_model()
    asked = []
    monkeypatch.setattr(type(model), "use_kernels", True)
    monkeypatch.setattr(
        type(model), "set_use_kernels", lambda _, use, *more: asked.append(use)
    )
    inject(model, MoRAConfig(rank=2))
    assert asked == [False]


def test_everything_frozen_is_a_buffer_that_no_state_dict_holds():
    model = tiny_model("qwen2")  # biases and a tied head
    parameters = dict(model.named_parameters(remove_duplicate=False))
    before = {name: tensor.clone() for name, tensor in parameters.items()}
    addresses = {name: tensor.data_ptr() for name, tensor in parameters.items()}
    inject(model, MoRAConfig(rank=2))
    mora_matrices = [f"{name}.mora_matrix" for name in mora_layers(model)]
    assert [name for name, _ in model.named_parameters()] == mora_matrices
    assert list(model.state_dict()) == mora_matrices
    frozen = frozen_buffers(model)
    assert {name: tensor.data_ptr() for name, tensor in frozen.items()} == addresses
    assert_same_tensors(frozen, before)
    assert not any(tensor.requires_grad for tensor in frozen.values())
    assert "model.rotary_emb.inv_freq" not in frozen


@pytest.mark.parametrize(
    "changes", [{}, {"train_norms": True}, {"train_embeddings": True}]
)
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_ties_stay_one_tensor(family, changes):
    model = model_with_mora(family, **changes)
    move_base(model, "cpu", torch.bfloat16)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    assert embedding is head
    trained = bool(changes.get("train_embeddings"))
    assert isinstance(embedding, nn.Parameter) is trained
    assert embedding.dtype is (torch.float32 if trained else torch.bfloat16)


def test_moving_the_base_moves_no_mora_matrix_and_no_buffer_of_the_model():
    model = model_with_mora()
    move_base(model, "cpu", torch.bfloat16)
    assert {tensor.dtype for tensor in frozen_buffers(model).values()} == {
        torch.bfloat16
    }
    assert {layer.mora_matrix.dtype for layer in mora_layers(model).values()} == {
        torch.float32
    }
    # bf16 would ruin the positions
    assert model.model.rotary_emb.inv_freq.dtype is torch.float32


# -- what else is trained --------------------------------------------------------------


def trained(model):
    return {
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if not name.endswith(".mora_matrix")
    }


def assert_gradients_everywhere(model):
    causal_loss(model, tokens(2)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


TRAINABLES = """
llama | embeddings | model.embed_tokens.weight
llama | head | lm_head.weight
llama | embeddings head | model.embed_tokens.weight lm_head.weight
# tied: the head follows
qwen2 | embeddings | model.embed_tokens.weight lm_head.weight
qwen2 | head | model.embed_tokens.weight lm_head.weight
gpt2 | embeddings | transformer.wte.weight transformer.wpe.weight lm_head.weight
gpt_neox | head | lm_head.weight
gemma3_text | embeddings | model.embed_tokens.weight lm_head.weight
"""


@each_row("family, settings, expected", TRAINABLES)
def test_other_trainables(family, settings, expected):
    model = model_with_mora(
        family, **{f"train_{name}": True for name in settings.split()}
    )
    assert trained(model) == set(expected.split())
    assert_gradients_everywhere(model)


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma2", "gemma3_text", "olmo2", "gpt_neox", "gpt2"]
)
def test_norms_of_every_kind(family):
    model = tiny_model(family)
    norms = {
        name for name, _ in model.named_parameters() if "norm" in name or ".ln_" in name
    }
    inject(model, MoRAConfig(rank=4, train_norms=True))
    assert trained(model) == norms
    assert norms
    assert_gradients_everywhere(model)


def test_parameters_frozen_by_the_user_are_trained_where_the_config_says_so():
    model = tiny_model()
    model.requires_grad_(False)
    inject(model, MoRAConfig(rank=4, train_norms=True))
    assert all(parameter.requires_grad for parameter in model.parameters())


# -- report ----------------------------------------------------------------------------


def test_the_report_counts_exactly():
    model = tiny_model("qwen2")
    base = sum(
        parameter.numel() for parameter in model.parameters()
    )  # the tied head once
    assert count_parameters(model) == base
    report = inject(model, MoRAConfig(rank=4, operator="share", train_norms=True))
    # Two layers, rank 4: sqrt((d_in + d_out) * 4), made even, squared; key and value heads
    # are half as wide.
    mora_matrices = 2 * (2 * 16**2 + 2 * 12**2 + 3 * 18**2)
    norms = 5 * 32
    assert (report.adapter_params, report.other_trainable_params) == (
        mora_matrices,
        norms,
    )
    assert (
        report.trainable_params
        == mora_matrices + norms
        == sum(p.numel() for p in model.parameters())
    )
    assert report.total_params == base + mora_matrices == count_parameters(model)
    lines = str(report).splitlines()
    assert len(lines[2:-1]) == 7
    for row in (
        "q_proj 2 32 32 16 512",
        "k_proj 2 32 16 12 288",
        "down_proj 2 56 32 18 648",
    ):
        assert row.split() in [line.split() for line in lines]
    share = 100 * report.trainable_params / report.total_params
    assert f"share/permuted: trainable {report.trainable_params:,}" in lines[-1]
    assert lines[-1].endswith(f"of {report.total_params:,} parameters = {share:.3f}%")


def test_the_report_has_the_smallest_size_of_a_plan():
    sizes = {"model.layers.0.self_attn.q_proj": 8, "model.layers.1.self_attn.q_proj": 4}
    (row,) = inject(tiny_model(), MoRAConfig(layer_sizes=sizes)).rows
    assert (row.count, row.size, row.params) == (2, 4, 80)


def test_a_size_larger_than_the_layer_is_reduced():
    report = inject(tiny_model(), MoRAConfig(rank=64, operator="share"))
    sizes = {row.name: row.size for row in report.rows}
    assert (sizes["q_proj"], sizes["down_proj"]) == (32, 48)
    assert MoRAConfig(rank=100, operator="rotate").mora_matrix_size(7, 5) == 6, "even"
    assert (
        MoRAConfig(rank=100, operator="share", r_hat_multiple=1).mora_matrix_size(7, 5)
        == 7
    )


# -- cycles ----------------------------------------------------------------------------


def test_every_cycle_has_its_own_permutations():
    model = tiny_model()
    config = MoRAConfig(rank=4, operator="share", seed=7)
    inject(model, config)
    seeds = set()
    for name, layer in mora_layers(model).items():
        assert layer.spec.seed == permutation_seed(7, name, 0)
    for cycle in range(3):
        set_cycle(model, config, cycle)
        seeds |= {layer.spec.seed for layer in mora_layers(model).values()}
    assert len(seeds) == 3 * len(mora_layers(model))
    set_cycle(model, config, 0)
    fresh = tiny_model()
    inject(fresh, config)
    wired = {name: layer.spec for name, layer in mora_layers(model).items()}
    assert wired == {name: layer.spec for name, layer in mora_layers(fresh).items()}


def test_alternation_is_the_papers():
    config = MoRAConfig(rank=4, operator="share", grouping="alternate")
    groupings = [config.operator_for("a", 8, 8, cycle).grouping for cycle in range(4)]
    assert groupings == [Grouping.STRIDED, Grouping.CONTIGUOUS] * 2


RANKS = [
    ("contiguous", [22, 22, 22, 22]),
    ("alternate", [22, 43, 43, 43]),
    ("permuted", [22, 43, 64, 64]),
]
"""Grouping | ranks of the sum of all updates after each cycle, with r_hat 22."""


@pytest.mark.parametrize("grouping, wanted", RANKS)
def test_fresh_permutations_add_about_r_hat_to_the_rank_in_every_cycle(
    grouping, wanted
):
    config = MoRAConfig(rank=4, operator="share", grouping=grouping, seed=7)
    total = torch.zeros(64, 64, dtype=torch.float64)
    ranks = []
    for cycle in range(4):
        spec = config.operator_for("a", 64, 64, cycle)
        matrix = torch.randn(spec.r_hat, spec.r_hat, dtype=torch.float64)
        total += spec.delta_weight(matrix)
        ranks.append(int(torch.linalg.matrix_rank(total)))
    assert spec.r_hat == 22
    assert ranks == wanted


def test_layers_stay_in_training_or_evaluation():
    for mode in (True, False):
        model = tiny_model().train(mode)
        inject(model, MoRAConfig(rank=4, dropout=0.5))
        assert {layer.training for layer in mora_layers(model).values()} == {mode}
