"""--dry_run: what each rank would compute, store and send, from the flags and the model's config; no weights are read.

Every rank may call it; one prints. No process group is started, no folder is touched, no text is looked at.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mora_ds.adapters.alignment import factor_bytes
from mora_ds.adapters.config import AdapterConfig, MoRAConfig
from mora_ds.adapters.domains import frozen_values
from mora_ds.adapters.inject import inject
from mora_ds.adapters.tp_plan import plan_of
from mora_ds.config.adapter import AdapterKind
from mora_ds.config.arguments import Arguments
from mora_ds.config.domains import adapter_config
from mora_ds.engine import device
from mora_ds.engine.ds_config import compute_dtype, resolve_ds_config
from mora_ds.engine.ds_optimizer import OptimizerKind
from mora_ds.engine.initialize import check_compute_dtype, check_splittable
from mora_ds.errors import UserError
from mora_ds.models.load import named_config
from mora_ds.models.vocabulary import first_new_row
from mora_ds.parallel.topology import check_degree
from mora_ds.parallel.ulysses_checks import check_config, check_world, describe
from mora_ds.planning.costs import costs
from mora_ds.planning.plan import Plan, Planner
from mora_ds.planning.report import report
from mora_ds.planning.step import Work, planned_model
from mora_ds.planning.timing import Cluster
from mora_ds.train.targets import planned_config
from mora_ds.train.vectors import check_alignment_rank


def dry_run(arguments: Arguments) -> dict[str, Any]:
    """Print the plan of a run that `validate` has passed, on the first rank. Returns what `pretrain` would of a run of
    no steps. Raises `UserError` for what the config and the flags tell to be wrong."""
    plan, told = planned(arguments, int(os.environ.get("WORLD_SIZE", "1")))
    if int(os.environ.get("RANK", "0")) == 0:
        print(*told, report(plan, timed=False), sep="\n")
        print(f"dry run: nothing trained, {Path(arguments.training.output_dir)} is as it was")
    trained = plan.trained.whole * plan.work.tensor_parallel
    kept = 0 if plan.work.adapter is None else sum(v.numel() for v in frozen_values(planned_model(plan.work)).values())
    return {"steps": 0, "trainable_params": trained, "total_params": plan.base_elements + trained + kept}


def planned(arguments: Arguments, world: int) -> tuple[Plan, list[str]]:
    """The plan, and what the start of the run would say about its layers."""
    training, model = arguments.training, arguments.model
    t, s = training.tensor_parallel_size, training.sequence_parallel_size
    check_world(s, world)
    check_degree(t, world)
    path = None if training.deepspeed is None else Path(training.deepspeed).expanduser()
    ds_config = resolve_ds_config(path, training.engine_settings(), world // training.ranks_per_replica)
    check_compute_dtype(ds_config)
    if t > 1:
        check_splittable(ds_config)
    config = named_config(str(model.model_name_or_path or model.model_config), model.trust_remote_code)
    check_config(config, s, model.attention, model.trust_remote_code)
    if arguments.adapter.adapter == AdapterKind.NONE.value:
        raise UserError("--adapter none trains nothing: there is nothing to plan, drop --dry_run")
    work = Work(
        config=config,
        adapter=_adapter(arguments),
        seq_len=arguments.data.seq_len,
        micro_batch=training.per_device_train_batch_size,
        dtype=getattr(torch, compute_dtype(ds_config)),
        checkpointing=training.gradient_checkpointing,
        tensor_parallel=t,
        sequence_parallel=s,
        document_mask=arguments.data.document_mask,
        attn_implementation=model.attention,
        trust_remote_code=model.trust_remote_code,
    )
    on_cpu = device.is_cpu()
    planner = Planner(work, _cluster(world), ds_config, training.gradient_accumulation_steps, on_cpu)
    told = _layers(work, world)
    if arguments.adapter.alignment_weight:
        told.append(_alignment(work, arguments.adapter.alignment_rank))
    return planner.plan(), told


def _alignment(work: Work, rank: int) -> str:
    model = planned_model(replace(work, adapter=None, tensor_parallel=1))
    assert isinstance(work.adapter, MoRAConfig)
    check_alignment_rank(model, work.adapter, rank)
    inject(model, work.adapter)
    return (
        f"--alignment_weight: {factor_bytes(model, rank) / 1e6:,.2f} MB of factors on each rank, "
        "which the figures below do not have in them"
    )


def _adapter(arguments: Arguments) -> AdapterConfig | None:
    """None for full training."""
    adapter, seed = arguments.adapter, arguments.training.seed
    if adapter.adapter == AdapterKind.FULL.value:
        return None
    if adapter.domain_adapters and arguments.training.optimizer == OptimizerKind.MUON.value:
        raise UserError("--dry_run does not know what Muon keeps beside the domains' squares: plan it with adamw")
    model = str(arguments.model.model_name_or_path or arguments.model.model_config)
    config = adapter_config(adapter, arguments.data, seed)
    config = planned_config(adapter, config, model, arguments.model.trust_remote_code)
    if not adapter.train_new_embeddings:
        return config
    named = Path(model).expanduser()
    return replace(config, new_rows_from=first_new_row(named if named.is_dir() else named.parent))


def _cluster(world: int) -> Cluster:
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world)
    return Cluster(world, local, device.memory_bytes())


def _layers(work: Work, world: int) -> list[str]:
    """Squares, splits and products, as the start of a run tells them."""
    if work.adapter is None:
        return ["full training, the control: every parameter, sharded by ZeRO as ever"]
    model = planned_model(Work(work.config, None, work.seq_len, dtype=work.dtype))
    told = [str(inject(model, work.adapter))]
    if work.sequence_parallel > 1:
        told.append(describe(work.config, work.sequence_parallel, work.seq_len))
    if work.tensor_parallel > 1:
        told.append(str(plan_of(model, work.tensor_parallel)))
    return [*told, str(costs(model, work.tensor_parallel, world // work.tensor_parallel, work.tokens))]
