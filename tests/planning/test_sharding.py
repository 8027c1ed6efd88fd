"""Which stage and shard group the plan recommends, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from mora_ds.adapters.config import MoRAConfig
from mora_ds.planning import plan as plans
from mora_ds.planning.plan import Cluster, Plan, Planner, recommend_sharding
from mora_ds.planning.report import report
from mora_ds.planning.step import Work
from tests.helpers.models import FAMILIES

SIZES = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size",
         "stage3_param_persistence_threshold")  # fmt: skip


def ds_config(stage: int) -> dict[str, Any]:
    return {"bf16": {"enabled": True}, "zero_optimization": {**dict.fromkeys(SIZES, "auto"), "stage": stage}}


def planned(ranks: int, memory: float = 80e9) -> tuple[Planner, Plan]:
    work = Work(AutoConfig.for_model("llama", **FAMILIES["llama"]), MoRAConfig(rank=8), 64, 1, torch.bfloat16)
    made = Planner(work, Cluster(ranks, memory=memory), ds_config(3))
    return made, made.plan()


def test_few_ranks_take_stage_3_and_many_take_stage_1(monkeypatch: pytest.MonkeyPatch) -> None:
    planner, plan = planned(8)
    parameters = len(plan.trained.numels)
    monkeypatch.setattr(plans, "FEW_SLICES", 64 * parameters)
    stages = {}
    for ranks in (8, 64, 1024):
        planner, plan = planned(ranks)
        found = recommend_sharding(planner, plan)
        stages[ranks] = found.stage
        assert f"{parameters:,} parameters x {ranks:,} ranks = {parameters * ranks:,} slices" in found.reason
        assert f"recommended at {ranks:,} GPUs: ZeRO-{found.stage}" in report(plan, sharding=found)
    assert stages == {8: 3, 64: 3, 1024: 1}


def test_matrices_that_do_not_fit_unsharded_are_gathered_within_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    planner, plan = planned(1024)
    at_stage_1 = replace(planner, ds_config=ds_config(1)).plan()
    assert plan.memory.peak < at_stage_1.memory.peak, "stage 3 holds less"
    between = (plan.memory.peak + at_stage_1.memory.peak) / 2 / 0.92
    monkeypatch.setattr(plans, "FEW_SLICES", 1)
    found = recommend_sharding(*planned(1024, memory=between))
    assert (found.stage, found.group) == (3, 8) and "zero_hpz_partition_size 8" in str(found)
    assert "do not fit unsharded" in found.reason
