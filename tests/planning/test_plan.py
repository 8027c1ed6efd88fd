"""Planned against done: what a micro-batch keeps, what a rank holds, what ZeRO-3
gathers.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch
from transformers import AutoConfig

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import frozen_buffers, inject
from mora_ds.adapters.ops import mora
from mora_ds.engine.ds_config import complete_ds_config
from mora_ds.engine.initialize import initialize
from mora_ds.engine.layer_prefetcher import names_on_host, prefetcher_of
from mora_ds.engine.traffic import CollectiveCounter
from mora_ds.models.attention import use_document_attention
from mora_ds.models.loss import chunk_loss, token_nll
from mora_ds.planning.memory_meter import MemoryMeter
from mora_ds.planning.plan import Cluster, Planner
from mora_ds.planning.step import (
    Work,
    measure_step,
    planned_model,
    step_memory,
    with_layers,
)
from tests.helpers.engines import state_tensors
from tests.helpers.gloo import run_ranks
from tests.helpers.models import FAMILIES, enable_checkpointing, tiny_model, tokens
from tests.helpers.operators import saved_bytes
from tests.helpers.pairwise import pairwise
from tests.helpers.tables import heavy

ROWS = 2
LENGTH = 64
ADAPTER = MoRAConfig(rank=8, operator="share")


def work_of(family, **changes):
    config = AutoConfig.for_model(family, **FAMILIES[family])
    return replace(Work(config, ADAPTER, LENGTH, ROWS, torch.float32), **changes)


def batch(packed=True):
    ids = tokens(ROWS, LENGTH)
    positions = torch.arange(LENGTH).expand(ROWS, -1) % (40 if packed else LENGTH)
    return {"input_ids": ids, "position_ids": positions.contiguous(), "labels": ids}


# -- activations -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("packed", [True, False])
def test_activations_are_those_that_autograd_saves(family, packed):
    """Each storage once, by another count than the plan's."""
    model = tiny_model(family).train()
    inject(model, ADAPTER)
    chunk_loss(model)
    rows = batch(packed)
    token_nll(model, rows).backward()  # tables are made
    its_own = (*model.parameters(), *model.buffers(), *rows.values())
    saved = saved_bytes(lambda: token_nll(model, rows), *its_own)
    planned_bytes = step_memory(work_of(family, document_mask=packed)).saved
    assert planned_bytes / 1.05 <= saved <= 1.05 * planned_bytes


@pairwise(
    {
        "family": ["llama", "gemma2", "gpt_neox", "gpt2", "mixtral"],
        "checkpointing": [False, True],
        "by_documents": [False, True],
    },
    lambda family, by_documents, **_: family != "mixtral" or not by_documents,
)
def test_a_meta_micro_batch_counts_like_a_real_one(
    monkeypatch, family, checkpointing, by_documents
):
    """Mixtral in bf16, which on the meta device is planned for a GPU's kernel of attention
    by documents.
    """
    as_on_a_cpu(monkeypatch)
    # Torch has no grouped product of fp32 shapes
    dtype = torch.bfloat16 if family == "mixtral" else torch.float32
    how = {"checkpointing": checkpointing, "by_documents": by_documents}
    compare(work_of(family, dtype=dtype, **how), family)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapted_experts_take_what_is_planned(monkeypatch, checkpointing):
    as_on_a_cpu(monkeypatch)
    adapter = replace(ADAPTER, target_modules=("all-linear", "experts"))
    compare(work_of("mixtral", checkpointing=checkpointing, adapter=adapter), "mixtral")


def as_on_a_cpu(monkeypatch):
    """Without a device sums go the way of a GPU: here planned and real ones take that of a
    CPU.
    """
    monkeypatch.setattr(mora, "on_cpu", lambda x: True)


def compare(work, family):
    """A planned micro-batch with a real one."""
    model = tiny_model(family, dtype=work.dtype).train()
    if work.by_documents:
        use_document_attention(model)
    if work.checkpointing:
        enable_checkpointing(model)
    inject(model, work.adapter)
    chunk_loss(model)
    rows = batch(packed=not work.by_documents)
    token_nll(model, rows).backward()
    for parameter in model.parameters():
        parameter.grad = None
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with MemoryMeter() as meter:
        loss = token_nll(model, rows)
        saved = meter.live
        loss.backward()
    planned = measure_step(planned_model(work), work)
    assert (planned.saved, planned.peak) == (saved, meter.peak)
    assert planned.tables > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_deep_models_are_measured_by_shallow_ones(checkpointing):
    """Layers that alternate between two kinds; more of them: test_step.py."""
    work = with_layers(work_of("gemma2", checkpointing=checkpointing), 2)
    work.config.num_hidden_layers = 7
    work.config.layer_types = (4 * ["sliding_attention", "full_attention"])[:7]
    assert step_memory(work) == measure_step(planned_model(work), work)


def test_ranks_that_share_work_keep_less():
    alone = work_of("llama", by_documents=True)
    alone.config.num_key_value_heads = 4
    saved = step_memory(alone).saved
    for degree in ("tensor_parallel", "sequence_parallel"):
        assert step_memory(replace(alone, **{degree: 2})).saved < 0.85 * saved


# -- a rank ----------------------------------------------------------------------------

SHAPE = {"num_hidden_layers": 8}
P = "stage3_param_persistence_threshold"
PREFETCH = "stage3_prefetch_bucket_size"
REUSE = "stage3_max_reuse_distance"
LIVE = "stage3_max_live_parameters"


@dataclass(frozen=True)
class Case:
    checkpointing: bool = False
    accumulation: int = 1
    zero: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    base_on_host: bool = False

    def deepspeed(self):
        return {
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_accumulation_steps": self.accumulation,
            "zero_optimization": {"stage": 3, **self.zero},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "bf16": {"enabled": self.dtype is torch.bfloat16},
        }


CASES = [
    Case(True, 1, {P: 600, REUSE: 0, LIVE: 12000, PREFETCH: 8000}),
    Case(False, 2, {P: 0, REUSE: 0, LIVE: 0}),
    Case(dtype=torch.bfloat16),
    Case(True, 1, {P: 600, REUSE: 20000, PREFETCH: 0}),
    Case(True, 2, base_on_host=True),
    Case(),
    Case(True, 2, {P: 0}),
]


def measured(case):
    """Counts of one step of this rank, the third micro-batch or a later one, and of
    what the engine holds after it."""
    model = tiny_model("llama", dtype=case.dtype, **SHAPE)
    if case.checkpointing:
        enable_checkpointing(model)
    inject(model, ADAPTER)
    chunk_loss(model)
    engine, optimizer, *_ = initialize(
        model=model, config=case.deepspeed(), base_on_host=case.base_on_host
    )
    prefetcher = prefetcher_of(model)
    copied = 0
    slots, on_host = (
        (prefetcher.slots, names_on_host(model)) if prefetcher else ([], set())
    )
    counter = CollectiveCounter([*frozen_buffers(model).values(), *slots])
    with counter.counting():
        # ZeRO-3 knows the order of modules from the third micro-batch on
        for _ in range(3):
            counter.reset()
            copied = prefetcher.copied if prefetcher else 0
            for _ in range(case.accumulation):
                engine.backward(token_nll(engine, batch()) / 100)
                engine.step()
    moments = [value for key, value in state_tensors(engine, 0) if key != "step"]
    master_weights = {
        tensor.untyped_storage().data_ptr(): tensor.nbytes
        for tensor in optimizer.fp32_partitioned_groups_flat
    }
    # An upgrade might share them in fp32
    master_weights.pop(optimizer.lp_param_buffer.untyped_storage().data_ptr(), None)
    frozen = frozen_buffers(model)
    on_device = [*slots, *(frozen[name] for name in frozen.keys() - on_host)]
    return {
        "gathered": counter.gathered_bytes,
        "reduced": counter.bytes["reduce_scatter_tensor"],
        "base_sent": counter.base_bytes,
        "base": sum({id(tensor): tensor.nbytes for tensor in on_device}.values()),
        "copied": prefetcher.copied - copied if prefetcher else 0,
        "trained": optimizer.lp_param_buffer.nbytes,
        "master_weights": sum(master_weights.values()),
        "moments": sum(tensor.nbytes for tensor in moments),
        "gradients": optimizer.grad_partitions_flat_buffer.nbytes,
        "bucket": sum(
            bucket.buffer.nbytes for bucket in optimizer.ipg_buckets.values()
        ),
    }


def all_measured(cases):
    return [measured(case) for case in cases]


def plan_for(ranks, case):
    how = {"checkpointing": case.checkpointing, "base_on_host": case.base_on_host}
    work = work_of("llama", dtype=case.dtype, **how)
    work.config.update(SHAPE)
    numels = [parameter.numel() for parameter in planned_model(work).parameters()]
    completed = complete_ds_config(case.deepspeed(), numels)
    planner = Planner(work, Cluster(ranks), completed, case.accumulation, on_cpu=True)
    return planner.plan()


def test_persistent_mora_matrices_are_gathered_after_the_optimizer_step():
    plan = plan_for(8, Case(zero={P: 100_000}))
    full = sum(plan.trained.numels) * 4
    assert plan.trained.persistent == plan.trained.numels
    assert plan.memory.optimizer_step == 2 * full, "with the gather's output buffer"
    # Three temporary tensors of a half
    sharded = plan_for(2, Case(zero={P: 0}))
    assert sharded.memory.optimizer_step == pytest.approx(1.5 * full, rel=1e-3)


@pytest.mark.parametrize("operator", ["rotate", "share"])
def test_a_split_plan_counts_its_tables_every_time(operator):
    adapter = replace(ADAPTER, operator=operator, compute="weight")
    work = work_of("llama", adapter=adapter, tensor_parallel=2)
    first, second = (measure_step(planned_model(work), work).tables for _ in range(2))
    assert first == second > 0


def assert_as_planned(plan, measured_bytes, case):
    exact_to = plan.gathered * 1e-3  # padding of what is gathered twice
    if REUSE in case.zero:
        exact_to += 2 * plan.trained.layer * plan.trained.bytes_each
    assert measured_bytes["gathered"] == pytest.approx(plan.gathered, abs=exact_to), (
        case
    )
    assert measured_bytes["base_sent"] == 0
    for name in ("reduced", "copied"):
        assert getattr(plan, name) == measured_bytes[name], (case, name)
    memory = plan.memory
    # With the rotary frequencies
    assert memory.base == pytest.approx(measured_bytes["base"], abs=1000), case
    for name in ("trained", "master_weights", "moments", "gradients", "bucket"):
        assert getattr(memory, name) == measured_bytes[name], (case, name)


@pytest.mark.parametrize(
    "ranks, cases",
    [(2, CASES[::3]), heavy(2, [*CASES[1::3], *CASES[2::3]]), heavy(4, CASES[4:6])],
)
def test_what_ranks_hold_and_gather_is_what_was_planned(ranks, cases):
    for rank_results in run_ranks(ranks, all_measured, cases):
        for case, result in zip(cases, rank_results, strict=True):
            assert_as_planned(plan_for(ranks, case), result, case)
