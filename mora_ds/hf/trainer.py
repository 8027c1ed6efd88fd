"""`MoRATrainer`: a mixin for Hugging Face's Trainer, with the base unsharded.

    __init__                    options are checked, the adapter is injected
    _prepare_for_training       accelerate makes the engine of `mora_ds.initialize`; a `Run` is opened around it, or
                                restored from checkpoint-N: engine, ledger, and the base as of that step
    callback, on_step_end       merges (`callback`)
    checkpoint-N/               trainer_state.json, random states: transformers'; checkpoints/step-N: a checkpoint of
                                mora_ds, as launch/pretrain.py writes it
    save_model                  the merged model, which `from_pretrained` loads

Methods with an underscore are transformers' own (trainer.py, 5.24);
tests/hf/test_options.py fails where an upgrade renames one.
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
from mora_ds.train.run import Run, RunContext

_Base: Any = object
"""For the type checker: the Trainer whose methods the mixin calls."""

allow_cpu()  # before `TrainingArguments` starts the process group

MERGE_EVERY = "merge_every"
"""The fact of a checkpoint that tells a Trainer without `MoRACallback` of earlier
merges."""

_SAVING = ".mora-saving"
"""Folder in a model's folder where its files are written, before they are moved
there."""


def load_model(folder: str | Path, **kwargs: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained(folder, **kwargs)`, unsharded: transformers
    itself shards a model that is loaded after `TrainingArguments(deepspeed=...)`."""
    with unsharded_loading():
        return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


class MoRATrainer(_Base):
    """A mixin for `transformers.Trainer` and its subclasses, such as trl's
    `SFTTrainer`. Put it first:

        class Trainer(MoRATrainer, transformers.Trainer): ...

    `mora`: the adapter; `inject` gives it to `model`. `base`: the folder or Hub name
    that `model` was loaded from, by default the one that the model names; merges and
    `save_model` read the original weights there. `model` may be a path. `MoRACallback`
    among the callbacks makes it ReMoRA. Collective, as a Trainer is.

    Raises `UserError` for options that contradict an adapter (`options`), for a model
    that is sharded already, and when training starts for a model that is not its base,
    weight for weight, or goes on from a checkpoint of a merging run without
    `MoRACallback`.
    """

    deepspeed: Any
    run: Run | None = None
    """Merge ledger and checkpoints, from the start of training on."""

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
                "load it before, or by mora_ds.hf.load_model, or give MoRATrainer its path"
            )
        self.injection = inject(model, mora)
        fill_config(args, trainable_numels(model))
        super().__init__(model, args, *arguments, **kwargs)

    def merge(self) -> MergeReport:
        """Merge the MoRA matrices of all layers now, between two optimizer steps, and
        log it. `MoRACallback` calls it. Collective."""
        report = self._open_run.merge(self.state.global_step)
        self._set_learning_rate()
        facts = report.row().items()
        should_log = self.control.should_log
        self.log({f"merge_{name}": value for name, value in facts if value is not None})
        # `log` takes that back, and this step's loss is still to be logged.
        self.control.should_log = should_log
        return report

    # -- engine, run, learning rate ----------------------------------------------------

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        if self.run is not None and resume_from_checkpoint is None:
            raise UserError(
                "train() was called before: train(resume_from_checkpoint=...) goes on from a checkpoint; another run "
                "needs a model without an adapter"
            )
        for callback in self._merging:
            callback.trainer = self
            callback.plan(self.args, max_steps)
        with our_engine():
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._restore(resume_from_checkpoint)
        return prepared

    def _restore(self, checkpoint: str | None) -> None:
        """Open the run; with a folder checkpoint-N as it was then, with the base of
        that step and the learning rates of the arguments."""
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
            # The live base may hold merges, so it is not compared: it is formed anew
            # below.
            base = earlier.remora.base
            keys = earlier.remora.keys
        self.run = Run(
            self.deepspeed,
            base=base,
            folder=self.args.output_dir,
            resume=resume,
            overwrite=True,
            context=RunContext(
                keys=keys,
                identity={"seed": self.args.seed},
                facts={
                    MERGE_EVERY: sum(callback.merge_every for callback in self._merging)
                },
            ),
        )
        if earlier is not None:
            self.run.remora.form_base()
        if resume is not None:
            merged_every = read_adapter(Path(resume)).facts.get(MERGE_EVERY, 0)
            if merged_every and not self._merging:
                raise UserError(
                    f"{checkpoint} is of a run that merges every {merged_every} steps: add MoRACallback; "
                    "MoRACallback(merge_every=0) goes on without merges"
                )
            self._schedule.base_lrs = base_rates
            self._set_learning_rate()

    def _set_learning_rate(self) -> None:
        """Set the `LambdaLR`, and its optimizer's learning rates, to the next step."""
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
        """As transformers' own. Before training there is no engine, and each process
        evaluates its share with a model of its own."""
        if self.deepspeed is not None:
            return super().evaluation_loop(*arguments, **kwargs)
        # Where there is none, transformers makes an engine, and drops the optimizer
        # from the DeepSpeed config for it.
        self.deepspeed = self.model
        try:
            with bare_model(self.args.hf_deepspeed_config.dtype()):
                return super().evaluation_loop(*arguments, **kwargs)
        finally:
            self.deepspeed = None
            self.model_wrapped = self.model
            # It would be destroyed as an engine otherwise.
            self.accelerator.deepspeed_engine_wrapped = None
            self.accelerator._models.clear()

    def floating_point_ops(self, inputs: Any) -> int:
        """As transformers counts them, and those of the base, whose weights are no
        parameters."""
        ids = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        if not isinstance(ids, torch.Tensor):
            return 0
        return 6 * count_parameters(self.model) * ids.numel()

    # -- saving ------------------------------------------------------------------------

    def save_model(
        self, output_dir: str | None = None, _internal_call: bool = False
    ) -> None:
        """Write the merged model, with its tokenizer, for `from_pretrained`.

        A checkpoint has it with `save_only_model`, and with `push_to_hub` unless that
        waits for the end; others hold the MoRA matrices alone. Raises `UserError`
        before training.
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
        run.ranks.on_first(
            "folder of the model", lambda: saving.mkdir(parents=True, exist_ok=True)
        )
        run.save(self.state.global_step, folder=saving)
        run.export(saving, saving / "merged")

        def move() -> None:
            for path in (saving / "merged").iterdir():
                os.replace(path, folder / path.name)
            shutil.rmtree(saving)

        run.ranks.on_first("merged model", move, long=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._open_run.save(self.state.global_step, folder=output_dir)

    def _load_best_model(self) -> None:
        """Restore the best checkpoint's matrices, ledger and base, without later
        merges."""
        self._restore(self.state.best_model_checkpoint)

    @property
    def _schedule(self) -> Any:
        # Within accelerate's wrapper, once there is one.
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
