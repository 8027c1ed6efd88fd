"""--dry_run: what each process would compute, store and send.

It comes from the flags and the model's config alone, reads no weights and no text, and
writes no file. Every process may call it, and needs no other; rank 0 prints.
"""

import os
from dataclasses import replace
from typing import Any

from mora_ds.adapters.config import FLAGS, AdapterConfig
from mora_ds.adapters.inject import inject
from mora_ds.adapters.registry import Control
from mora_ds.common.errors import UserError, named_as_flags
from mora_ds.common.fetched import local
from mora_ds.config.arguments import Arguments
from mora_ds.config.data import ModelArguments
from mora_ds.engine import device
from mora_ds.engine.ds_config import compute_dtype
from mora_ds.engine.ds_keys import DsConfig
from mora_ds.engine.settings import BaseDevice
from mora_ds.models.attention import NAME, why_dense
from mora_ds.models.base import MODEL_FLAG
from mora_ds.models.load import CONFIGS, named_config, set_rope
from mora_ds.models.vocabulary import first_new_row
from mora_ds.parallel.tp_plan import tp_plan_of
from mora_ds.parallel.ulysses import check_config, describe
from mora_ds.planning.plan import Cluster, Plan, Planner, place_base
from mora_ds.planning.report import cost_lines, report
from mora_ds.planning.step import Work, planned_model
from mora_ds.runtime.cli import say
from mora_ds.runtime.log_setup import rank
from mora_ds.train.setup import engine_config
from mora_ds.train.trackers import check_destinations


def dry_run(arguments: Arguments) -> None:
    """Print the plan of a run that `validate` has passed, on rank 0.

    Raises `UserError` for what the flags and the model's config show to be wrong.
    """
    check_destinations(arguments.training)
    plan, layers = planned(arguments, int(os.environ.get("WORLD_SIZE", "1")))
    if rank() == 0:
        costs = cost_lines(plan, arguments.training.max_steps)
        say(*layers, report(plan), *costs)
        folder = arguments.training.output_dir
        say(f"dry run: nothing was trained, {folder} is unchanged")


def planned(arguments: Arguments, world: int) -> tuple[Plan, list[str]]:
    """The plan, and the lines about the adapted layers with which the run would
    start."""
    adapter = arguments.adapter
    training = arguments.training
    model = arguments.model
    ds_config = engine_config(training, adapter.adapter, world)
    name, flag = _model_of(arguments)
    config = named_config(name, model.trust_remote_code, flag)
    set_rope(config, model.rope, model.trust_remote_code)
    planner = planner_of(arguments, config, ds_config, world)
    base_device = BaseDevice(training.base_device)
    if base_device is not BaseDevice.AUTO or not device.is_cpu():
        planner = place_base(planner, base_device)
    return planner.plan(), _layer_lines(planner.work)


def _model_of(arguments: Arguments) -> tuple[str, str]:
    """The folder, Hub name or config.json of the model, and the flag that names it."""
    model = arguments.model
    if model.model_name_or_path:
        return model.model_name_or_path, MODEL_FLAG
    if model.model_config is None:
        raise UserError(
            f"--dry_run plans the run of a model: name one with {MODEL_FLAG} or --model_config"
        )
    return model.model_config, "--model_config"


def implementation_of(model: ModelArguments, config: Any) -> str | None:
    """The name of the attention with which a run on this config computes; None for
    transformers' default."""
    if model.implementation is None and why_dense(config, None) is None:
        return NAME
    return model.implementation


def planner_of(
    arguments: Arguments, config: Any, ds_config: DsConfig, world: int
) -> Planner:
    """Plans of a run on devices of this machine's kind, with its base on them.
    `config`: of the model. Raises `UserError` for a run that trains nothing, and for
    rows that cannot be split."""
    training = arguments.training
    model = arguments.model
    check_config(config, training.sequence_parallel_size, model.implementation)
    if arguments.adapter.adapter == Control.NONE:
        raise UserError("--adapter none trains nothing: there is nothing to plan")
    work = Work(
        config=config,
        adapter=_adapter_config(arguments),
        seq_len=arguments.data.seq_len,
        micro_batch=training.per_device_train_batch_size,
        dtype=compute_dtype(ds_config),
        checkpointing=training.gradient_checkpointing,
        tensor_parallel=training.tensor_parallel_size,
        sequence_parallel=training.sequence_parallel_size,
        document_mask=arguments.data.document_mask,
        attn_implementation=model.implementation,
        by_documents=implementation_of(model, config) == NAME,
        trust_remote_code=model.trust_remote_code,
    )
    local = int(
        os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world
    )
    cluster = Cluster(world, local, device.memory_bytes())
    micro_batches = training.gradient_accumulation_steps
    return Planner(work, cluster, ds_config, micro_batches, device.is_cpu())


def _adapter_config(arguments: Arguments) -> AdapterConfig | None:
    """None for full training."""
    adapter = arguments.adapter
    if adapter.adapter == Control.FULL:
        return None
    config = adapter.config(arguments.training.seed)
    if arguments.research:
        from mora_ds.research.targets import researched, target_plan_of

        # Fingerprints are not compared, since that would read every weight
        config = researched(config, arguments, target_plan_of(arguments))
    if not adapter.train_new_embeddings:
        return config
    path = local(_model_of(arguments)[0], MODEL_FLAG, CONFIGS)
    folder = path if path.is_dir() else path.parent
    return replace(config, new_rows_from=first_new_row(folder))


@named_as_flags(**FLAGS)
def _layer_lines(work: Work) -> list[str]:
    """MoRA matrices, splits and products, as at the start of a run."""
    if work.adapter is None:
        return ["full training: every parameter is trained, sharded by ZeRO"]
    model = planned_model(replace(work, adapter=None, tensor_parallel=1))
    lines = [str(inject(model, work.adapter))]
    if work.sequence_parallel > 1:
        lines.append(describe(work.config, work.sequence_parallel, work.seq_len))
    if work.tensor_parallel > 1:
        lines.append(str(tp_plan_of(model, work.tensor_parallel)))
    return lines
