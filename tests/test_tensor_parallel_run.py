"""The main job at t x dp: the run of one rank, its checkpoints resumed at any other t x dp, its merges and exports."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mora_ds.shards import EngineShards
from mora_ds.verification import verify
from tests.jobs import Playground, losses, playground, rows, run

pytestmark = pytest.mark.gloo

STEPS, HALF = 6, 4
ROWS = 4
"""Sequences a step."""
ALIGNED = ("--operator", "share", "--mora_rank", "4", "--tp_grouping", "aligned", "--tp_segments", "4")
RUNS: dict[str, tuple[str, ...]] = {
    "gather": ("--operator", "rotate", "--train_norms", "--train_embeddings"),
    "aligned": (*ALIGNED, "--merge_precision", "incremental"),
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Playground:
    return playground(tmp_path_factory.mktemp("tensor_parallel"))


def flags(ground: Playground, out: Path, degree: int, replicas: int, *more: str | int) -> list[str]:
    return ground.flags(
        out, "--tensor_parallel_size", degree, "--per_device_train_batch_size", ROWS // replicas // 2,
        "--gradient_accumulation_steps", 2, "--max_steps", STEPS, "--merge_every", 3, "--restart_warmup_steps", 1,
        "--save_steps", HALF, "--adam_epsilon", 1e-4, *more,
    )  # fmt: skip


@pytest.fixture(scope="module", params=RUNS)
def saved(request: Any, ground: Playground) -> tuple[str, Path, torch.Tensor]:
    """(name, run of (2, 2), losses of (1, 1))."""
    more = RUNS[request.param]
    alone, shared = ground.root / f"{request.param}-alone", ground.root / f"{request.param}-2-2"
    run(1, flags(ground, alone, 1, 1, *more))
    run(4, flags(ground, shared, 2, 2, *more, "--export_merged"))
    return request.param, shared, losses(alone)


def test_it_is_the_run_of_one_rank(saved: tuple[str, Path, torch.Tensor], ground: Playground) -> None:
    name, out, expected = saved
    torch.testing.assert_close(losses(out), expected, rtol=1e-5, atol=0)
    alone = ground.root / f"{name}-alone"
    for mine, theirs in zip(rows(out), rows(alone), strict=True):
        for key in ("grad_norm", "loss_after", "square_norm", "delta_norm"):
            assert mine.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), rel=1e-4), (key, mine, theirs)
    for step in (HALF, STEPS):
        folder = f"checkpoints/step-{step:06d}"
        assert [verdict.problems for verdict in verify(out / folder)] == [[]]
        here, there = EngineShards.open(out / folder / "engine"), EngineShards.open(alone / folder / "engine")
        assert here.shapes == there.shapes
        sizes = [
            {path.name: path.stat().st_size for path in (root / folder).glob("**/*.safetensors")}
            for root in (out, alone)
        ]
        assert {name: size for name, size in sizes[0].items() if not name.startswith("rng")} == {
            name: size for name, size in sizes[1].items() if not name.startswith("rng")
        }


@pytest.mark.parametrize(("degree", "replicas"), [(1, 2), (2, 1), (4, 1), (1, 4)])
def test_it_resumes_at_another_size(
    saved: tuple[str, Path, torch.Tensor], ground: Playground, degree: int, replicas: int
) -> None:
    name, out, expected = saved
    copy = ground.root / f"{name}-{degree}-{replicas}"
    shutil.copytree(out, copy, symlinks=True)
    shutil.rmtree(copy / f"checkpoints/step-{STEPS:06d}")
    argv = flags(ground, copy, degree, replicas, *RUNS[name], "--resume_from_checkpoint")
    rows_each = ROWS // replicas
    argv += [str(copy / f"checkpoints/step-{HALF:06d}"), "--gradient_accumulation_steps", "1"]
    argv += ["--per_device_train_batch_size", str(rows_each)]
    run(degree * replicas, argv)
    torch.testing.assert_close(losses(copy)[-1], expected[-1], rtol=1e-5, atol=0)
