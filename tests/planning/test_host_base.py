"""Plans of a base in host memory: what a device holds, and which copies hide behind arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoConfig

from mora_ds.adapters.config import MoRAConfig
from mora_ds.common.errors import UserError
from mora_ds.engine.base_device import BaseDevice
from mora_ds.engine.ds_config import complete_ds_config
from mora_ds.planning.plan import Planner, place_base, recommend
from mora_ds.planning.report import as_json, report
from mora_ds.planning.step import Work
from mora_ds.planning.timing import Cluster

SIZES = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 6, "num_attention_heads": 32}


def planner(cluster: Cluster) -> Planner:
    config = AutoConfig.for_model("llama", **SIZES, vocab_size=32000, max_position_embeddings=4096)
    completed = complete_ds_config({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}, [1])
    return Planner(Work(config, MoRAConfig(rank=8, operator="share"), 1024), cluster, completed)


def test_a_base_in_host_memory_fits_where_copies_hide_behind_arithmetic_or_not() -> None:
    small = planner(Cluster(64, memory=2.2e9))
    assert recommend(small) is None
    placed = place_base(small, BaseDevice.AUTO, 2)
    assert placed.work.base_buffers == 2 and place_base(small, BaseDevice.DEVICE, 2) is small
    plan = recommend(placed)
    assert plan is not None and plan.fits and plan.work.tensor_parallel == 1
    memory, resident = plan.memory, small.plan().memory
    assert memory.base - memory.base_buffers + memory.host_base == resident.base
    assert plan.host_memory - memory.host_save == resident.base  # one copy a node
    quick, slow = (replace(placed, cluster=replace(small.cluster, host_link=rate)).plan() for rate in (1e15, 1e9))
    assert quick.time.waits == 0 and quick.time.step == quick.time.resident
    assert slow.time.copies == slow.copied / 1e9 > slow.time.waits > 0
    assert slow.time.step == pytest.approx(slow.time.resident + slow.time.waits)
    assert slow.time.bottleneck == "copying the base from host memory"
    assert "hides all but" in report(slow) and "hides them all" in report(quick)
    assert as_json(slow)["settings"]["base_device"] == "host" and as_json(slow)["base_bytes_copied"] == slow.copied
    with pytest.raises(UserError, match="--base_device host"):
        place_base(replace(small, work=replace(small.work, adapter=None)), BaseDevice.HOST, 2)
    assert place_base(planner(Cluster(8)), BaseDevice.AUTO, 2).work.base_buffers is None
