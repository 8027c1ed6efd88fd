"""`MoRATrainer`: a mixin for Hugging Face's Trainer with an unsharded base.

    __init__                    checks options, injects the adapter
    _prepare_for_training       accelerate creates the engine of `mora_ds.initialize`; then a `Run` is opened, or
                                restored from checkpoint-N: engine, ledger, and the base at that step
    callback, on_step_end       merges (`callback`)
    checkpoint-N/               trainer_state.json and random states of transformers; checkpoints/step-N: a checkpoint
                                of mora_ds, as written by launch/pretrain.py
    save_model                  writes the merged model for `from_pretrained`

Overridden methods with an underscore are transformers' private methods (trainer.py,
5.24); tests/hf/test_options.py fails if an upgrade renames one.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import HubStrategy

from mora_ds.adapters.config import AdapterConfig
from mora_ds.adapters.inject import count_parameters, inject
from mora_ds.checkpoint.adapter_files import read_adapter
from mora_ds.checkpoint.layout import CHECKPOINTS, LATEST
from mora_ds.checkpoint.storage import local_copy
from mora_ds.common.errors import UserError
from mora_ds.engine.accelerate import (
    allow_cpu,
    bare_model,
    is_sharded,
    optimizer_steps,
    our_engine,
)
from mora_ds.engine.initialize import trainable_numels
from mora_ds.hf.callback import MoRACallback
from mora_ds.hf.options import check_options, fill_config
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.load import resolve_folder, unsharded_loading
from mora_ds.remora.merge import MergeReport
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.run import Run, RunOptions

_Base: Any = object
"""Type checking: the mixin calls methods of a Trainer."""

allow_cpu()  # before `TrainingArguments` starts the process group

MERGE_EVERY = "merge_every"
"""Key of a checkpoint's facts. It detects a resume of a merging run without
`MoRACallback`."""

_SAVING = ".mora-saving"
"""Temporary folder in a model's folder; complete files are moved out of it."""


def load_model(folder: str | Path, *, use_kernels: bool = False, **kwargs: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained(folder, **kwargs)` with unsharded weights.
    transformers would shard a model that is loaded after
    `TrainingArguments(deepspeed=...)`, and from 5.25 on use kernels of the Hub."""
    with unsharded_loading():
        return AutoModelForCausalLM.from_pretrained(
            folder, use_kernels=use_kernels, **kwargs
        )


class MoRATrainer(_Base):
    """A mixin for `transformers.Trainer` and its subclasses, such as trl's
    `SFTTrainer`. Put it first:

        class Trainer(MoRATrainer, transformers.Trainer): ...

    `mora`: the adapter config, injected to `model`. `base`: the folder or Hub name that
    `model` was loaded from, by default the name in the model's config; merges and
    `save_model` read the base weights there. `model` may be a path. Add a
    `MoRACallback` for ReMoRA. Collective, like a Trainer.

    Raises `UserError` for unsupported options (`options`) and for a sharded model; at
    the start of training for a model whose weights are not those of its base, and for
    a resume of a merging run without `MoRACallback`.
    """

    deepspeed: Any
    run: Run | None = None
    """Merge ledger and checkpoints; set when training starts."""

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *arguments: Any,
        mora: AdapterConfig,
        base: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            raise UserError("MoRATrainer needs TrainingArguments, with deepspeed=...")
        check_options(args, kwargs)
        if isinstance(model, (str, Path)):
            model = load_model(
                model, **(getattr(args, "model_init_kwargs", None) or {})
            )
        self.mora = mora
        named = getattr(getattr(model, "config", None), "_name_or_path", None)
        self._base_name = str(base or named or "")
        if not self._base_name:
            raise UserError(
                "MoRATrainer(base=...) is missing: the folder or Hub name that the model was loaded from"
            )
        if is_sharded(model):
            raise UserError(
                "the model was loaded after TrainingArguments(deepspeed=...), so transformers has sharded its weights: "
                "load it before, or with mora_ds.hf.load_model, or give MoRATrainer its path"
            )
        self.injection = inject(model, mora)
        fill_config(args, trainable_numels(model))
        super().__init__(model, args, *arguments, **kwargs)

    def merge(self) -> MergeReport:
        """Merge and reset the MoRA matrices of all layers, between two optimizer steps,
        and log it. Called by `MoRACallback`. Collective."""
        report = self._open_run.merge(self.state.global_step)
        self._set_learning_rate()
        facts = report.row().items()
        should_log = self.control.should_log
        self.log({f"merge_{name}": value for name, value in facts if value is not None})
        # `log` resets should_log, but this step's loss is not logged yet.
        self.control.should_log = should_log
        return report

    # -- engine, run, learning rate ----------------------------------------------------

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        if self.run is not None and resume_from_checkpoint is None:
            raise UserError(
                "train() was called before: use train(resume_from_checkpoint=...) to continue from a checkpoint; a new "
                "run needs a model without an adapter"
            )
        for callback in self._merging:
            callback.trainer = self
            callback.plan(self.args, max_steps)
        with our_engine():
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._restore(resume_from_checkpoint)
        return prepared

    def _restore(self, checkpoint: str | None) -> None:
        """Open the run. With a folder checkpoint-N, restore it, including the base at
        that step, but with the learning rates of the arguments."""
        resume = None
        if checkpoint is not None:
            resume = str(Path(checkpoint) / CHECKPOINTS / LATEST)
            base_rates = self._schedule.base_lrs
        earlier = self.run
        base: Path | BaseCheckpoint
        if earlier is None:
            base = resolve_folder(self._base_name, Ranks.current())
            keys = None
        else:
            # The base in memory may have merges, so do not compare it with the files;
            # it is rebuilt below.
            base = earlier.remora.base
            keys = earlier.remora.keys
        self.run = Run(
            self.deepspeed,
            base=base,
            folder=self.args.output_dir,
            resume=resume,
            overwrite=True,
            options=RunOptions(
                keys=keys,
                identity={"seed": self.args.seed},
                facts={
                    MERGE_EVERY: sum(callback.merge_every for callback in self._merging)
                },
            ),
        )
        if earlier is not None:
            self.run.remora.rebuild_base()
        if resume is not None:
            merged_every = read_adapter(local_copy(Path(resume))).facts.get(
                MERGE_EVERY, 0
            )
            if merged_every and not self._merging:
                raise UserError(
                    f"{checkpoint} is of a run that merges every {merged_every} steps: add MoRACallback; "
                    "MoRACallback(merge_every=0) continues without merges"
                )
            self._schedule.base_lrs = base_rates
            self._set_learning_rate()

    def _set_learning_rate(self) -> None:
        """Set the `LambdaLR` and its optimizer's learning rates for the next step."""
        step = optimizer_steps(self.deepspeed)
        schedule = self._schedule
        factors = [curve(step) for curve in schedule.lr_lambdas]
        pairs = zip(schedule.base_lrs, factors, strict=True)
        rates = [base * factor for base, factor in pairs]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule.last_epoch = step
        schedule._last_lr = rates

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """transformers' learning rate, with a re-warmup after every merge."""
        is_new = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if is_new:
            for callback in self._merging:
                curves = scheduler.lr_lambdas
                scheduler.lr_lambdas = [callback.rewarmed(curve) for curve in curves]
        return scheduler

    def evaluation_loop(self, *arguments: Any, **kwargs: Any) -> Any:
        """As in transformers. Before training there is no engine, and each rank
        evaluates its part of the data with an unsharded model."""
        if self.deepspeed is not None:
            return super().evaluation_loop(*arguments, **kwargs)
        # Otherwise transformers would create an engine, and remove the optimizer from
        # the DeepSpeed config for it.
        self.deepspeed = self.model
        try:
            with bare_model(self.args.hf_deepspeed_config.dtype()):
                return super().evaluation_loop(*arguments, **kwargs)
        finally:
            self.deepspeed = None
            self.model_wrapped = self.model
            # Otherwise accelerate would destroy it like an engine.
            self.accelerator.deepspeed_engine_wrapped = None
            self.accelerator._models.clear()

    def floating_point_ops(self, inputs: Any) -> int:
        """As in transformers, but including the base, whose weights are buffers."""
        ids = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        if not isinstance(ids, torch.Tensor):
            return 0
        return 6 * count_parameters(self.model) * ids.numel()

    # -- saving ------------------------------------------------------------------------

    def save_model(
        self, output_dir: str | None = None, _internal_call: bool = False
    ) -> None:
        """Write the merged model with its tokenizer, for `from_pretrained`.

        A checkpoint contains it only with `save_only_model`, or with `push_to_hub`
        unless that is done at the end; other checkpoints have only the MoRA matrices.
        Raises `UserError` before training.
        """
        in_checkpoint = _internal_call and output_dir is not None
        folder = Path(output_dir or self.args.output_dir)
        pushes = self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END
        if not in_checkpoint or self.args.save_only_model or pushes:
            self._write_merged(folder)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(
                commit_message="Model save", revision=self.args.hub_revision
            )

    def _write_merged(self, folder: Path) -> None:
        run = self._open_run
        saving = folder / _SAVING
        run.ranks.run_on_rank0(
            "folder of the model", lambda: saving.mkdir(parents=True, exist_ok=True)
        )
        run.save(self.state.global_step, folder=saving)
        run.export(saving, saving / "merged")

        def move() -> None:
            for path in (saving / "merged").iterdir():
                os.replace(path, folder / path.name)
            shutil.rmtree(saving)

        run.ranks.run_on_rank0("merged model", move, long=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._open_run.save(self.state.global_step, folder=output_dir)

    def _load_best_model(self) -> None:
        """Restore the matrices, ledger and base of the best checkpoint."""
        self._restore(self.state.best_model_checkpoint)

    @property
    def _schedule(self) -> Any:
        # Inside of accelerate's wrapper, if there is one.
        return getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)

    @property
    def _open_run(self) -> Run:
        if self.run is None:
            raise UserError("merges and models need a run: call train() first")
        return self.run

    @property
    def _merging(self) -> list[MoRACallback]:
        callbacks = self.callback_handler.callbacks
        return [
            callback for callback in callbacks if isinstance(callback, MoRACallback)
        ]
