"""Which plan is recommended, and how a plan's figures follow from those of its model: on tiny models, in no time."""

from dataclasses import replace
from typing import Any

from transformers import AutoConfig

from mora_ds.adapters.config import LoRAConfig, MoRAConfig
from mora_ds.engine.ds_config import complete_ds_config
from mora_ds.planning.costs import group_traffic
from mora_ds.planning.plan import Cluster, Planner, _group_sizes
from mora_ds.planning.report import report, verdict
from mora_ds.planning.step import Work, planned_model
from tests.helpers.models import FAMILIES

ADAPTER = MoRAConfig(rank=4, operator="share")


def work(**changes: Any) -> Work:
    config = AutoConfig.for_model("llama", **{**FAMILIES["llama"], "num_key_value_heads": 2, "num_hidden_layers": 1})
    return replace(Work(config, ADAPTER, seq_len=32, micro_batch=2, by_documents=True), **changes)


def planner(cluster: Cluster, accumulation: int = 1, on_cpu: bool = False, **changes: Any) -> Planner:
    completed = complete_ds_config({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}, [1])
    return Planner(work(**changes), cluster, completed, accumulation, on_cpu)


# -- a recommendation --------------------------------------------------------------------------------------------------


def groups(ranks: int = 8, per_node: int = 8, optimizer: str = "AdamW", **changes: Any) -> list[tuple[int, int]]:
    of_cluster = planner(Cluster(ranks, per_node), **changes)
    of_cluster.ds_config = {**of_cluster.ds_config, "optimizer": {"type": optimizer}}
    return list(_group_sizes(of_cluster))


def test_groups_are_those_that_heads_tokens_and_a_node_can_share():
    everything = [(1, 1), (1, 2), (2, 1), (1, 4)]
    assert groups() == everything
    assert groups(6) == everything[:3], "4 ranks do not divide 6"
    assert groups(per_node=2) == everything[:3]
    assert groups(seq_len=34) == everything[:3], "nor 4 the tokens of a row"
    unsplit = [group for group in everything if group[0] == 1]
    fields: tuple[dict[str, Any], ...] = ({"base_bits": 8}, {"target_modules": ("experts",)}, {"dropout": 0.1})
    for adapter in (None, LoRAConfig(rank=4), *(replace(ADAPTER, **values) for values in fields)):
        assert groups(adapter=adapter) == unsplit, "a run refuses it"
    assert groups(optimizer="Muon") == groups(base_on_host=True) == unsplit
    assert groups(by_documents=False) == [(1, 1), (2, 1)], "masks are not split"
    odd = work()
    odd.config.num_key_value_heads = 3
    assert groups(config=odd.config) == [(1, 1)]


# -- figures of a plan -------------------------------------------------------------------------------------------------


def test_what_is_sent_in_a_step_is_that_of_all_its_micro_batches():
    plan = planner(Cluster(4), accumulation=3, tensor_parallel=2).plan()
    in_group = sum(collective.wire for collective in group_traffic(planned_model(work()), 2, plan.work.tokens))
    assert in_group > 0
    assert plan.sent == (plan.gathered + plan.reduced) / 2 + in_group * 2 * 3
    assert f"{2 * 3 * 2 * 32:,} tokens a step" in report(plan)
    assert plan.passes == plan.gathered / (2 * plan.trained.total)


def test_many_ranks_send_gradients_twice_in_place_of_loops():
    """7 matrices in the one layer."""
    few, many = (planner(Cluster(ranks)).plan() for ranks in (1024, 2048))
    assert few.trained.zero.get("reduce_scatter", True)
    assert not many.trained.zero["reduce_scatter"]
    assert few.sent == (few.gathered + few.reduced) * 1023 / 1024
    assert many.sent == (many.gathered + 2 * many.reduced) * 2047 / 2048


def test_a_trained_head_makes_all_logits_at_once():
    plan = planner(Cluster(1), adapter=None).plan()
    assert plan.memory.logits == 2 * 32 * plan.work.config.vocab_size * 2


def test_a_node_of_cpus_has_one_base():
    plan = planner(Cluster(16, per_node=4), on_cpu=True).plan()
    memory = plan.memory
    beside_the_base = memory.peak - memory.base
    assert memory.logits == 0
    assert plan.host_memory == memory.base + 4 * beside_the_base + memory.host_save
    assert "a node needs" in verdict(plan)
    on_gpus = replace(plan, trained=replace(plan.trained, on_cpu=False))
    assert on_gpus.host_memory == memory.base + memory.host_save
    offloaded = replace(on_gpus, memory=replace(memory, host_optimizer=1000))
    assert offloaded.host_memory == on_gpus.host_memory + 4 * 1000


def test_a_planner_remembers_nothing_of_other_settings():
    gpu_planner = planner(Cluster(8))
    for changes in ({}, {"checkpointing": True}, {"sequence_parallel": 2}):
        assert gpu_planner.plan(**changes) == planner(Cluster(8)).plan(**changes)
