"""The main job, from settings to a summary: every room below is wired here, and only here.

    settings -> output folder -> tokenizer, tokens -> base -> squares -> engine -> (resume) -> Trainer.run -> export

What the user can get wrong is found in this order, cheapest first; nothing is trained before all of it has been.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from mora_ds import zero
from mora_ds.arguments import AdapterKind, Arguments, dump
from mora_ds.checkpoint import (
    AUTO,
    TrainerState,
    check_identity,
    check_world_size,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from mora_ds.checkpoint_care import name_latest, settle
from mora_ds.data import PackedDataset, largest_id
from mora_ds.ds_config import compute_dtype, fill_bucket_sizes, resolve_ds_config
from mora_ds.engine import initialize, initialize_full, start_distributed
from mora_ds.errors import UserError
from mora_ds.export import export_merged
from mora_ds.files import write_json_atomic
from mora_ds.injection import count_parameters, frozen_buffers, inject
from mora_ds.metrics import MetricsLog, peak_memory_bytes, plain_json
from mora_ds.model import (
    LoadedBase,
    config_digest,
    create_base,
    folder_config,
    load_base,
    read_model_config,
    resolve_folder,
)
from mora_ds.ranks import Ranks
from mora_ds.remora import ReMoRA
from mora_ds.resets import OptimizerReset
from mora_ds.run import Run, run_identity
from mora_ds.run_data import RunData, load_data
from mora_ds.run_folder import Reservation, claim, reserve, write_run_file
from mora_ds.saving import PROBE_TOKENS, save_full_model
from mora_ds.schedules import Schedule
from mora_ds.trainer import LoopSettings, Trainer, check_document_mask
from mora_ds.validation import validate


def pretrain(arguments: Arguments) -> dict[str, Any]:
    """Run the job that `arguments` describe, on this rank of all ranks. Returns what `summary.json` holds.

    Raises `UserError` before anything expensive for what the user can mend, and the output folder is then as it was;
    `RunError` for failures while running.
    """
    validate(arguments)
    start_distributed()
    ranks = Ranks.current()
    if not (ranks.is_first and sys.stderr.isatty()):
        disable_progress_bar()  # transformers' own, on every rank
    say = print if ranks.is_first else _silence
    training = arguments.training
    ds_config = resolve_ds_config(_expanded(training.deepspeed), training.engine_settings(), ranks.world)
    folder = Path(training.output_dir).expanduser()
    checkpoint, reservation = ranks.on_first(lambda: _reserve(arguments, folder, ranks.world))
    try:
        place = _Place(folder, ranks, checkpoint, say)
        job, data = _prepare(arguments, ds_config, place)
        steps = _total_steps(arguments, data.train, ranks.world)
        schedule = arguments.schedule(steps)
        if checkpoint is not None and TrainerState.read(checkpoint).step > steps:
            raise UserError(f"{checkpoint} is already beyond this run's {steps} steps: raise --max_steps")
    except BaseException:
        if ranks.is_first:
            reservation.rollback()
        raise
    if ranks.is_first:
        reservation.commit()
        if checkpoint is not None:
            name_latest(folder / "checkpoints", checkpoint)
    return _train(arguments, job, data, place, schedule)


@dataclass(frozen=True)
class _Place:
    """Where a run happens."""

    folder: Path
    ranks: Ranks
    checkpoint: Path | None
    """What it resumes from."""
    say: Callable[..., None]


@dataclass(frozen=True)
class _Job:
    """An engine, and what a checkpoint and the report need of what it trains."""

    engine: zero.Engine
    state: TrainerState
    """Where it stands: at the beginning, or where the checkpoint left off."""
    remora: ReMoRA | None
    save: Callable[[TrainerState, int | None], Path]
    export: Callable[[Path, Path], None]
    """Writes the merged model of a checkpoint into a folder."""
    base_tensors: Mapping[str, Tensor]
    trainable_params: int
    total_params: int


def _silence(*text: object) -> None:
    del text


def _expanded(path: str | None) -> Path | None:
    return None if path is None else Path(path).expanduser()


def _reserve(arguments: Arguments, folder: Path, world: int) -> tuple[Path | None, Reservation]:
    """The checkpoint to resume from, if any; the output folder is this run's afterwards, on trial."""
    training = arguments.training
    wanted, root = training.resume_from_checkpoint, folder / "checkpoints"
    claim(folder)
    settle(root)
    checkpoint = find_checkpoint(wanted, root, print) if wanted else None
    if checkpoint is not None:
        check_world_size(checkpoint, world)
    continues = wanted == AUTO or (checkpoint is not None and checkpoint.parent == root.resolve())
    return checkpoint, reserve(folder, training.overwrite_output_dir, continues)


def _prepare(arguments: Arguments, ds_config: dict[str, Any], place: _Place) -> tuple[_Job, RunData]:
    """Everything up to the first step; nothing here is lost when it fails."""
    model, ranks = arguments.model, place.ranks
    if model.model_name_or_path is not None:
        model_folder = resolve_folder(model.model_name_or_path, ranks)
        config = folder_config(model_folder, model.trust_remote_code)
    else:
        assert model.model_config is not None
        model_folder, config = None, read_model_config(Path(model.model_config).expanduser())
    rows = _rows_per_step(arguments, ranks.world)
    data = load_data(arguments, config, model_folder, place.folder, ranks, rows, place.checkpoint, place.say)
    loaded = _load_base(arguments, model_folder, data.tokenizer, ds_config, place)
    full = arguments.adapter.adapter == AdapterKind.FULL.value
    job = (_full_job if full else _mora_job)(arguments, loaded, ds_config, data, place)
    if arguments.data.document_mask:
        check_document_mask(job.engine, loaded.model.config.get_text_config().vocab_size)
    return job, data


def _rows_per_step(arguments: Arguments, world: int) -> int:
    training = arguments.training
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * world


# -- model -----------------------------------------------------------------------------------------------------------


def _load_base(
    arguments: Arguments, model_folder: Path | None, tokenizer: Any, ds_config: dict[str, Any], place: _Place
) -> LoadedBase:
    model, own, ranks = arguments.model, place.folder / "base", place.ranks
    if model_folder is None:
        config_file, vocabulary = Path(str(model.model_config)).expanduser(), largest_id(tokenizer)[1] + 1
        if place.checkpoint is None or not (own / "config.json").exists():
            seed = arguments.training.seed
            ranks.on_first(lambda: create_base(config_file, own, seed, tokenizer, vocabulary))
        model_folder = own
    dtype = getattr(torch, compute_dtype(ds_config))
    loaded = load_base(model_folder, own, ranks, dtype, model.attn_implementation, model.trust_remote_code)
    training = arguments.training
    if training.gradient_checkpointing:
        reentrant = {"use_reentrant": training.gradient_checkpointing_reentrant}
        loaded.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=reentrant)
        if training.gradient_checkpointing_reentrant:
            loaded.model.enable_input_require_grads()
    return loaded


def _mora_job(
    arguments: Arguments, loaded: LoadedBase, ds_config: dict[str, Any], data: RunData, place: _Place
) -> _Job:
    config, ranks = arguments.adapter.mora_config(arguments.training.seed), place.ranks
    report = inject(loaded.model, config)
    place.say(report)
    fingerprint = ranks.on_first(loaded.base.fingerprint)
    precision = arguments.adapter.merge_precision
    common = _common_identity(arguments, data, ds_config, ranks.world, loaded)
    _check_checkpoint(place.checkpoint, run_identity(fingerprint, config, precision, common))
    ds_config = fill_bucket_sizes(ds_config, [parameter.numel() for parameter in loaded.model.parameters()])
    engine, *_ = initialize(model=loaded.model, config=ds_config)
    _seed(arguments, ranks)
    run = Run(
        engine,
        config,
        loaded.base,
        place.folder,
        resume=place.checkpoint,
        overwrite=True,
        keys=loaded.keys,
        precision=precision,
        reset=OptimizerReset(arguments.adapter.optimizer_reset),
        identity=common,
        tokenizer_folder=data.tokenizer_folder,
        probe_ids=data.train.block(0)["input_ids"][:PROBE_TOKENS].unsqueeze(0),
        facts={"seq_len": data.train.seq_len},
    )

    def export(checkpoint: Path, target: Path) -> None:
        ranks.on_first(lambda: export_merged(checkpoint, target, overwrite=True) and None)

    base_tensors, counts = frozen_buffers(loaded.model), (report.trainable_params, report.total_params)
    return _Job(engine, run.state, run.remora, run.save_state, export, base_tensors, *counts)


def _full_job(
    arguments: Arguments, loaded: LoadedBase, ds_config: dict[str, Any], data: RunData, place: _Place
) -> _Job:
    total = count_parameters(loaded.model)
    place.say(f"full training, the control: all {total:,} parameters, sharded by ZeRO as ever")
    identity = {"adapter": {"kind": "full"}, **_common_identity(arguments, data, ds_config, place.ranks.world, loaded)}
    _check_checkpoint(place.checkpoint, identity)
    ds_config = fill_bucket_sizes(ds_config, [parameter.numel() for parameter in loaded.model.parameters()])
    engine, *_ = initialize_full(model=loaded.model, config=ds_config)
    _seed(arguments, place.ranks)
    state = TrainerState(world_size=place.ranks.world, identity=identity)
    if place.checkpoint is not None:
        state = load_checkpoint(place.checkpoint, engine, identity)

    def save(now: TrainerState, keep: int | None) -> Path:
        return save_checkpoint(place.folder / "checkpoints", engine, now, lambda target: None, keep)

    def export(checkpoint: Path, target: Path) -> None:
        save_full_model(engine, target, data.tokenizer)

    return _Job(engine, state, None, save, export, {}, total, total)


def _seed(arguments: Arguments, ranks: Ranks) -> None:
    """Before a checkpoint restores the random states: dropout draws other masks on every rank."""
    torch.manual_seed((arguments.training.seed << 16) + ranks.rank)


def _common_identity(
    arguments: Arguments, data: RunData, ds_config: dict[str, Any], world: int, loaded: LoadedBase
) -> dict[str, Any]:
    """What must not change in mid-run for batches and states to follow on."""
    return {
        "model_config": config_digest(loaded.model.config),
        "tokens": data.train.blocks.cache.folder.name,
        "seq_len": data.train.seq_len,
        "document_mask": arguments.data.document_mask,
        "seed": arguments.training.seed,
        "global_batch_size": _rows_per_step(arguments, world),
        "merge_every": arguments.adapter.merge_every,
        "dtype": compute_dtype(ds_config),
        "zero_stage": ds_config["zero_optimization"]["stage"],
    }


def _check_checkpoint(checkpoint: Path | None, identity: dict[str, Any]) -> None:
    if checkpoint is not None:
        check_identity(checkpoint, TrainerState.read(checkpoint).identity, identity)


# -- the run ---------------------------------------------------------------------------------------------------------


def _train(arguments: Arguments, job: _Job, data: RunData, place: _Place, schedule: Schedule) -> dict[str, Any]:
    folder, ranks, steps = place.folder, place.ranks, schedule.total_steps
    state = job.state
    if ranks.is_first:
        resolved = {"world_size": ranks.world, "steps": steps, "deepspeed": job.engine.config}
        write_run_file(folder, dump(arguments), resolved)
    log = MetricsLog(folder, steps, ranks.is_first, state.step)
    if place.checkpoint is not None:
        log.say(_resumed(place.checkpoint, state, steps))
    state.total_steps = steps
    counter = zero.CollectiveCounter(job.base_tensors.values())

    trainer = Trainer(
        engine=job.engine,
        train_data=data.train,
        eval_data=data.evaluation,
        schedule=schedule,
        settings=_loop_settings(arguments, steps),
        log=log,
        counter=counter,
        state=state,
        save=lambda now: job.save(now, arguments.training.save_total_limit),
        merger=job.remora,
    )
    trainer.last_checkpoint = place.checkpoint
    nothing_to_do = trainer.is_finished
    state = trainer.run()
    summary = plain_json(_summary(job, state, trainer, counter))
    if ranks.is_first and not (nothing_to_do and (folder / "summary.json").exists()):
        write_json_atomic(folder / "summary.json", summary)
    if arguments.training.export_merged:
        assert trainer.last_checkpoint is not None, "a run ends with a checkpoint"
        log.say(f"writing the merged model to {folder / 'merged'}")
        job.export(trainer.last_checkpoint, folder / "merged")
    log.close()
    ranks.barrier()
    return summary


def _resumed(checkpoint: Path, state: TrainerState, steps: int) -> str:
    text = f"resumed from {checkpoint} at step {state.step}"
    if state.total_steps == steps:
        return text
    return (
        f"{text}; it was on its way to {state.total_steps} steps and has {steps} now: "
        "the learning rate follows the new length from here on"
    )


def _total_steps(arguments: Arguments, data: PackedDataset, world: int) -> int:
    training = arguments.training
    if training.max_steps > 0:
        return training.max_steps
    return max(1, math.ceil(training.num_train_epochs * data.n_blocks / _rows_per_step(arguments, world)))


def _loop_settings(arguments: Arguments, steps: int) -> LoopSettings:
    training = arguments.training
    return LoopSettings(
        total_steps=steps,
        micro_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        eval_batch_size=training.per_device_eval_batch_size,
        logging_steps=training.logging_steps,
        eval_steps=training.eval_steps,
        eval_on_start=training.eval_on_start,
        max_eval_batches=training.max_eval_batches,
        save_steps=training.save_steps,
        merge_at_end=arguments.adapter.merge_at_end,
    )


def _summary(job: _Job, state: TrainerState, trainer: Trainer, counter: zero.CollectiveCounter) -> dict[str, Any]:
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "trainable_params": job.trainable_params,
        "total_params": job.total_params,
        "merges": len(state.merges),
        "perplexity_before": state.perplexity_before,
        "perplexity_after": state.perplexity_last,
        "bytes_gathered_per_step": trainer.bytes_gathered_per_step,
        "base_bytes_gathered": counter.base_bytes,
        "peak_memory_bytes": peak_memory_bytes(),
    }
