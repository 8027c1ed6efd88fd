"""The three kinds of job behind one interface: what is trained, saved and exported.

AdapterJob   --adapter mora, lora: MoRA matrices or LoRA factors on a frozen base (`adapter_job`)
FullJob      --adapter full: every parameter, under plain ZeRO
BareJob      --adapter none: nothing; the base is only evaluated
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mora_ds.adapters.inject import count_parameters
from mora_ds.checkpoint.contents import save_full_model
from mora_ds.checkpoint.layout import CHECKPOINTS
from mora_ds.checkpoint.state import TrainerState, check_identity
from mora_ds.checkpoint.writer import CheckpointWriter, load_checkpoint
from mora_ds.config.arguments import Arguments
from mora_ds.engine.device import current_device
from mora_ds.engine.ds_config import compute_dtype, fill_bucket_sizes
from mora_ds.engine.initialize import initialize_full
from mora_ds.models.attention import attends_by_documents
from mora_ds.models.load import LoadedBase, config_digest
from mora_ds.parallel.ulysses import share_rows
from mora_ds.parallel.ulysses_checks import describe
from mora_ds.remora.merge import MergeReport
from mora_ds.train.data import RunData
from mora_ds.train.setup import Place

logger = logging.getLogger(__name__)


class Job(ABC):
    """An engine, its state, and how both are saved and exported. All processes make it, and call it, together."""

    is_trained = True
    """Whether there is anything to train; a job without is evaluated."""
    engine: Any
    """A DeepSpeed engine; the model itself for `BareJob`."""
    state: TrainerState
    """A new state, or that of the checkpoint which the run resumes from."""
    checkpoints: CheckpointWriter
    """Not of a job that is only evaluated."""
    trainable_parameters: int
    total_parameters: int

    def __init__(
        self, arguments: Arguments, loaded: LoadedBase, ds_config: dict[str, Any], data: RunData, place: Place
    ) -> None:
        self.arguments, self.loaded, self.ds_config, self.data, self.place = arguments, loaded, ds_config, data, place
        training = arguments.training
        place.ranks.barrier("model, tokenizer and text are loaded")  # what follows has collectives of its own
        self.sequence = share_rows(loaded.model, training.sequence_parallel_size, training.collective_timeout_s)
        if self.sequence is not None:
            logger.info(describe(loaded.model.config, training.sequence_parallel_size, data.train.seq_len))
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Prepare the model, start the engine and, where `place.checkpoint` is set, resume.

        Sets the attributes above. Raises `UserError` for settings that do not fit the model or the checkpoint.
        """

    def merge(self, step: int, probe: Callable[[], float]) -> MergeReport:
        """Merge the adapter into the base, and note the step in the state; as `Run.merge`."""
        raise AssertionError("there is nothing to merge")

    def save(self) -> Path:
        """Write a checkpoint and return its folder; with --async_save it is complete only later. Raises `RunError` as
        `check_base` does."""
        self.check_base()
        return self.checkpoints.save(self.state, self.arguments.training.save_total_limit)

    def check_base(self) -> None:
        """Raise `BaseChanged`, on all processes, when files have changed from which live weights are read. Here none
        are: training copies them, and an evaluation is short."""
        return None

    def changed_base_files(self) -> list[Path]:
        """Files that `check_base` would have to read again on this process. Not collective."""
        return []

    def export(self, checkpoint: Path, target: Path) -> None:
        """Write the merged model of a checkpoint into the folder `target`."""
        raise AssertionError("there is nothing to export")

    @property
    def base_tensors(self) -> Mapping[str, Tensor]:
        """The frozen weights, none of which may be communicated."""
        return {}

    @property
    def split(self) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        """Takes a batch, returns the tokens of each row that this process computes (--sequence_parallel_size)."""
        return (lambda batch: batch) if self.sequence is None else self.sequence.split

    def common_identity(self) -> dict[str, Any]:
        """What a resumed run must share with its checkpoint, whatever kind of job, to continue its batches and loss."""
        adapter, training, data = self.arguments.adapter, self.arguments.training, self.data
        return {
            "model_config": config_digest(self.loaded.model.config),
            **data.train.identity,
            "seq_len": data.train.seq_len,
            "document_mask": self.arguments.data.document_mask,
            "seed": training.seed,
            "global_batch_size": training.rows_per_step(self.place.ranks.world),
            "merge_every": adapter.merge_every,
            **self.place.hooks.identity(),
            "dtype": compute_dtype(self.ds_config),
            "attention": "documents" if attends_by_documents(self.loaded.model) else "dense",
            **({"optimizer": training.optimizer} if training.optimizer != "adamw" else {}),
        }

    def check_checkpoint(self, identity: dict[str, Any]) -> None:
        """Raise `UserError` where the checkpoint to resume from is another run's."""
        if self.place.checkpoint is not None and self.place.state is not None:
            check_identity(self.place.checkpoint, self.place.state.identity, identity)

    def seed_dropout(self) -> None:
        """Give every replica its own dropout masks; a checkpoint restores its random states afterwards."""
        training = self.arguments.training
        torch.manual_seed((training.seed << 16) + self.place.ranks.rank // training.ranks_per_replica)


class BareJob(Job):
    """The base as it is, to be evaluated (--adapter none)."""

    is_trained = False

    def prepare(self) -> None:
        self.engine, self.state = self.loaded.model, TrainerState()
        self.trainable_parameters, self.total_parameters = 0, count_parameters(self.engine)
        logger.info(f"nothing is trained: all {self.total_parameters:,} parameters stay as they are")
        self.engine.to(current_device()).requires_grad_(False)


class FullJob(Job):
    """Training of every parameter under plain ZeRO (--adapter full)."""

    def prepare(self) -> None:
        model, place = self.loaded.model, self.place
        self.trainable_parameters = self.total_parameters = count_parameters(model)
        logger.info(f"full training: all {self.total_parameters:,} parameters are trained, sharded by ZeRO")
        identity = {"adapter": {"kind": "full"}, **self.common_identity()}
        self.check_checkpoint(identity)
        ds_config = fill_bucket_sizes(self.ds_config, [parameter.numel() for parameter in model.parameters()])
        place.ranks.barrier("start of the engine")
        self.engine, *_ = initialize_full(model=model, config=ds_config)
        self.seed_dropout()
        self.state = place.state or TrainerState(world_size=place.ranks.world, identity=identity)
        if place.checkpoint is not None:
            load_checkpoint(place.checkpoint, self.engine, self.state)
        background = self.arguments.training.async_save
        self.checkpoints = CheckpointWriter(
            place.folder / CHECKPOINTS, self.engine, lambda step: lambda folder: None, background, place.ranks
        )

    def export(self, checkpoint: Path, target: Path) -> None:
        """Write the live model, which is the one of `checkpoint`."""
        save_full_model(self.engine, target, self.data.tokenizer)
