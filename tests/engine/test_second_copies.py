"""ZeRO++'s second copies of the shards (zero_hpz_partition_size): whatever sets a MoRA matrix drops them.

A merge is measured before and after, so that its copies are there when the matrices are reset; a resumed run has those
of its start.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mora_ds.adapters.inject import mora_layers
from mora_ds.common.errors import UserError
from mora_ds.engine import zero
from mora_ds.engine.initialize import check_second_copies, initialize
from tests.helpers.engines import ds_config
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, run
from tests.helpers.models import causal_loss, model_with_mora, tokens
from tests.helpers.resume import assert_same_result, stop_and_resume

RUN = ("--max_steps", 6, "--merge_every", 3, "--restart_warmup_steps", 1, "--save_steps", 2, "--train_norms", "true")
ROWS = 8
"""Sequences a step."""


def file(folder: Path, second_copies: int) -> Path:
    path = folder / f"hpz{second_copies}.json"
    zero3: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if second_copies:
        zero3["zero_hpz_partition_size"] = second_copies
    path.write_text(json.dumps({"zero_optimization": zero3}))
    return path


@pytest.mark.heavy(seconds=12)
@pytest.mark.parametrize("world, size", [(2, 2), (4, 2)])
def test_a_run_with_second_copies_is_the_run_without_also_resumed(
    user: Playground, tmp_path: Path, world: int, size: int
):
    def flags(out: str, second_copies: int) -> list[str]:
        rows = "--per_device_train_batch_size", ROWS // world
        return user.flags(tmp_path / out, *RUN, *rows, "--deepspeed", file(tmp_path, second_copies))

    run(world, flags("plain", 0))
    run(world, flags("whole", size))
    stop_and_resume(world, flags("resumed", size), 3)
    for out in ("whole", "resumed"):
        assert_same_result(tmp_path / out, tmp_path / "plain")


def set_and_reset() -> list[float]:
    """How far the matrix that forward reads is from what was set, with second copies there; then from 0 after a reset.
    The engine is the second one of its process."""
    for _ in range(2):
        model = model_with_mora()
        config = ds_config(3, 2, 1)
        config["zero_optimization"]["zero_hpz_partition_size"] = 2
        engine, *_ = initialize(model=model, config=config)
    layers = list(mora_layers(model).values())
    first = layers[0]
    seen = list[torch.Tensor]()
    differences = list[float]()
    forward = first.forward

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen.append(first.value.detach().clone())
        return forward(x)

    first.forward = watched
    ones = torch.ones(first.value.ds_shape)
    changes: list[tuple[float, Callable[[], None]]] = [
        (1.0, lambda: zero.set_fp32(engine, first.value, ones)),
        (0.0, lambda: zero.reset_group(engine, 0, [layer.value for layer in layers])),
    ]
    with torch.no_grad():
        causal_loss(engine, tokens(2, seed=1))
        for wanted, change in changes:
            assert first.value.ds_secondary_tensor is not None, "else this tests nothing"
            change()
            causal_loss(engine, tokens(2, seed=1))
            differences.append((seen[-1] - wanted).abs().max().item())
    return differences


def test_a_matrix_that_is_set_or_reset_is_the_one_that_forward_reads():
    assert run_ranks(2, set_and_reset) == [[0.0, 0.0]] * 2


def test_sizes_that_cannot_be_are_refused():
    def refused(world: int, degree: int = 1, stage: int = 3, size: int = 2) -> str:
        config = {"zero_optimization": {"stage": stage, "zero_hpz_partition_size": size}}
        try:
            check_second_copies(config, world, degree)
        except UserError as error:
            return str(error)
        return ""

    assert refused(2) == refused(4) == refused(3, size=1) == refused(1, stage=0, size=0) == ""
    assert "must divide the number of processes, which is 3" in refused(3)
    assert "must divide the number of processes, which is 2" in refused(2, size=4)
    assert "is for stage 3, and the stage is 2" in refused(2, stage=2)
    assert "cannot be used with --tensor_parallel_size 2" in refused(4, degree=2)
