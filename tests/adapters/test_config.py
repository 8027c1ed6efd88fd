"""Configurations of adapters: what is refused, what is taken where nothing is said, what
follows from them.
"""

import json

import pytest

from mora_ds.adapters.config import LoRAConfig, MoRAConfig, config_from_dict
from mora_ds.adapters.ops.lora import LoRASpec
from mora_ds.common.errors import validation_errors_of
from tests.helpers.errors import user_error
from tests.helpers.tables import each_row, parsed

PROBLEMS = """
mora | {rank: 0, dropout: 1.0, operator: rotat, grouping: permutted} | rank dropout operator grouping
mora | {target_modules: [], compute: fast, base_bits: 5} | target_modules base_bits compute
mora | {operator: rotate, grouping: alternate} | grouping
# auto: rotate
mora | {rank: 8, grouping: strided} | grouping
lora | {rank: 0, alpha: 0.0} | rank alpha
lora | {alpha: .inf} | alpha
mora | {dropout: -0.1, embedding_rank: -1, operator: share} | dropout embedding_rank
mora | {operator: share, layer_sizes: {a: 0}} | research.targets:
mora | {r_hat_multiple: 3} | r_hat_multiple
mora | {r_hat_multiple: -2} | r_hat_multiple
mora | {domains: [a, .]} | research.domain_adapters:
mora | {domains: [a, a]} | research.domain_adapters:
"""


@each_row("kind, values, flags", PROBLEMS)
def test_all_wrong_values_are_reported_together(kind, values, flags):
    config = {"mora": MoRAConfig, "lora": LoRAConfig}[kind]
    problems = validation_errors_of(lambda: config(**parsed(values)))
    assert [
        problem.removeprefix("unknown ").split()[0].strip("`") for problem in problems
    ] == flags.split()


def test_an_update_of_lora_is_2_b_a_unless_alpha_says_otherwise():
    assert LoRAConfig().operator_for("a", 64, 64, 0).alpha == 2 * 8


def test_factors_of_a_smaller_rank_keep_the_scale():
    for spec in (
        LoRAConfig(rank=16, alpha=8.0).operator_for("a", 4, 9, 0),
        LoRASpec(4, 9, 4, 2.0),
    ):
        assert (spec.rank, spec.alpha / spec.rank) == (4, 0.5)


def test_init_weights_never_change():
    """Literal values: a resumed run draws LoRA's A of its present cycle again."""
    seeds = [
        LoRAConfig(seed=42).first_seed(layer, cycle)
        for layer, cycle in (("a.q", 0), ("a.q", 1), ("a.k", 0))
    ]
    assert seeds == [3478931074, 981482677, 1068541709]


def test_unknown_settings_are_refused():
    with user_error("droput is unknown"):
        MoRAConfig.from_dict({"droput": 0.1})
    assert MoRAConfig(target_modules={"b", "a"}).target_modules == ("a", "b")


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_config_survives_json(bits):
    for config in (
        MoRAConfig(
            rank=128, target_modules=("q_proj",), train_norms=True, base_bits=bits
        ),
        LoRAConfig(base_bits=bits),
    ):
        assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
