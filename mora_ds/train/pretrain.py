"""The main job, from settings to a summary: every room below is wired here, and only here.

    settings -> output folder -> tokenizer, tokens -> base -> squares -> engine -> (resume) -> Trainer.run -> export

What the user can get wrong is found in this order, cheapest first; nothing is trained before all of it has been.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from mora_ds.adapters.config import SHARED
from mora_ds.adapters.domains import domains_of
from mora_ds.adapters.ops.gather import check_compiler, compile_operators
from mora_ds.checkpoint.folder import AUTO, name_best, name_latest, resume_checkpoint, settle
from mora_ds.checkpoint.layout import CHECKPOINTS, MERGED_FOLDER, SUMMARY_FILE, find_adapter, step_folder
from mora_ds.checkpoint.state import TrainerState, check_world_size
from mora_ds.config.adapter import AdapterKind
from mora_ds.config.arguments import Arguments, dump
from mora_ds.config.domains import eval_domains
from mora_ds.config.forgetting import Watch, change
from mora_ds.config.validate import validate
from mora_ds.data import Mixture, TrainData
from mora_ds.engine.ds_config import resolve_ds_config
from mora_ds.engine.initialize import check_compute_dtype, check_splittable, start_distributed
from mora_ds.engine.traffic import CollectiveCounter
from mora_ds.errors import UserError
from mora_ds.files import write_json_atomic
from mora_ds.models.load import folder_config, read_model_config, resolve_folder
from mora_ds.models.loss import chunk_loss
from mora_ds.parallel.topology import check_degree
from mora_ds.parallel.ulysses import bound, whole_rows
from mora_ds.parallel.ulysses_checks import check_config, check_world
from mora_ds.remora.schedule import Schedule, ScheduleKind
from mora_ds.runtime.nodes import Followers
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.data import RunData, load_data
from mora_ds.train.dry_run import dry_run
from mora_ds.train.job import Job, Place, prepare_base, prepare_job, rows_per_step
from mora_ds.train.metrics import MetricsLog, peak_memory_bytes, plain_json
from mora_ds.train.output_folder import Reservation, claim, reserve, write_run_file
from mora_ds.train.preflight import check_chunked_loss, check_document_mask, check_rows, check_split
from mora_ds.train.replicas import Share
from mora_ds.train.targets import plan_of_file
from mora_ds.train.trainer import LoopSettings, Trainer


def pretrain(arguments: Arguments, base: Path | None = None) -> dict[str, Any]:
    """Run the job that `arguments` describe, on this rank of all ranks. Returns what `summary.json` holds.

    `base`: the model that --full_rank_steps have made of theirs; the job goes on from there, with the steps that are
    left and the batches that follow.
    Raises `UserError` before anything expensive for what the user can mend, and the output folder is then as it was;
    `RunError` for failures while running.
    """
    validate(arguments)
    if arguments.adapter.compile:
        check_compiler()
    training = arguments.training
    if training.dry_run:
        return dry_run(arguments)
    start_distributed(timeout_s=training.collective_timeout_s, silence_s=training.heartbeat_timeout_s)
    ranks = Ranks.current()
    if not (ranks.is_first and sys.stderr.isatty()):
        disable_progress_bar()  # transformers' own, on every rank
    say = print if ranks.is_first else _silence
    check_world(training.sequence_parallel_size, ranks.world)
    check_degree(training.tensor_parallel_size, ranks.world)
    replicas = ranks.world // training.ranks_per_replica
    settings = training.engine_settings()
    if arguments.adapter.adapter == AdapterKind.FULL.value:
        settings = dataclasses.replace(settings, tensor_parallel_size=None)
    ds_config = resolve_ds_config(_expanded(training.deepspeed), settings, replicas)
    check_compute_dtype(ds_config)
    if training.tensor_parallel_size > 1:
        check_splittable(ds_config)
    if training.sequence_parallel_size > 1:
        ds_config.pop("train_batch_size")  # checked; DeepSpeed, told of no groups, would count every rank's rows
    folder = Path(training.output_dir).expanduser()
    targets = ranks.on_first(lambda: plan_of_file(arguments.adapter))  # it may lie in the folder
    checkpoint, reservation = ranks.on_first(lambda: _reserve(arguments, folder, replicas))
    followers = None
    try:
        followers = Followers.find(folder, ranks)
        place = dataclasses.replace(_place(followers, checkpoint, base, say), targets=targets)
        job, data = _prepare(arguments, ds_config, place)
        steps = _total_steps(arguments, data.train, ranks.world) - _first_batch(arguments, place)
        schedule = arguments.schedule(steps)
        if place.checkpoint is not None and TrainerState.read(place.checkpoint).step > steps:
            raise UserError(f"{checkpoint} is already beyond this run's {steps} steps: raise --max_steps")
    except BaseException:
        if ranks.is_first:
            reservation.rollback()
        if followers is not None:
            followers.close()
        raise
    if ranks.is_first:
        reservation.commit()
        if checkpoint is not None:
            name_latest(folder / CHECKPOINTS, checkpoint)
            if best := TrainerState.read(checkpoint).best_step:
                name_best(folder / CHECKPOINTS, step_folder(folder / CHECKPOINTS, best))
    try:
        if arguments.adapter.adapter == AdapterKind.NONE.value:
            return _evaluate(arguments, job, data, place)
        return _train(arguments, job, data, place, schedule)
    finally:
        followers.close()


def _place(followers: Followers, checkpoint: Path | None, base: Path | None, say: Callable[..., None]) -> Place:
    """Where this rank works, and from copies of what on a node that does not see the run's folder."""
    if followers.names:
        say(f"{', '.join(followers.names)}: --output_dir is another folder there; the run is kept on rank 0's node")
    if checkpoint is not None:
        checkpoint = followers.fetch(checkpoint)
    if base is not None:
        base = followers.fetch(base)
    return Place(followers.folder, followers.ranks, checkpoint, say, base, followers)


def _silence(*text: object) -> None:
    del text


def _expanded(path: str | None) -> Path | None:
    return None if path is None else Path(path).expanduser()


def _reserve(arguments: Arguments, folder: Path, replicas: int) -> tuple[Path | None, Reservation]:
    """The checkpoint to resume from, if any; the output folder is this run's afterwards, on trial."""
    training = arguments.training
    wanted, root = training.resume_from_checkpoint, folder / CHECKPOINTS
    claim(folder)
    settle(root)
    checkpoint = resume_checkpoint(wanted, root) if wanted else None
    if checkpoint is not None:
        check_world_size(checkpoint, replicas)
    continues = wanted == AUTO or (checkpoint is not None and checkpoint.parent == root.resolve())
    return checkpoint, reserve(folder, training.overwrite_output_dir, continues)


def _prepare(arguments: Arguments, ds_config: dict[str, Any], place: Place) -> tuple[Job, RunData]:
    """Everything up to the first step; nothing here is lost when it fails."""
    model, ranks = arguments.model, place.ranks
    init = arguments.adapter.init_adapter if place.checkpoint is None else None
    if init is not None:  # whether it fits is for the model to say; that it is there, before any text is read
        ranks.agree(lambda: find_adapter(Path(init).expanduser()))
    if place.base is not None or model.model_name_or_path is not None:
        model_folder = resolve_folder(str(place.base or model.model_name_or_path), ranks)
        config = folder_config(model_folder, model.trust_remote_code)
    else:
        assert model.model_config is not None
        model_folder, config = None, read_model_config(Path(model.model_config).expanduser())
    training = arguments.training
    check_config(config, training.sequence_parallel_size, model.attention, model.trust_remote_code)
    rows = rows_per_step(arguments, ranks.world)
    data = load_data(arguments, config, model_folder, place.followers, rows, place.checkpoint, place.say)
    _watch(arguments).check_names(list(data.evaluation))
    if arguments.adapter.domain_adapters and isinstance(data.train, Mixture):
        eval_domains(arguments.adapter.eval_domains, list(data.evaluation), data.train.names)
    loaded = prepare_base(arguments, model_folder, data.tokenizer, ds_config, place)
    job = prepare_job(arguments, loaded, ds_config, data, place)
    if arguments.adapter.compile:
        compile_operators()
    vocab_size = loaded.model.config.get_text_config().vocab_size
    if training.chunked_loss:
        chunk_loss(loaded.model)
        with whole_rows(loaded.model):
            check_chunked_loss(job.engine, vocab_size)
    if arguments.adapter.domain_adapters:
        with whole_rows(loaded.model):
            check_rows(job.engine, vocab_size)
    if arguments.data.document_mask:
        with whole_rows(loaded.model):
            check_document_mask(job.engine, vocab_size)
    sequence = bound(loaded.model)
    if sequence is not None:
        check_split(job.engine, loaded.model, sequence, arguments.data.document_mask)
    return job, data


# -- the run ---------------------------------------------------------------------------------------------------------


def _train(arguments: Arguments, job: Job, data: RunData, place: Place, schedule: Schedule) -> dict[str, Any]:
    folder, ranks, steps = place.folder, place.ranks, schedule.total_steps
    state = job.state
    if ranks.is_first:
        resolved = {"world_size": ranks.world, "steps": steps, "deepspeed": job.engine.config, **data.train.identity}
        write_run_file(folder, dump(arguments), resolved)
    log = MetricsLog(folder, steps, ranks.is_first, state.step)
    if place.checkpoint is not None:
        log.say(_resumed(place.checkpoint, state, steps))
    state.total_steps = steps
    domains = domains_of(job.engine.module)
    read_as = eval_domains(arguments.adapter.eval_domains, list(data.evaluation), domains.names)
    if domains.names and read_as:
        log.say("evaluation sets are read as: " + ", ".join(f"{k}: {v or SHARED}" for k, v in read_as.items()))
    counter = CollectiveCounter(job.base_tensors.values())

    trainer = Trainer(
        share=Share(job.engine, arguments.training.ranks_per_replica, job.split),
        train_data=data.train,
        eval_data=data.evaluation,
        schedule=schedule,
        settings=_loop_settings(arguments, steps, _first_batch(arguments, place)),
        log=log,
        counter=counter,
        state=state,
        save=lambda now: job.save(now, arguments.training.save_total_limit),
        merger=job.remora,
        wait=job.wait,
        watch=_watch(arguments),
        domains=domains,
        eval_domains=read_as,
        alignment=job.alignment,
    )
    trainer.last_checkpoint = place.checkpoint
    nothing_to_do = trainer.is_finished
    state = trainer.run()
    summary = plain_json(_summary(job, state, trainer, counter))
    if ranks.is_first and not (nothing_to_do and (folder / SUMMARY_FILE).exists()):
        write_json_atomic(folder / SUMMARY_FILE, summary)
    if arguments.training.export_merged:
        assert trainer.last_checkpoint is not None, "a run ends with a checkpoint"
        log.say(f"writing the merged model to {folder / 'merged'}")
        job.export(trainer.last_checkpoint, folder / MERGED_FOLDER)
    log.close()
    ranks.barrier()
    return summary


def _evaluate(arguments: Arguments, job: Job, data: RunData, place: Place) -> dict[str, Any]:
    """--adapter none: the perplexities of the base, under the same names as any run's."""
    settings, counter = _loop_settings(arguments, 0, 0), CollectiveCounter()
    schedule = Schedule(ScheduleKind.CONSTANT, arguments.training.learning_rate, total_steps=1)
    if place.ranks.is_first:
        write_run_file(place.folder, dump(arguments), {"world_size": place.ranks.world, "steps": 0})
    log = MetricsLog(place.folder, 0, place.ranks.is_first, 0)
    share = Share(job.engine, arguments.training.ranks_per_replica, job.split)
    trainer = Trainer(
        share, data.train, data.evaluation, schedule, settings, log, counter, job.state, lambda now: place.folder
    )
    job.state.perplexity_before = trainer.evaluate()
    summary = plain_json(_summary(job, job.state, trainer, counter))
    if place.ranks.is_first:
        write_json_atomic(place.folder / SUMMARY_FILE, summary)
    log.close()
    place.ranks.barrier()
    return summary


def _first_batch(arguments: Arguments, place: Place) -> int:
    """How many batches the full-rank steps have used up."""
    return arguments.adapter.full_rank_steps if place.base is not None else 0


def _resumed(checkpoint: Path, state: TrainerState, steps: int) -> str:
    text = f"resumed from {checkpoint} at step {state.step}"
    if state.total_steps == steps:
        return text
    return (
        f"{text}; it was on its way to {state.total_steps} steps and has {steps} now: "
        "the learning rate follows the new length from here on"
    )


def _total_steps(arguments: Arguments, data: TrainData, world: int) -> int:
    training = arguments.training
    most = data.max_steps if isinstance(data, Mixture) else None
    if training.max_steps > 0:
        if most is not None and training.max_steps > most:
            raise UserError(
                f"--max_steps {training.max_steps}: all sources are used up after {most} steps, since each has its "
                "`epochs`: raise or drop one of them, or lower --max_steps"
            )
        return training.max_steps
    steps = max(1, math.ceil(training.num_train_epochs * data.n_blocks / rows_per_step(arguments, world)))
    return steps if most is None else min(steps, most)


def _loop_settings(arguments: Arguments, steps: int, first_batch: int) -> LoopSettings:
    training = arguments.training
    return LoopSettings(
        total_steps=steps,
        first_batch=first_batch,
        micro_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        eval_batch_size=training.per_device_eval_batch_size,
        logging_steps=training.logging_steps,
        eval_steps=training.eval_steps,
        eval_on_start=training.eval_on_start,
        max_eval_batches=training.max_eval_batches,
        save_steps=training.save_steps,
        others_rate=training.others_rate,
        merge_at_end=arguments.adapter.merge_at_end,
        stall=arguments.adapter.stall_rule(),
    )


def _watch(arguments: Arguments) -> Watch:
    return Watch.of(arguments.training.stop_when_forgotten, arguments.training.best_by)


def _summary(job: Job, state: TrainerState, trainer: Trainer, counter: CollectiveCounter) -> dict[str, Any]:
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "trainable_params": job.trainable_params,
        "total_params": job.total_params,
        "merges": len(state.merges),
        "perplexity_before": state.perplexity_before,
        "perplexity_after": state.perplexity_last,
        "perplexity_change_percent": change(state.perplexity_before, state.perplexity_last),
        **({"best_step": state.best_step} if state.best_step else {}),
        "bytes_gathered_per_step": trainer.bytes_gathered_per_step,
        "base_bytes_gathered": counter.base_bytes,
        "peak_memory_bytes": peak_memory_bytes(),
    }
