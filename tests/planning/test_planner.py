"""A planner: how the figures of a plan follow from those of its model, and what it
recommends.
"""

from dataclasses import replace

from transformers import AutoConfig

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.layer import mora_layers
from mora_ds.engine.ds_config import complete_ds_config
from mora_ds.engine.settings import BaseDevice
from mora_ds.planning.plan import Cluster, Planner, place_base, recommend
from mora_ds.planning.report import as_json, report
from mora_ds.planning.step import Work, planned_model
from mora_ds.research.subspace import SubspaceConfig
from tests.helpers.errors import user_error
from tests.helpers.models import FAMILIES
from tests.helpers.tables import each_row


def planner_of(work, cluster, stage=3):
    settings = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    return Planner(work, cluster, complete_ds_config(settings, [1]))


# -- figures: a tiny model, in no time -------------------------------------------------


def tiny_planner(cluster, stage=3, adapter=None):
    shape = {**FAMILIES["llama"], "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = AutoConfig.for_model("llama", **shape)
    adapter = adapter or MoRAConfig(rank=4, operator="share")
    work = Work(config, adapter, seq_len=32, micro_batch=2, by_documents=True)
    return planner_of(work, cluster, stage)


def test_what_is_fixed_of_adapter_weights_is_saved_but_has_no_state():
    plan = tiny_planner(Cluster(2), adapter=SubspaceConfig(rank=1)).plan()
    fixed = 0
    for layer in mora_layers(planned_model(plan.work)).values():
        fixed += layer.spec.r_hat * (layer.spec.d_in + layer.spec.d_out)
    assert plan.memory.host_save == 4 * (plan.trained.total + fixed)
    assert plan.checkpoint == 4 * (4 * plan.trained.total + fixed)


SENT = """
3 | 1024 | 1
3 | 2048 | 2
2 | 8    | 2
2 | 2048 | 2
"""
"""ZeRO stage | ranks | how often a gradient is sent: twice where it is all-reduced, as many
ranks do in place of loops over 7 matrices, and DeepSpeed does under ZeRO-2 whatever
`reduce_scatter` says."""


@each_row("stage, ranks, times", SENT)
def test_bytes_that_a_rank_sends(stage, ranks, times):
    count = int(ranks)
    plan = tiny_planner(Cluster(count), int(stage)).plan()
    assert plan.trained.zero.get("reduce_scatter", True) == (count < 2048)
    sent = plan.gathered + int(times) * plan.reduced
    assert plan.sent == sent * (count - 1) / count


def test_a_node_has_one_base_and_the_offloaded_states_of_its_ranks():
    plan = tiny_planner(Cluster(16, per_node=4)).plan()
    memory = plan.memory
    assert plan.host_memory == memory.base + memory.host_save
    offloaded = replace(plan, memory=replace(memory, host_optimizer=1000))
    assert offloaded.host_memory == plan.host_memory + 4 * 1000
    few = replace(offloaded, cluster=Cluster(2, per_node=4))
    assert few.host_memory == plan.host_memory + 2 * 1000


def test_ranks_that_share_rows_read_fewer_tokens():
    plan = tiny_planner(Cluster(8)).plan()
    for group in ("tensor_parallel", "sequence_parallel"):
        grouped = replace(plan, work=replace(plan.work, **{group: 4}))
        assert plan.tokens == 4 * grouped.tokens > 0


def test_a_planner_remembers_nothing_of_other_settings():
    planner = tiny_planner(Cluster(8))
    for changes in ({}, {"checkpointing": True}, {"micro_batch": 4}):
        assert planner.plan(**changes) == tiny_planner(Cluster(8)).plan(**changes)


# -- recommendations: the layers of a 7B model -----------------------------------------

LAYERS_OF_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


def planner_of_7b(cluster):
    config = AutoConfig.for_model("llama", **LAYERS_OF_7B)
    return planner_of(Work(config, MoRAConfig(rank=8, operator="share"), 1024), cluster)


def test_a_recommendation_fits_and_the_next_size_does_not():
    planner = planner_of_7b(Cluster(8, memory=12e9))
    plan = recommend(planner)
    assert plan.fits
    next_size = {"micro_batch": 2 * plan.work.micro_batch}
    assert not planner.plan(checkpointing=plan.work.checkpointing, **next_size).fits


def test_little_memory_takes_checkpointing():
    assert recommend(planner_of_7b(Cluster(8, memory=4.4e9))).work.checkpointing


def test_a_base_that_does_not_fit_is_named():
    planner = planner_of_7b(Cluster(64, memory=2e9))
    assert recommend(planner) is None
    assert "the base alone" in report(planner.plan())
    assert "never sharded" in report(planner.plan())


def test_a_base_in_host_memory_leaves_a_device_two_layers_of_it():
    small = planner_of_7b(Cluster(64, memory=2.2e9))
    assert recommend(small) is None
    placed = place_base(small, BaseDevice.AUTO)
    assert placed.work.base_on_host
    assert place_base(small, BaseDevice.DEVICE) is small
    plan = recommend(placed)
    assert plan.fits
    memory = plan.memory
    resident = small.plan().memory
    assert memory.base - memory.base_buffers + memory.host_base == resident.base
    assert plan.host_memory - memory.host_save == resident.base  # one copy a node
    assert "copied from host memory" in report(plan)
    assert as_json(plan)["settings"]["base_device"] == "host"
    assert as_json(plan)["base_bytes_copied"] == plan.copied > 0
    with user_error("--base_device host"):
        place_base(
            replace(small, work=replace(small.work, adapter=None)), BaseDevice.HOST
        )
    assert not place_base(planner_of_7b(Cluster(8)), BaseDevice.AUTO).work.base_on_host
