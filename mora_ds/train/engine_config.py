"""The DeepSpeed config of a job, from --deepspeed and the flags, with every check that needs no model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mora_ds.config.adapter import AdapterKind
from mora_ds.config.training import TrainingArguments
from mora_ds.engine.ds_config import resolve_ds_config
from mora_ds.engine.initialize import check_compute_dtype, check_splittable
from mora_ds.parallel.topology import check_degree
from mora_ds.parallel.ulysses_checks import check_world


def engine_config(training: TrainingArguments, adapter: str, world: int) -> dict[str, Any]:
    """The config for `world` processes, complete but for ZeRO's bucket sizes.

    Raises `UserError` for groups of processes that do not fill the world, and a DeepSpeed file that contradicts flags.
    """
    check_world(training.sequence_parallel_size, world)
    check_degree(training.tensor_parallel_size, world)
    settings = training.engine_settings()
    if adapter == AdapterKind.FULL.value:
        settings = replace(settings, tensor_parallel_size=None)
    file = None if training.deepspeed is None else Path(training.deepspeed).expanduser()
    config = resolve_ds_config(file, settings, world // training.ranks_per_replica)
    check_compute_dtype(config)
    if training.tensor_parallel_size > 1:
        check_splittable(config)
    if training.sequence_parallel_size > 1:
        config.pop("train_batch_size")  # checked above; DeepSpeed, which knows no groups, would count each rank's rows
    return config
