"""Which layers tensor parallelism splits, and which it does not and why."""

from itertools import pairwise

import pytest
from torch import nn

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject
from mora_ds.adapters.ops.spec import Style
from mora_ds.parallel.limits import check_world
from mora_ds.parallel.tensor_parallel import split_model
from mora_ds.parallel.topology import Topology
from mora_ds.parallel.tp_plan import tp_plan_of
from tests.helpers.errors import user_error
from tests.helpers.models import FAMILIES, model_with_mora, tiny_model

SPLIT = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
}
ATTENTION = {"mixtral", "qwen3_moe"}
MLP = {"olmo2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_split_layers_of_each_family(family):
    model = tiny_model(family)
    plan = tp_plan_of(model, 2)
    kinds = {"attention" if "att" in block else "mlp" for block in plan.blocks}
    has_attention = family in SPLIT | ATTENTION
    has_mlp = family in SPLIT | MLP
    assert ("attention" in kinds, "mlp" in kinds) == (has_attention, has_mlp), (
        plan.reasons
    )
    assert len(plan.blocks) == 2 * len(kinds)
    assert set(plan.reasons) == {
        name for name, style in plan.styles.items() if style is Style.FULL
    }
    assert bool(plan.summed) == (family in ("qwen3", "qwen3_moe", "gemma3_text"))
    inject(model, MoRAConfig(rank=4))
    assert tp_plan_of(model, 2) == plan, "injection changes nothing"


def test_heads_that_the_degree_does_not_divide_fall_back():
    plan = tp_plan_of(tiny_model("llama"), 4)
    assert {block.rpartition(".")[2] for block in plan.blocks} == {"mlp"}
    assert "4 does not divide 4 heads and 2 key-value heads" in str(plan)
    assert "q_proj, k_proj, v_proj, o_proj" in str(plan)
    odd = tp_plan_of(tiny_model("llama", intermediate_size=57), 2)
    assert "2 does not divide the 57 outputs of gate_proj" in str(odd)


def test_a_model_without_a_plan_is_not_split():
    plan = tp_plan_of(tiny_model("gpt2"), 2)
    assert not plan.blocks
    assert "the model has no tensor-parallel plan" in str(plan)
    assert "colwise_gather_output" in str(tp_plan_of(tiny_model("phi3"), 2))


def test_a_block_with_a_weight_unknown_to_the_plan_is_not_split():
    model = tiny_model("llama")
    model.model.layers[0].mlp.extra = nn.LayerNorm(56)
    plan = tp_plan_of(model, 2)
    assert "model.layers.0.mlp" not in plan.blocks
    assert "model.layers.1.mlp" in plan.blocks
    assert "nothing for extra" in str(plan)


def test_a_lone_rowwise_layer_is_not_split():
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.gate_proj = mlp.up_proj = nn.Identity()
    plan = tp_plan_of(model, 2)
    assert "model.layers.1.mlp" not in plan.blocks
    assert "no pair of colwise and rowwise here" in str(plan)


def test_shares_are_contiguous_and_differ_by_one_at_most():
    for size in range(1, 20):
        for degree in range(1, 6):
            bounds = [
                Topology(degree, index, None).shard_range(size)
                for index in range(degree)
            ]
            assert bounds[0][0] == 0
            assert bounds[-1][1] == size
            assert all(one[1] == following[0] for one, following in pairwise(bounds))
            lengths = [stop - start for start, stop in bounds]
            assert max(lengths) - min(lengths) <= 1
            assert max(lengths) == -(-size // degree)


# -- errors ----------------------------------------------------------------------------


def split(model, degree=2):
    split_model(model, Topology(degree, 0, None))


def test_dropout_is_refused_and_named():
    model = model_with_mora()
    model.model.layers[0].self_attn.drops_keys = True  # no probability
    split(model)
    for model in (
        tiny_model("gpt2", resid_pdrop=0.1),
        tiny_model("llama", attention_dropout=0.1),
    ):
        inject(model, MoRAConfig(rank=4))
        with user_error(r"draw a different dropout mask; set to 0: .*drop.* = 0.1"):
            split(model)
    model = model_with_mora(dropout=0.1)
    with user_error(r"q_proj.dropout = 0.1"):
        split(model)


def test_domains_are_not_split():
    with user_error("splits one MoRA matrix a layer"):
        split(model_with_mora(domains=("a", "b")))


def test_mora_matrices_need_a_row_for_each_rank():
    model = model_with_mora(rank=1, target_modules=("k_proj",))
    with user_error("has 6 rows: raise `rank`, or use a smaller group"):
        split(model, 8)


def test_a_degree_that_does_not_divide_the_ranks():
    check_world(4, tensor=2)
    with user_error(
        "--tensor_parallel_size 3 does not divide the 4 ranks of this run: 1, 2, 4 would"
    ):
        check_world(4, tensor=3)
