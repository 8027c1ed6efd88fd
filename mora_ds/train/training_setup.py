"""What a run trains: a model, prepared for its run, and the `TrainingRun` around its
engine.

--adapter NAME         a registered adapter (mora, lora, subspace) on a frozen base
                       config (targets) -> injection -> identity check -> engine -> Run
--adapter full         every parameter, under plain ZeRO
--adapter none         nothing; the base is only evaluated
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from mora_ds.adapters.config import FLAGS, AdapterConfig
from mora_ds.adapters.domains import domains_of
from mora_ds.adapters.inject import count_parameters, inject
from mora_ds.adapters.layer import mora_layers
from mora_ds.adapters.registry import Control
from mora_ds.checkpoint.layout import TOKENIZER_FOLDER
from mora_ds.checkpoint.sections import Section, full_sections
from mora_ds.checkpoint.state import TrainerState, check_identity, run_identity
from mora_ds.common.errors import named_as_flags
from mora_ds.common.files import JsonObject
from mora_ds.common.tensor_files import Tensors, dtype_name
from mora_ds.config.arguments import Arguments
from mora_ds.config.research import GRADIENT, WEIGHT, ResearchSettings
from mora_ds.engine.device import card_name, current_device
from mora_ds.engine.ds_config import compute_dtype
from mora_ds.engine.ds_keys import DsConfig
from mora_ds.engine.initialize import initialize, initialize_full
from mora_ds.engine.settings import BaseDevice
from mora_ds.models.attention import uses_document_attention
from mora_ds.models.load import LoadedBase, config_digest
from mora_ds.models.vocabulary import first_new_row
from mora_ds.parallel.tp_plan import tp_plan_of
from mora_ds.parallel.ulysses import bind_sequence_parallel, describe
from mora_ds.planning.utilization import peak_flops, token_flops
from mora_ds.train.data import RunData
from mora_ds.train.replica import Replica
from mora_ds.train.run import Run, RunOptions, TrainingRun
from mora_ds.train.setup import RunContext

if TYPE_CHECKING:
    from mora_ds.research.alignment import Alignment

logger = logging.getLogger(__name__)


class TrainingSetup:
    """A model with all that belongs to its run. All processes make it together.

    Making it prepares the model, starts the engine and, where `context.checkpoint` is
    set, resumes. Raises `UserError` for settings that do not fit the model or the
    checkpoint.
    """

    engine: Any
    """A DeepSpeed engine; the model itself where nothing is trained."""
    state: TrainerState
    """A new state, or that of the checkpoint which the run resumes from."""
    run: TrainingRun
    """Merges and checkpoints; there is none where nothing is trained."""
    trainable_parameters: int
    total_parameters: int
    alignment: Alignment | None = None
    """The alignment loss, where the block `research:` asks for it."""

    def __init__(
        self,
        arguments: Arguments,
        loaded: LoadedBase,
        ds_config: DsConfig,
        data: RunData,
        context: RunContext,
    ) -> None:
        self.arguments = arguments
        self.loaded = loaded
        self.ds_config = ds_config
        self.data = data
        self.context = context
        self.kind = arguments.adapter.adapter
        # What follows has collectives of its own, in which no rank may wait for one
        # that has failed to load.
        context.ranks.barrier("model, tokenizer and text are loaded")
        self.sequence = self._sequence_parallel()
        if self.kind == Control.NONE:
            self._start_evaluation()
        elif self.kind == Control.FULL:
            self._start_full_training()
        else:
            self._start_adapter()

    @property
    def is_trained(self) -> bool:
        return self.kind != Control.NONE

    def _sequence_parallel(self) -> Any:
        """The groups of ranks that split each sequence (--sequence_parallel_size), if
        there are any."""
        training = self.arguments.training
        size = training.sequence_parallel_size
        model = self.loaded.model
        sequence = bind_sequence_parallel(model, size, training.collective_timeout_s)
        if sequence is not None:
            logger.info(describe(model.config, size, self.data.train.seq_len))
        return sequence

    # -- the three kinds ---------------------------------------------------------------

    def _start_evaluation(self) -> None:
        """--adapter none."""
        self.engine = self.loaded.model
        self.state = TrainerState()
        self.trainable_parameters = 0
        self.total_parameters = count_parameters(self.engine)
        self.engine.to(current_device()).requires_grad_(False)

    def _start_full_training(self) -> None:
        """--adapter full."""
        model = self.loaded.model
        context = self.context
        self.trainable_parameters = self.total_parameters = count_parameters(model)
        self._count_flops()
        identity = {"adapter": {"kind": "full"}, **self._common_identity()}
        self._check_checkpoint(identity)
        context.ranks.barrier("start of the engine")
        self.engine, *_ = initialize_full(model=model, config=self.ds_config)
        self._seed_dropout()
        new_state = TrainerState(world_size=context.ranks.world, identity=identity)
        self.state = context.state or new_state
        self.run = TrainingRun(
            self.engine,
            context.folder,
            context.ranks,
            self.state,
            full_sections(self.engine, self.state),
            self.arguments.training.async_save,
        )
        if context.checkpoint is not None:
            self.run.checkpoints.load(context.checkpoint)

    @named_as_flags(**FLAGS)
    def _start_adapter(self) -> None:
        """--adapter with a registered adapter."""
        training = self.arguments.training
        context = self.context
        base = self.loaded.base
        self.config = self._planned_config()
        context.ranks.agree("injection of the adapter", self._inject, long=True)
        sections = self._research_sections()
        fingerprint = base.fingerprint(ranks=context.ranks)
        common = self._common_identity()
        self._check_checkpoint(run_identity(fingerprint, self.config, common))
        takes_gradient = self._research.sides == GRADIENT
        if takes_gradient:
            for layer in mora_layers(self.loaded.model).values():
                # No number until `start_cycle`, and the checks before compute with it
                layer.get_buffer("fixed").zero_()
        context.ranks.barrier("start of the engine")
        self.engine, *_ = initialize(
            model=self.loaded.model,
            config=self.ds_config,
            tensor_parallel_size=training.tensor_parallel_size,
            base_on_host=self._streams,
        )
        self._seed_dropout()
        options = RunOptions(
            keys=self.loaded.keys,
            identity=common,
            tokenizer_folder=context.folder / TOKENIZER_FOLDER,
            facts={
                "seq_len": self.data.train.seq_len,
                "document_start": self.arguments.data.document_start,
            },
            ranks=context.ranks,
            state=context.state,
            sections=sections,
            sides=self._gradient_sides if takes_gradient else None,
        )
        self.run = Run(
            self.engine,
            base=base,
            folder=context.folder,
            resume=context.checkpoint,
            overwrite=True,
            async_save=training.async_save,
            options=options,
        )
        self.state = self.run.state

    def start_cycle(self) -> None:
        """Give the first cycle what only a model that can be trained tells: its sides
        from the gradient. Collective."""
        if self._research.sides == GRADIENT:
            assert isinstance(self.run, Run), "only subspace has sides"
            self.run.set_fixed(self._gradient_sides())

    def remove_sums(self) -> None:
        """Delete what makes merges and resumes fast: the run is done."""
        if self.is_trained and isinstance(self.run, Run):
            self.run.remora.sums.remove()

    # -- their steps -------------------------------------------------------------------

    def _common_identity(self) -> JsonObject:
        """What a resumed run must share with its checkpoint, whatever it trains, to go
        on with the same batches and loss."""
        adapter = self.arguments.adapter
        training = self.arguments.training
        data = self.data
        by_documents = uses_document_attention(self.loaded.model)
        identity = {
            "model_config": config_digest(self.loaded.model.config),
            **data.train.identity,
            "seq_len": data.train.seq_len,
            "document_mask": self.arguments.data.document_mask,
            "seed": training.seed,
            "global_batch_size": training.global_batch_size(self.context.ranks.world),
            "merge_every": adapter.merge_every,
            "dtype": dtype_name(compute_dtype(self.ds_config)),
            "attention": "documents" if by_documents else "dense",
        }
        if training.has_muon:
            identity["optimizer"] = training.optimizer
        research = self._research
        if research.sides != WEIGHT:
            identity["sides"] = research.sides
        if research.alignment_weight:
            alignment = [research.alignment_weight, research.alignment_rank]
            identity["alignment"] = alignment
        if self.arguments.schedule.decay_from is not None:
            identity |= self.context.branch
        return identity

    def _check_checkpoint(self, identity: JsonObject) -> None:
        """Raise `UserError` where the checkpoint to resume from is another run's."""
        if self.context.checkpoint is not None and self.context.state is not None:
            check_identity(
                self.context.checkpoint, self.context.state.identity, identity
            )

    def _seed_dropout(self) -> None:
        """Give every replica dropout masks that no other has. A checkpoint that is
        resumed restores its random states afterwards."""
        training = self.arguments.training
        replica = self.context.ranks.rank // training.ranks_per_replica
        torch.manual_seed((training.seed << 16) + replica)

    @property
    def _streams(self) -> bool:
        """Whether the base stays in host memory."""
        return self.arguments.training.base_device == BaseDevice.HOST

    def _planned_config(self) -> AdapterConfig:
        """The adapter's config with what the block `research:` adds to it."""
        arguments = self.arguments
        loaded = self.loaded
        config = arguments.adapter.config(arguments.training.seed)
        if arguments.adapter.train_new_embeddings:
            config = replace(config, new_rows_from=first_new_row(loaded.base.folder))
        if not arguments.research:
            return config
        from mora_ds.research.targets import researched

        plan = self.context.targets
        if plan is not None:
            fingerprint = loaded.base.fingerprint(ranks=self.context.ranks)
            plan.check_base(loaded.base, fingerprint)
        return researched(config, arguments, plan)

    @property
    def _research(self) -> ResearchSettings:
        return ResearchSettings(**self.arguments.research)

    def _gradient_sides(self) -> Tensors:
        """Sides of the cycle that begins (research.sides). Collective."""
        from mora_ds.research.gradient_sides import SEQUENCES, gradient_sides

        training = self.arguments.training
        replica = Replica(self.engine, training.ranks_per_replica, self.sequence)
        rows = training.per_device_train_batch_size
        return gradient_sides(
            self.engine.module,
            lambda: replica.first_losses(self.data.train, SEQUENCES, rows),
            self.config.seed,
            self.context.ranks,
        )

    def _research_sections(self) -> list[Section]:
        """Give the model the alignment loss that the block `research:` asks for. Returns
        what checkpoints hold of it. Collective."""
        settings = self._research
        if not settings.alignment_weight:
            return []
        from mora_ds.research.alignment import (
            Alignment,
            AlignmentSection,
            leading_of_base,
        )

        loaded = self.loaded
        self.alignment = Alignment(loaded.model, settings.alignment_weight)
        if self.context.checkpoint is None:
            self.alignment.leading = leading_of_base(
                loaded.model,
                loaded.base,
                loaded.keys,
                settings.alignment_rank,
                self.context.ranks,
            )
        return [AlignmentSection(self.alignment)]

    def utilization(self, tokens_per_s: float) -> float | None:
        """The fraction of its GPUs' peak that `tokens_per_s` use, if that is
        known."""
        if self._peak_flops is None:
            return None
        return (
            tokens_per_s
            * self._token_flops
            / self.context.ranks.world
            / self._peak_flops
        )

    def _count_flops(self) -> None:
        """Count and log the model's FLOPs, where there is a GPU."""
        card = card_name()
        dtype = compute_dtype(self.ds_config)
        self._peak_flops = None if dtype == torch.float32 else peak_flops(card)
        if card:
            self._token_flops = token_flops(self.loaded.model, self.data.train.seq_len)
            peak = f"no MFU, as its peak in {dtype_name(dtype)} is not known"
            if self._peak_flops is not None:
                peak = f"at most {self._peak_flops / 1e12:.0f} TFLOP/s"
            a_token = f"{self._token_flops / 1e9:,.2f} G a token"
            logger.info(f"model FLOPs: {a_token}; {card}: {peak}")

    def _inject(self) -> None:
        """Put the adapter into the model, and log what it costs."""
        training = self.arguments.training
        model = self.loaded.model
        base = self.loaded.base
        keys = self.loaded.keys
        device = torch.device("cpu") if self._streams else current_device()
        report = inject(
            model, self.config, lambda name: base.read(keys[name]).to(device)
        )
        self.trainable_parameters = report.trainable_params
        self.total_parameters = report.total_params
        logger.debug(report)
        if names := domains_of(model).names:
            logger.info(
                f"{len(names)} domains, each with its own MoRA matrix in every layer: {', '.join(names)}"
            )
        self._count_flops()
        degree = training.tensor_parallel_size
        if degree > 1:
            logger.debug(tp_plan_of(model, degree))
