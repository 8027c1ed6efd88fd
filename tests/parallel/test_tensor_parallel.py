"""Split equals unsplit: t x dp ranks follow one plain PyTorch process, for every family and
operator.
"""

import pytest
import yaml

from tests.helpers.gloo import run_ranks
from tests.helpers.pairwise import pairwise_cases
from tests.helpers.resume import assert_same_tensors
from tests.helpers.tensor_parallel import assert_same_run, plain_run, split_run

CORE = yaml.safe_load("""
- {family: llama, operator: share, train_norms: true, train_embeddings: true, train_head: true}
- {family: llama, operator: share, compute: weight}  # at t = 4 the attention falls back
- {family: llama, operator: rotate, checkpointing: true, compute: weight}
- {family: llama, operator: rotate, grouping: permuted, embedding_rank: 3}
- {family: mistral, operator: decouple, grouping: permuted, compute: weight, documents: true}
- {family: qwen2, operator: decouple, target_modules: [q_proj, down_proj], new_rows_from: 120}
- {family: llama, operator: truncate, rank: 1}
- {family: qwen3, operator: share, train_norms: true, checkpointing: true}
- {family: qwen2, operator: share, compute: weight, train_embeddings: true, documents: true}
- {family: gpt_neox, operator: rotate, new_rows_from: 120}
- {family: gpt2, operator: share, train_norms: true}
- {family: phi3, operator: decouple}
""")


def split_runs(cases, degree, **settings):
    return [split_run(case, degree, **settings) for case in cases]


@pytest.mark.parametrize("degree, cases", [(2, CORE), (4, CORE[:2])], ids=["t2", "t4"])
def test_tensor_parallel_equals_one_process(degree, cases):
    """At t = 4 two key-value heads do not divide: the attention falls back."""
    compare(degree, degree, cases)


def compare(world, degree, cases):
    ranks = run_ranks(
        world, split_runs, cases, degree, timeout_s=max(240, 40 * len(cases))
    )
    for index, case in enumerate(cases):
        expected = plain_run(case)
        for results in ranks:
            assert_same_run(results[index], expected, case)
            assert_same_tensors(
                results[index]["values"], ranks[0][index]["values"], case
            )


# -- engines ---------------------------------------------------------------------------


SETTINGS = [
    {"offload_optimizer": {"device": "cpu"}},
    {"stage3_param_persistence_threshold": 10**6},
]


def with_settings(case):
    return [split_run(case, 2, **settings) for settings in SETTINGS]


@pytest.mark.heavy
def test_an_offloaded_optimizer_and_persistent_mora_matrices():
    expected = plain_run(CORE[0])
    for results in run_ranks(4, with_settings, CORE[0]):
        for result, settings in zip(results, SETTINGS, strict=True):
            assert_same_run(result, expected, settings)


# -- everything ------------------------------------------------------------------------

FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "phi3",
    "gpt_neox",
    "gpt2",
]
RANKS = [(2, 2), (4, 4), (4, 2)]
"""(ranks, tensor-parallel degree)"""
OPERATORS = yaml.safe_load("""
share: {operator: share}
rotate: {operator: rotate}
decouple: {operator: decouple}
truncate: {operator: truncate}
share, alternate: {operator: share, grouping: alternate}
""")
VARIANTS = yaml.safe_load("""
others trained: {train_norms: true, train_embeddings: true}
over the weight: {compute: weight, checkpointing: true}
documents: {documents: true, checkpointing: true}
""")


def has_heads(ranks, family, kv_heads, **settings):
    """Four key-value heads, which four ranks can split, in place of two, where the
    attention falls back.
    """
    return kv_heads is None or (ranks == (4, 4) and family not in ("gpt2", "gpt_neox"))


EVERY_TWO = pairwise_cases(
    {
        "family": FAMILIES,
        "ranks": RANKS,
        "operator": list(OPERATORS),
        "variant": list(VARIANTS),
        "kv_heads": [None, 4],
    },
    has_heads,
)


@pytest.mark.heavy
@pytest.mark.parametrize("ranks", RANKS)
def test_pairs_of_family_operator_and_variant(ranks):
    cases = [
        {
            "family": case["family"],
            "model": {"num_key_value_heads": case["kv_heads"]}
            if case["kv_heads"]
            else {},
            **OPERATORS[case["operator"]],
            **VARIANTS[case["variant"]],
        }
        for case in EVERY_TWO
        if case["ranks"] == ranks
    ]
    compare(*ranks, cases)
