"""What every job begins with: its processes, its DeepSpeed config, and the place where it runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from mora_ds.checkpoint.state import TrainerState
from mora_ds.common.untrusted import expanded
from mora_ds.config.adapter import AdapterKind
from mora_ds.config.arguments import Arguments
from mora_ds.config.training import TrainingArguments
from mora_ds.engine.device import make_deterministic, warn_of_slow_precision
from mora_ds.engine.ds_config import compute_dtype, resolve_ds_config
from mora_ds.engine.initialize import (
    check_compute_dtype,
    check_second_copies,
    check_splittable,
    start_distributed,
)
from mora_ds.parallel.limits import check_world
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.agreement import check_settings
from mora_ds.train.hooks import Hooks


@dataclass(frozen=True)
class Place:
    """Where a run happens, and what it starts from."""

    ranks: Ranks
    folder: Path
    """The run's folder, which all ranks see."""
    checkpoint: Path | None
    """The checkpoint that the run resumes from."""
    state: TrainerState | None
    """Its state, which the run goes on with; None without a checkpoint."""
    hooks: Hooks
    """What the run does besides MoRA."""


def start_processes(arguments: Arguments) -> Ranks:
    """Join the process group and compare the settings of all ranks. Raises `UserError` where they differ.

    Without a terminal, and on ranks other than 0, transformers shows no progress bars.
    """
    training = arguments.training
    if training.deterministic:
        make_deterministic()
    start_distributed(timeout_s=training.collective_timeout_s)
    ranks = Ranks.current(training.collective_timeout_s)
    check_settings(arguments, ranks)
    if not (ranks.is_first and sys.stderr.isatty()):
        disable_progress_bar()
    return ranks


def engine_config(training: TrainingArguments, adapter: str, world: int) -> dict[str, Any]:
    """The DeepSpeed config for `world` processes, complete but for ZeRO's bucket sizes.

    Raises `UserError` for groups of processes that do not fill the world, and a DeepSpeed file that contradicts flags.
    """
    check_world(world, training.tensor_parallel_size, training.sequence_parallel_size)
    settings = training.engine_settings()
    if adapter == AdapterKind.FULL.value:
        settings = replace(settings, tensor_parallel_size=None)
    file = None if training.deepspeed is None else expanded(training.deepspeed, "--deepspeed")
    config = resolve_ds_config(file, settings, world // training.ranks_per_replica)
    check_compute_dtype(config)
    warn_of_slow_precision(compute_dtype(config))
    check_splittable(config, training.tensor_parallel_size)
    check_second_copies(config, world, training.tensor_parallel_size)
    if training.sequence_parallel_size > 1:
        config.pop("train_batch_size")  # checked above; DeepSpeed, which knows no groups, would count each rank's rows
    return config
