"""The main job, from settings to a summary.

    settings -> output folder -> tokenizer and tokens -> base -> adapter -> engine -> (resume) -> preflight
    -> Trainer.run -> export

What the user can get wrong is found in this order, cheapest first; no step is trained
before all of it is checked.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

from mora_ds.adapters.nf4 import check_installed as check_bitsandbytes
from mora_ds.checkpoint.layout import (
    AUTO,
    CHECKPOINTS,
    MERGED_FOLDER,
    SUMMARY_FILE,
    is_step_name,
    step_of,
)
from mora_ds.checkpoint.manager import (
    complete_checkpoints,
    name_checkpoints,
    resume_checkpoint,
)
from mora_ds.checkpoint.state import TrainerState, check_world_size
from mora_ds.checkpoint.storage import local_copy, located, storage_of
from mora_ds.common.errors import NonFatalFailure, UserError, named_as_flags
from mora_ds.common.fetched import fetch_into, local, with_urls
from mora_ds.common.files import MANIFEST, JsonObject, sha256_file, write_json_atomic
from mora_ds.common.untrusted import expanded, is_url
from mora_ds.config.arguments import Arguments, dump
from mora_ds.config.forgetting import Watch, change
from mora_ds.config.lr_schedule import Schedule
from mora_ds.config.research import TARGETS
from mora_ds.config.training import NO_TRACKER, TrainingArguments
from mora_ds.data import Mixture
from mora_ds.deploy.hub import push_adapter, push_folder
from mora_ds.engine.device import is_cpu
from mora_ds.engine.ds_config import compute_dtype
from mora_ds.models.attention import use_document_attention, why_dense
from mora_ds.models.loss import chunk_loss, is_frozen
from mora_ds.parallel.ulysses import check_config
from mora_ds.runtime.nodes import check_shared
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.base import choose_base_device, find_model, prepare_base
from mora_ds.train.data import RunData, cache_folder, load_data
from mora_ds.train.inputs import check_inputs
from mora_ds.train.metrics import MetricsLog, without_nan
from mora_ds.train.non_fatal import non_fatal
from mora_ds.train.output_folder import abandon, join, names_of_run, reserve
from mora_ds.train.preflight import preflight
from mora_ds.train.remote_folder import RemoteFolder, remote_folder
from mora_ds.train.run_file import changed_settings, write_run_file
from mora_ds.train.screen import opening
from mora_ds.train.setup import RunContext, engine_config
from mora_ds.train.start_up import start_up
from mora_ds.train.tasks import check_tasks, task_names
from mora_ds.train.trackers import Tracker, check_destinations
from mora_ds.train.trainer import Trainer
from mora_ds.train.training_setup import TrainingSetup

logger = logging.getLogger(__name__)

DECAY = "--decay_from"
BRANCH_STEP = "decay_from"
"""Key of an identity: the step of the checkpoint of --decay_from."""
BRANCH_PARENT = "decay_parent"
"""Key of an identity: the hash of that checkpoint's manifest."""


def pretrain(arguments: Arguments, ranks: Ranks) -> JsonObject:
    """Run the job that valid `arguments` describe, on this process of all `ranks`.
    Returns the content of `summary.json`.

    Raises `UserError` before anything expensive for what the user can correct, and the
    output folder is then as it was; `RunError` for failures during the run.
    """
    training = arguments.training
    fetch_into(cache_folder(arguments.data))
    with start_up():
        check_destinations(training)
        if arguments.adapter.base_bits == 4:
            with named_as_flags("base_bits"):
                check_bitsandbytes()
    with remote_folder(arguments, ranks) as remote:
        with start_up():
            setup, schedule = _prepare(arguments, ranks, remote)
        return _run(arguments, setup, schedule)


def _prepare(
    arguments: Arguments, ranks: Ranks, remote: RemoteFolder | None
) -> tuple[TrainingSetup, Schedule]:
    """Everything before the first step. Collective: an error of one rank is one of
    all."""
    model = arguments.model
    adapter = arguments.adapter
    training = arguments.training
    ds_config = engine_config(training, adapter.adapter, ranks.world)
    if training.eval_tasks:
        ranks.run_on_rank0("tasks", lambda: check_tasks(training.eval_tasks), long=True)
    with _output_folder(arguments, ranks, remote) as context:
        folder, config = find_model(model, context)
        check_config(config, training.sequence_parallel_size, model.implementation)
        # Torch's FlexAttention has no backward pass on CPUs.
        if model.implementation == "flex_attention" and is_cpu():
            raise UserError(
                "--attn_implementation flex_attention trains only on a GPU: leave it at auto"
            )
        arguments = choose_base_device(arguments, config, ds_config, ranks)
        dtype = compute_dtype(ds_config)
        data = load_data(model, arguments.data, training, folder, config, context)
        _check_evaluation_sets(arguments, data)
        loaded = prepare_base(model, training, folder, data.tokenizer, dtype, context)
        if reason := why_dense(config, model.implementation):
            logger.info(f"attention: dense, because {reason}")
        else:
            use_document_attention(loaded.model)
        setup = TrainingSetup(arguments, loaded, ds_config, data, context)
        # A run that resumes goes on as it began: the two ways to compute the loss round
        # differently. A new one takes chunks where they cost nothing.
        if context.checkpoint is None:
            setup.state.chunked_loss = is_frozen(loaded.model.get_output_embeddings())
        setup.state.chunked_loss |= training.chunked_loss
        if setup.state.chunked_loss:
            chunk_loss(loaded.model)
        preflight(setup, arguments)
        decay_start = context.branch.get(BRANCH_STEP)
        steps = _total_steps(training, data.train, ranks.world, decay_start or 0)
        schedule = arguments.schedule_of(steps, decay_start)
        if context.state is not None and context.state.step > schedule.total_steps:
            raise UserError(
                f"{context.checkpoint} is already beyond this run's {schedule.total_steps} steps: raise --max_steps or "
                "--num_train_epochs"
            )
        ranks.barrier("end of all checks", long=True)
        if context.checkpoint is None:
            setup.start_cycle()
        if ranks.is_rank0:
            _record(arguments, setup, _steps(setup, schedule))
    return setup, schedule


def _record(arguments: Arguments, setup: TrainingSetup, steps: int) -> None:
    """Write the run's run.yaml, and log what has changed since its last start."""
    context = setup.context
    settings = dump(arguments)
    facts = {"world_size": context.ranks.world, "steps": steps}
    if setup.is_trained:
        facts |= {"deepspeed": setup.engine.config, **setup.data.train.identity}
    if context.checkpoint is not None:
        run_folder = context.checkpoint.resolve().parents[1]
        if changes := changed_settings(run_folder, settings):
            logger.info(f"changed since the run was last started: {', '.join(changes)}")
    names = names_of_run(context.folder, arguments.training.export_merged)
    write_run_file(context.folder, settings, facts, names)


def _steps(setup: TrainingSetup, schedule: Schedule) -> int:
    return schedule.total_steps if setup.is_trained else 0


# -- the output folder -----------------------------------------------------------------


@contextmanager
def _output_folder(
    arguments: Arguments, ranks: Ranks, remote: RemoteFolder | None
) -> Iterator[RunContext]:
    """Reserve --output_dir and find the checkpoint to resume from. Collective.

    The folder becomes the run's when the block has passed, and is as it was when the
    block raises.
    """
    folder = remote.folder if remote else arguments.training.output_dir
    root = expanded(folder, "--output_dir")
    targets = None
    if arguments.research:
        from mora_ds.research.targets import TargetPlan, target_plan_of

        def plan_facts() -> JsonObject | None:
            plan = target_plan_of(arguments)
            return None if plan is None else asdict(plan)

        # It may lie in the folder
        facts = ranks.run_on_rank0(TARGETS, plan_facts)
        targets = None if facts is None else TargetPlan(**facts)

    def reserved() -> tuple[str | None, JsonObject | None, JsonObject]:
        found, saved, branch = _reserve(arguments, root, ranks.world)
        # A checkpoint at a URL may have another path on another node
        return None if found is None else with_urls(found), saved, branch

    try:
        beginning = ranks.run_on_rank0("output folder", reserved, long=True)
        if not ranks.is_rank0:
            join(root)
        check_shared(root, ranks, "--cache_dir" if remote else "--output_dir")
        found, saved, branch = beginning

        def own_copy() -> Path | None:
            return None if found is None else root / local(found)

        checkpoint = ranks.agree("checkpoint on every node", own_copy, long=True)
        state = None if saved is None else TrainerState(**saved)
        yield RunContext(ranks, root, checkpoint, state, branch, targets, remote)
    except BaseException:
        abandon(root)
        raise

    def begin() -> None:
        reserve(root).commit()
        if remote is not None:
            remote.begin(arguments.training.overwrite_output_dir)
        _begin_checkpoints(root / CHECKPOINTS, checkpoint, state)

    ranks.run_on_rank0("beginning of the run", begin, long=True)


Beginning = tuple[Path | None, TrainerState | None, JsonObject]
"""The checkpoint that a run starts from, if any, with its state, and what identifies
the checkpoint of --decay_from."""


def _reserve(
    arguments: Arguments, folder: Path, world: int
) -> tuple[Path | None, JsonObject | None, JsonObject]:
    """Reserve the output folder, and find what the run starts from: a `Beginning`, the
    state as JSON, a checkpoint in the folder by its path there, as other nodes may have
    mounted it elsewhere. On rank 0; the caller gives the folder up where this raises.
    """
    training = arguments.training
    root = folder / CHECKPOINTS
    check_inputs(arguments, folder)
    reservation = reserve(folder)
    storage_of(root).repair()
    checkpoint, state, branch = _resumed(training, root)
    continues = training.resume_from_checkpoint == AUTO
    own = None
    if checkpoint is not None and checkpoint.parent.resolve() == root.resolve():
        continues = True
        own = Path(CHECKPOINTS, checkpoint.name)
    decay_from = arguments.schedule.decay_from
    if decay_from is not None:
        branch = _branch_identity(decay_from, branch)
        if checkpoint is None:
            checkpoint, state = _branch(decay_from, branch, root)
    if checkpoint is not None and state is not None:
        check_world_size(checkpoint, state, world // training.ranks_per_replica)
    reservation.prepare(
        training.overwrite_output_dir, continues, training.export_merged
    )
    return own or checkpoint, None if state is None else asdict(state), branch


def _resumed(training: TrainingArguments, root: Path) -> Beginning:
    """What --resume_from_checkpoint means, and the branch that it is of."""
    wanted = training.resume_from_checkpoint
    checkpoint = resume_checkpoint(wanted, root) if wanted else None
    if checkpoint is None:
        return None, None, {}
    state = TrainerState.read(local_copy(checkpoint))
    keys = (BRANCH_STEP, BRANCH_PARENT)
    branch = {key: state.identity[key] for key in keys if key in state.identity}
    return checkpoint, state, branch


def _branch_identity(decay_from: str, recorded: JsonObject) -> JsonObject:
    """What identifies the checkpoint of --decay_from. `recorded`: the same, of the
    branch that is resumed, whose parent may be gone once it has checkpoints of its
    own."""
    named = Path(decay_from)
    # A link, such as RUN/checkpoints/latest, may have moved on with the parent: a
    # branch that resumes goes by its record. A name with another step than that on
    # record is refused with what else differs (`check_identity`).
    if recorded and not is_step_name(named.name):
        return recorded
    if recorded and is_url(decay_from):
        return {**recorded, BRANCH_STEP: step_of(named)}
    storage, name = located(local(decay_from, DECAY))
    if not is_step_name(name):
        raise UserError(
            f"{DECAY} {decay_from} must be a checkpoint, such as RUN/checkpoints/step-000500"
        )
    identity = {**recorded, BRANCH_STEP: step_of(storage.root / name)}
    manifest = f"{name}/{MANIFEST}"
    if storage.exists(manifest):
        identity[BRANCH_PARENT] = sha256_file(storage.open_read(manifest))
    return identity


def _branch(
    decay_from: str, branch: JsonObject, root: Path
) -> tuple[Path, TrainerState]:
    """The checkpoint of --decay_from, and its state as a branch with its checkpoints in
    `root` begins with it: without the parent's end and its failures. Raises `UserError`
    where no decay can begin there."""
    storage, name = located(local(decay_from, DECAY))
    checkpoint = resume_checkpoint(str(storage.root / name), root, DECAY)
    assert checkpoint is not None, "only auto may find none"
    state = TrainerState.read(local_copy(checkpoint))
    if not state.at_peak:
        raise UserError(
            f"{DECAY} {checkpoint}: its learning rate is not at the peak, and a decay must begin there"
        )
    if checkpoint.parent.resolve() == root.resolve():
        raise UserError(
            f"{DECAY} {checkpoint} lies in --output_dir: give the branch a folder of its own"
        )
    # The branch's own checkpoints have it in their identity; the parent's have not.
    identity = {**state.identity, **branch}
    branched = replace(state, identity=identity, failures=[], finished=False)
    return checkpoint, replace(branched, best_step=0, best_score=None)


def _begin_checkpoints(
    root: Path, checkpoint: Path | None, state: TrainerState | None
) -> None:
    """The run begins: an overwritten one loses the checkpoints that were not set aside
    with its folder; a resumed one has the links that it may have been killed before."""
    storage = storage_of(root)
    if checkpoint is not None and checkpoint.parent.resolve() == root.resolve():
        assert state is not None
        name_checkpoints(storage, checkpoint.name, state.best_step)
        return
    for folder in complete_checkpoints(root):
        storage.delete(folder.name)


# -- evaluation sets and steps ---------------------------------------------------------


def _check_evaluation_sets(arguments: Arguments, data: RunData) -> None:
    """Raise `UserError` for a name of both a set and a task, and for flags that name
    neither."""
    training = arguments.training
    sets = list(data.evaluation)
    tasks = task_names(training.eval_tasks)
    if both := sorted({*sets} & {*tasks}):
        raise UserError(
            f"--eval_files: {both[0]} is the name of a task of --eval_tasks; choose another name"
        )
    watch = Watch.of(training.stop_when_forgotten, training.best_by)
    watch.check_names([*sets, *tasks])


def _total_steps(
    training: TrainingArguments, data: Mixture, world: int, done: int
) -> int:
    """Optimizer steps by --max_steps, counted from step `done`, or --num_train_epochs,
    at most as many as there is data for."""
    limit = data.max_steps
    if training.max_steps > 0:
        steps = done + training.max_steps
        if limit is not None and steps > limit:
            raise UserError(
                f"--max_steps {training.max_steps}: all sources are used up after {limit} steps, since each has its "
                "`epochs`: raise or drop one of them, or lower --max_steps"
            )
        return steps
    # The number is read as a decimal: 1.1 times 10 sequences are 11, and not
    # 11.000000000000002.
    sequences = Fraction(repr(training.num_train_epochs)) * data.n_blocks
    steps = max(1, math.ceil(sequences / training.global_batch_size(world)))
    return steps if limit is None else min(steps, limit)


# -- the run ---------------------------------------------------------------------------


def _run(arguments: Arguments, setup: TrainingSetup, schedule: Schedule) -> JsonObject:
    """Train, or only evaluate the base; write summary.json, which is returned, and the
    merged model."""
    folder = setup.context.folder
    ranks = setup.context.ranks
    state = setup.state
    steps = _steps(setup, schedule)
    pending = ["merge"] if state.merge_pending else []
    if state.evaluation_pending:
        pending += ["eval_perplexity", "tasks"]
    # What was pending is logged again, so that its first point goes with those after
    # it.
    first_step = state.step + 1 if state.step and not pending else state.step
    trackers = []
    if ranks.is_rank0:
        for name in dict.fromkeys(arguments.training.report_to):
            if name != NO_TRACKER:
                settings = dump(arguments)
                tracker = Tracker(name, folder, settings, first_step, state.failures)
                trackers.append(tracker)
    log = MetricsLog(folder, steps, ranks.is_rank0, state.step, trackers, pending)
    if setup.context.checkpoint is not None:
        logger.info(f"resumed from {setup.context.checkpoint} at step {state.step}")
        if state.total_steps != steps:
            lengths = f"its length was {state.total_steps} steps and is {steps} now"
            logger.info(f"{lengths}: the learning rate follows the new length")
    state.total_steps = steps
    trainer = Trainer(setup, schedule, log)
    for line in opening(setup, steps):
        logger.info(line)
    was_finished = trainer.is_finished
    if setup.is_trained:
        trainer.run()
    else:
        state.perplexity_before = trainer.evaluator.evaluate()
    summary = _summary(setup, trainer)
    if ranks.is_rank0 and not (was_finished and (folder / SUMMARY_FILE).exists()):
        write_json_atomic(folder / SUMMARY_FILE, summary)
    if arguments.training.export_merged:
        assert trainer.last_checkpoint is not None, "a run ends with a checkpoint"
        merged = folder / MERGED_FOLDER
        logger.info(f"writing the merged model to {merged}")
        setup.run.export(trainer.last_checkpoint, merged, setup.data.tokenizer)
    setup.remove_sums()
    log.close()
    if arguments.training.push_to_hub is not None:
        assert trainer.last_checkpoint is not None
        _push(arguments.training, setup, trainer.last_checkpoint)
    if remote := setup.context.remote:
        remote.upload(ranks, state.failures, arguments.training.export_merged)
    failures = ranks.run_on_rank0("end of the run", lambda: state.failures, long=True)
    if failures:
        last = trainer.last_checkpoint or "none"
        done = f"the run is done, {last} is its last checkpoint"
        lines = "\n".join(f"  {failure}" for failure in failures)
        raise NonFatalFailure(f"{done}; failures outside training:\n{lines}")
    return summary


def _push(training: TrainingArguments, setup: TrainingSetup, checkpoint: Path) -> None:
    """--push_to_hub, whose failure does not end the run."""
    repository = str(training.push_to_hub)

    def push() -> None:
        with non_fatal("the upload to the Hub", setup.state.failures):
            if training.export_merged:
                logger.info(
                    push_folder(setup.context.folder / MERGED_FOLDER, repository)
                )
            else:
                logger.info(push_adapter(local_copy(checkpoint), repository))

    setup.context.ranks.run_on_rank0("upload to the Hub", push, long=True)


def _summary(setup: TrainingSetup, trainer: Trainer) -> JsonObject:
    state = setup.state
    summary = {
        "steps": state.step,
        "tokens": state.tokens,
        "trainable_params": setup.trainable_parameters,
        "total_params": setup.total_parameters,
        "merges": len(state.merges),
        "perplexity_before": state.perplexity_before,
        "perplexity_after": state.perplexity_last,
        "perplexity_change_percent": change(
            state.perplexity_before, state.perplexity_last
        ),
        "bytes_gathered_per_step": trainer.bytes_gathered_per_step,
        "base_bytes_gathered": trainer.counter.base_bytes,
        "peak_memory_bytes": trainer.memory.peak,
        "peak_memory_by_phase": trainer.memory.by_phase,
    }
    if setup.arguments.training.best_by:
        summary["best_step"] = state.best_step
    return dict(without_nan(summary))
