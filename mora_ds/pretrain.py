"""The main job, from settings to a summary: every room below is wired here, and only here.

    settings -> output folder -> tokenizer -> token caches -> base -> squares -> engine -> (resume) -> Trainer.run -> export
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mora_ds import files, zero
from mora_ds.arguments import AdapterKind, Arguments, dump
from mora_ds.checkpoint import TrainerState, find_checkpoint, load_checkpoint, save_checkpoint
from mora_ds.data import PackedDataset
from mora_ds.ds_config import compute_dtype, load_ds_config, resolve_ds_config
from mora_ds.engine import check_base_equal, initialize, initialize_full, start_distributed
from mora_ds.errors import UserError
from mora_ds.export import export_merged
from mora_ds.injection import InjectionReport, count_parameters, frozen_buffers, inject, mora_layers
from mora_ds.ledger import Ledger
from mora_ds.metrics import MetricsLog, peak_memory_bytes
from mora_ds.model import LoadedBase, create_base, load_base, resolve_folder
from mora_ds.ranks import Ranks
from mora_ds.remora import ReMoRA
from mora_ds.run_folder import claim, write_run_file
from mora_ds.saving import RunWriter, save_full_model
from mora_ds.trainer import LoopSettings, Trainer
from mora_ds.validation import validate


def pretrain(arguments: Arguments) -> dict[str, Any]:
    """Run the job that `arguments` describe, on this rank of all ranks. Returns the summary that `summary.json` holds.

    Raises `UserError` before anything expensive for what the user can mend, `RunError` for failures while running.
    """
    validate(arguments)
    start_distributed()
    return _Session(arguments, Ranks.current()).run()


@dataclass
class _Session:
    """One run's parts while they are put together."""

    arguments: Arguments
    ranks: Ranks
