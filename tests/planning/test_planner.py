"""How a plan's figures follow from those of its model: on tiny models, in no time."""

from dataclasses import replace

from transformers import AutoConfig

from mora_ds.adapters.config import MoRAConfig
from mora_ds.engine.ds_config import complete_ds_config
from mora_ds.planning.plan import Cluster, Planner
from mora_ds.planning.step import Work
from tests.helpers.models import FAMILIES

ADAPTER = MoRAConfig(rank=4, operator="share")


def work(**changes):
    config = AutoConfig.for_model(
        "llama", **{**FAMILIES["llama"], "num_key_value_heads": 2, "num_hidden_layers": 1}
    )
    return replace(
        Work(config, ADAPTER, seq_len=32, micro_batch=2, by_documents=True), **changes
    )


def planner(cluster, **changes):
    completed = complete_ds_config(
        {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}, [1]
    )
    return Planner(work(**changes), cluster, completed)


def test_many_ranks_send_gradients_twice_in_place_of_loops():
    """7 matrices in the one layer."""
    few, many = (planner(Cluster(ranks)).plan() for ranks in (1024, 2048))
    assert few.trained.zero.get("reduce_scatter", True)
    assert not many.trained.zero["reduce_scatter"]
    assert few.sent == (few.gathered + few.reduced) * 1023 / 1024
    assert many.sent == (many.gathered + 2 * many.reduced) * 2047 / 2048


def test_a_node_has_one_base_and_the_offloaded_states_of_its_ranks():
    plan = planner(Cluster(16, per_node=4)).plan()
    memory = plan.memory
    assert plan.host_memory == memory.base + memory.host_save
    offloaded = replace(plan, memory=replace(memory, host_optimizer=1000))
    assert offloaded.host_memory == plan.host_memory + 4 * 1000


def test_a_planner_remembers_nothing_of_other_settings():
    gpu_planner = planner(Cluster(8))
    for changes in ({}, {"checkpointing": True}, {"micro_batch": 4}):
        assert gpu_planner.plan(**changes) == planner(Cluster(8)).plan(**changes)
