"""Split equals whole: t x dp ranks follow one plain PyTorch process, for every family and operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gloo import run_ranks
from tests.tensor_parallel import Case, assert_same_run, plain_run, split_run

pytestmark = pytest.mark.gloo

ALL = {"train_norms": True, "train_embeddings": True, "train_head": True}
CORE: list[Case] = [
    {"family": "llama", "operator": "share", **ALL},
    {"family": "llama", "operator": "rotate", "checkpointing": True},
    {"family": "llama", "operator": "decouple", "target_modules": ("q_proj", "down_proj")},
    {"family": "llama", "operator": "truncate", "rank": 3},
    {"family": "qwen3", "operator": "share", "train_norms": True, "checkpointing": True},
    {"family": "qwen2", "operator": "share", "compute": "weight", "train_embeddings": True},
    {"family": "gpt_neox", "operator": "rotate"},
    {"family": "gpt2", "operator": "share", "train_norms": True},
    {"family": "phi3", "operator": "decouple"},
]


def split_runs(cases: list[Case], degree: int, **settings: Any) -> list[dict[str, Any]]:
    return [split_run(case, degree, **settings) for case in cases]


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("world", [2, 4])
def test_the_core(world: int, degree: int) -> None:
    """t = 2, t = 4 (where two key-value heads do not divide: the attention falls back), t = 2 x dp = 2."""
    if degree > world:
        pytest.skip("more ranks a group than there are")
    cases = CORE if world == degree == 2 else CORE[:2]
    compare(world, degree, cases)


def compare(world: int, degree: int, cases: list[Case]) -> None:
    ranks = run_ranks(world, split_runs, cases, degree)
    for index, case in enumerate(cases):
        expected = plain_run(case)
        for results in ranks:
            assert_same_run(results[index], expected, case)
            for name, value in results[index]["values"].items():
                assert torch.equal(value, ranks[0][index]["values"][name]), (case, name)
