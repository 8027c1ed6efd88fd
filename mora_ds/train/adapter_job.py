"""Training of an adapter: MoRA matrices or LoRA factors are trained and merged, the base is frozen.

adapter config (targets, singular vectors) -> injection -> identity check -> engine -> Run (merge ledger, checkpoints)
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mora_ds.adapters.config import AdapterConfig, MoRAConfig
from mora_ds.adapters.inject import frozen_buffers, inject, mora_layers
from mora_ds.adapters.layer import MoRALinear
from mora_ds.adapters.tp_plan import plan_of
from mora_ds.checkpoint.contents import PROBE_TOKENS
from mora_ds.checkpoint.state import run_identity
from mora_ds.deploy.export import export_merged
from mora_ds.engine.base_device import BaseDevice
from mora_ds.engine.base_ring import ring_of
from mora_ds.engine.device import current_device
from mora_ds.engine.ds_config import fill_bucket_sizes
from mora_ds.engine.initialize import initialize, trainable_numels
from mora_ds.models.node_base import node_base_of
from mora_ds.models.vocabulary import first_new_row
from mora_ds.planning.costs import costs
from mora_ds.remora.merge import MergeReport
from mora_ds.remora.optimizer_reset import OptimizerReset
from mora_ds.train.job import Job
from mora_ds.train.run import Run, RunDetails
from mora_ds.train.vectors import FOLDER as VECTORS_FOLDER
from mora_ds.train.vectors import prepare_vectors, wanted_vectors

logger = logging.getLogger(__name__)


class AdapterJob(Job):
    """An adapter on a frozen base (--adapter mora, lora)."""

    def prepare(self) -> None:
        training = self.arguments.training
        self.config = self._with_vectors(self._planned_config())
        self.place.ranks.agree("injection of the adapter", self._inject, long=True)
        fingerprint = self.loaded.base.fingerprint(ranks=self.place.ranks)
        common = self.common_identity()
        self.check_checkpoint(run_identity(fingerprint, self.config, common))
        if self.place.checkpoint is None:
            self.place.hooks.fit(self.loaded.model, fingerprint, self.place.ranks)
        degree = training.tensor_parallel_size
        self.place.ranks.barrier("start of the engine")
        self.engine, *_ = initialize(
            model=self.loaded.model,
            config=fill_bucket_sizes(self.ds_config, trainable_numels(self.loaded.model, degree)),
            tensor_parallel_size=degree,
            base_on_host=self._streams,
            node_base=self.arguments.model.node_base,
        )
        if text := node_base_of(self.loaded.model).text:
            logger.info(text)
        self.seed_dropout()
        self.run = self._open_run(common)
        self.state = self.run.state
        self.checkpoints = self.run.checkpoints
        tokens = training.per_device_train_batch_size * self.data.train.seq_len // training.sequence_parallel_size
        self._log_paths(tokens, self.state.micro_batch_tokens)
        self.state.micro_batch_tokens = tokens
        if self.place.checkpoint is None:
            self.place.hooks.begin(self.engine)

    def merge(self, step: int, probe: Callable[[], float]) -> MergeReport:
        return self.run.merge(step, probe)

    def check_base(self) -> None:
        self.run.check_base()

    def changed_base_files(self) -> list[Path]:
        return self.loaded.base.changed_files()

    def export(self, checkpoint: Path, target: Path) -> None:
        """Write the merged model, or each of those that the hooks name, in a folder of its name."""
        variants = self.place.hooks.variants

        def export() -> None:
            if not variants:
                export_merged(checkpoint, target, overwrite=True)
            for variant in variants:
                export_merged(checkpoint, target / variant, overwrite=True, domain=variant)

        self.place.ranks.on_first("export of the merged model", export, long=True)

    @property
    def base_tensors(self) -> Mapping[str, Tensor]:
        model = self.loaded.model
        ring, slots = ring_of(model), node_base_of(model).slots.items()  # some are used from the first merge on
        buffers = {} if ring is None else {f"buffer {number}": slot for number, slot in enumerate(ring.slots)}
        return {**frozen_buffers(model), **buffers, **{f"{name}, shared": slot for name, slot in slots}}

    @property
    def _streams(self) -> bool:
        """Whether the base stays in host memory."""
        return self.arguments.training.base_device == BaseDevice.HOST.value

    def _planned_config(self) -> AdapterConfig:
        """The adapter's config with what the hooks add to it."""
        arguments, loaded, place = self.arguments, self.loaded, self.place
        config = arguments.adapter.config(arguments.training.seed)
        if arguments.adapter.train_new_embeddings:
            config = replace(config, new_rows_from=first_new_row(loaded.base.folder))
        return place.hooks.plan(config, loaded, place.folder, place.checkpoint, place.ranks)

    def _with_vectors(self, config: AdapterConfig) -> AdapterConfig:
        """The config that names the base's singular vectors, where the operator or a hook reads them."""
        loaded, place = self.loaded, self.place
        leading = place.hooks.vectors
        if not isinstance(config, MoRAConfig) or not (config.is_subspace or leading):
            return config
        wanted = wanted_vectors(loaded.model, config, loaded.keys, leading)
        if place.checkpoint is None:
            exact = sum(each.is_exact for each in wanted.values())
            logger.info(
                f"singular vectors of {len(wanted)} weights, {exact} of them decomposed exactly: "
                f"{place.folder / VECTORS_FOLDER}"
            )
        return prepare_vectors(
            config, wanted, loaded.base, place.folder, place.ranks, place.checkpoint,
            current_device(),
        )  # fmt: skip

    def _inject(self) -> None:
        """Put the adapter into the model, and log what it costs."""
        training = self.arguments.training
        model, base, keys = self.loaded.model, self.loaded.base, self.loaded.keys
        device = torch.device("cpu") if self._streams else current_device()
        report = inject(model, self.config, lambda name: base.read(keys[name]).to(device))
        self.trainable_parameters, self.total_parameters = report.trainable_params, report.total_params
        logger.info(report)
        self.place.hooks.injected(model, self.config)
        degree = training.tensor_parallel_size
        if degree > 1:
            logger.info(plan_of(model, degree))
        if self.ds_config["zero_optimization"]["stage"] == 3:
            tokens = training.per_device_train_batch_size * self.data.train.seq_len // training.sequence_parallel_size
            replicas = self.place.ranks.world // degree
            logger.info(costs(model, degree, replicas, tokens))

    def _log_paths(self, tokens: int, before: int) -> None:
        """Log how many layers are computed in which way, with `tokens` in a micro-batch, and `before` where the run
        resumes (0: not known): other sizes may take other paths, which round differently."""
        layers = [layer for layer in mora_layers(self.loaded.model).values() if isinstance(layer, MoRALinear)]

        def counted(number: int) -> str:
            paths = Counter(layer.path(number).value for layer in layers)
            return ", ".join(f"{path} for {count} layers" for path, count in sorted(paths.items()))

        if layers:
            logger.info(f"computed over (--compute): {counted(tokens)}, with {tokens:,} tokens in a micro-batch")
        if before and counted(before) != counted(tokens):
            logger.warning(
                f"--compute: up to the checkpoint it was {counted(before)}, with {before:,} tokens in a micro-batch; "
                "from here on results differ by rounding from those of the same micro-batches as before"
            )

    def _open_run(self, identity: Mapping[str, Any]) -> Run:
        adapter, training, train_data = self.arguments.adapter, self.arguments.training, self.data.train
        return Run(
            self.engine,
            self.config,
            self.loaded.base,
            self.place.folder,
            resume=self.place.checkpoint,
            overwrite=True,
            async_save=training.async_save,
            details=RunDetails(
                keys=self.loaded.keys,
                reset=OptimizerReset(adapter.optimizer_reset),
                identity=identity,
                tokenizer_folder=self.data.tokenizer_folder,
                probe_ids=train_data.first_rows(1)["input_ids"][:, :PROBE_TOKENS],
                facts={"seq_len": train_data.seq_len},
                ranks=self.place.ranks,
                state=self.place.state,
            ),
        )
