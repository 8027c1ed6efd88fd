"""Which batches of an evaluation set count: --max_eval_batches limits them over all replicas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mora_ds.checkpoint.state import TrainerState
from mora_ds.data import IGNORED
from mora_ds.train.evaluator import Evaluator

BATCHES = 7


def counted(index: int, replicas: int, limit: int | None) -> list[bool]:
    """For each batch that replica `index` evaluates: whether its tokens count."""

    def eval_batches(index: int, replicas: int, size: int) -> Any:
        for _ in range(-(-BATCHES // replicas)):
            yield {"labels": torch.ones(size, 4, dtype=torch.long)}

    replica: Any = SimpleNamespace(index=index, count=replicas)
    log: Any = None
    evaluator = Evaluator(replica, {}, TrainerState(), log, batch_size=2, max_batches=limit)
    batches = evaluator._batches(SimpleNamespace(eval_batches=eval_batches), lambda: None)  # type: ignore[arg-type]
    return [bool((batch["labels"] != IGNORED).all()) for batch in batches]


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5])
def test_the_limit_counts_batches_over_all_replicas(replicas: int, limit: int) -> None:
    """Every replica has equally many batches, and together exactly `limit` of them count, the first ones."""
    found = [counted(index, replicas, limit) for index in range(replicas)]
    assert len({len(batches) for batches in found}) == 1
    in_order = [count for round_ in zip(*found, strict=True) for count in round_]
    assert in_order == [True] * limit + [False] * (len(in_order) - limit)


def test_without_a_limit_all_batches_count() -> None:
    assert counted(1, 2, None) == [True] * 4
