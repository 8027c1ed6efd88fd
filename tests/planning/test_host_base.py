"""Plans of a base in host memory: what a device holds, and what is copied to it."""

from dataclasses import replace

from transformers import AutoConfig

from mora_ds.adapters.config import MoRAConfig
from mora_ds.engine.device import BaseDevice
from mora_ds.engine.ds_config import complete_ds_config
from mora_ds.planning.plan import Cluster, Planner, place_base, recommend
from mora_ds.planning.report import as_json, report
from mora_ds.planning.step import Work
from tests.helpers.errors import user_error

SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
}


def planner(cluster):
    config = AutoConfig.for_model(
        "llama", **SIZES, vocab_size=32000, max_position_embeddings=4096
    )
    completed = complete_ds_config(
        {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}, [1]
    )
    return Planner(
        Work(config, MoRAConfig(rank=8, operator="share"), 1024), cluster, completed
    )


def test_a_base_in_host_memory_leaves_a_device_two_layers_of_it():
    small = planner(Cluster(64, memory=2.2e9))
    assert recommend(small) is None
    placed = place_base(small, BaseDevice.AUTO)
    assert placed.work.base_on_host
    assert place_base(small, BaseDevice.DEVICE) is small
    plan = recommend(placed)
    assert plan is not None
    assert plan.fits
    memory = plan.memory
    resident = small.plan().memory
    assert memory.base - memory.base_buffers + memory.host_base == resident.base
    assert plan.host_memory - memory.host_save == resident.base  # one copy a node
    assert "copied from host memory" in report(plan)
    assert as_json(plan)["settings"]["base_device"] == "host"
    assert as_json(plan)["base_bytes_copied"] == plan.copied > 0
    with user_error("--base_device host"):
        place_base(replace(small, work=replace(small.work, adapter=None)), BaseDevice.HOST)
    assert not place_base(planner(Cluster(8)), BaseDevice.AUTO).work.base_on_host
