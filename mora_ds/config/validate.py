"""Every check of a run's settings that needs no file's contents, reported all at once.

Files, tokenizers and models are checked by the rooms that read them; the DeepSpeed JSON by `ds_config`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from mora_ds.adapters.config import INCREMENTAL_IN_8_BITS, LoRAConfig, MoRAConfig
from mora_ds.config.adapter import AdapterArguments, AdapterKind, MergePrecision, TPGrouping
from mora_ds.config.arguments import Arguments
from mora_ds.config.domains import domain_checks
from mora_ds.config.forgetting import Watch
from mora_ds.config.training import TrainingArguments
from mora_ds.config.validate_adapter import target_checks, vector_checks
from mora_ds.config.validate_run import data_checks, parallel_checks
from mora_ds.engine.ds_optimizer import OptimizerKind
from mora_ds.errors import Check, UserError, at_least, choice, member_named
from mora_ds.remora.optimizer_reset import OptimizerReset
from mora_ds.remora.schedule import MergeWhen, schedule_kind
from mora_ds.remora.stall import StallSignal

_UNKNOWN_LENGTH = 2**62
"""Stands for the number of steps of a run that only the data will tell."""


def validate(arguments: Arguments) -> None:
    """Raises one `UserError` that lists everything wrong with `arguments`, one problem a line."""
    checks = [
        *data_checks(arguments),
        *_adapter(arguments.adapter),
        *domain_checks(arguments.adapter, arguments.data, arguments.training),
        *target_checks(arguments.adapter),
        *vector_checks(arguments.adapter, arguments.training),
        *_parts(arguments),
        *_steps(arguments.training),
        *_forgetting(arguments.training),
        *_optimizer(arguments),
        *parallel_checks(arguments),
    ]
    problems = [message for wrong, message in checks if wrong]
    problems += _refusals(arguments)
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


def _adapter(adapter: AdapterArguments) -> Iterator[Check]:
    yield choice("adapter", adapter.adapter, AdapterKind)
    yield choice("optimizer_reset", adapter.optimizer_reset, OptimizerReset)
    yield choice("merge_precision", adapter.merge_precision, MergePrecision)
    stalled = adapter.merge_when == MergeWhen.STALLED.value
    control = adapter.adapter in (AdapterKind.FULL.value, AdapterKind.NONE.value)
    yield (
        control and (adapter.merge_every > 0 or adapter.merge_at_end or stalled),
        f"--adapter {adapter.adapter} has nothing to merge: drop --merge_every, --merge_when and --merge_at_end",
    )
    yield from _new_embeddings(adapter, control)
    eight_bits = adapter.base_bits == 8
    yield eight_bits and control, f"--base_bits 8: --adapter {adapter.adapter} has no weight frozen beside an adapter"
    yield eight_bits and adapter.merge_precision == MergePrecision.INCREMENTAL.value, INCREMENTAL_IN_8_BITS
    yield adapter.full_rank_steps < 0, at_least("full_rank_steps", 0, adapter.full_rank_steps)
    yield (
        control and adapter.full_rank_steps > 0,
        f"--full_rank_steps come before an adapter, and there is none with --adapter {adapter.adapter}",
    )
    rate = adapter.full_rank_learning_rate
    yield rate is not None and not 0 < rate < float("inf"), f"--full_rank_learning_rate must be above 0, got {rate}"
    for name in ("stall_signal", "stall_window", "stall_tolerance", "merge_at_latest"):
        changed = getattr(adapter, name) != getattr(AdapterArguments, name)
        yield changed and not stalled, f"--{name} is for --merge_when stalled, and it is {adapter.merge_when}"
    yield (
        stalled and adapter.adapter == AdapterKind.LORA.value and adapter.stall_signal == StallSignal.UPDATE.value,
        "--stall_signal update reads the norm of the squares from 0 upwards, and LoRA's A starts elsewhere: use loss",
    )
    useless = adapter.restart_warmup_steps + adapter.stall_window
    yield (
        stalled and 0 < adapter.merge_at_latest <= useless,
        f"--merge_at_latest {adapter.merge_at_latest} must be more than --restart_warmup_steps and --stall_window "
        f"together, {useless}: no cycle would be judged",
    )


def _new_embeddings(adapter: AdapterArguments, control: bool) -> Iterator[Check]:
    flag, wanted = "--train_new_embeddings", adapter.train_new_embeddings
    yield wanted and control, f"{flag}: --adapter {adapter.adapter} leaves no row frozen beside others that are trained"
    yield (
        wanted and (adapter.train_embeddings or adapter.train_head),
        f"{flag} trains the new rows alone, --train_embeddings and --train_head train them all: choose",
    )
    yield wanted and adapter.full_rank_steps > 0, f"{flag}: --full_rank_steps train every row first: choose"


def _parts(arguments: Arguments) -> Iterator[Check]:
    """What the part of a run that --adapter or --full_rank_steps leave out would have done."""
    adapter, training = arguments.adapter, arguments.training
    nothing = adapter.adapter == AdapterKind.NONE.value
    yield nothing and training.export_merged, "--adapter none trains nothing: drop --export_merged"
    yield (
        nothing and training.resume_from_checkpoint is not None,
        "--adapter none trains nothing: there is nothing to resume, drop --resume_from_checkpoint",
    )
    yield (
        adapter.full_rank_steps > 0 and training.max_steps <= adapter.full_rank_steps,
        f"--full_rank_steps {adapter.full_rank_steps} must be less than --max_steps, got {training.max_steps}",
    )


def _steps(training: TrainingArguments) -> Iterator[Check]:
    for name in (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "sequence_parallel_size",
    ):
        yield getattr(training, name) < 1, at_least(name, 1, getattr(training, name))
    yield training.logging_steps < 1, at_least("logging_steps", 1, training.logging_steps)
    for name in ("eval_steps", "save_steps", "seed"):
        yield getattr(training, name) < 0, at_least(name, 0, getattr(training, name))
    for name in ("save_total_limit", "max_eval_batches"):
        value = getattr(training, name)
        yield value is not None and value < 1, at_least(name, 1, value)
    yield (
        training.max_steps != -1 and training.max_steps < 1,
        f"--max_steps must be at least 1, or -1 for --num_train_epochs to decide, got {training.max_steps}",
    )
    yield (
        training.max_steps == -1 and not 0 < training.num_train_epochs < float("inf"),
        f"--num_train_epochs must be above 0, got {training.num_train_epochs}",
    )
    timeout = training.collective_timeout_s
    yield (
        timeout is not None and not 0 < timeout < float("inf"),
        f"--collective_timeout_s must be above 0, got {timeout}",
    )
    yield (
        training.overwrite_output_dir and training.resume_from_checkpoint is not None,
        "--overwrite_output_dir would delete what --resume_from_checkpoint needs: give one of them",
    )


def _forgetting(training: TrainingArguments) -> Iterator[Check]:
    for name in ("stop_when_forgotten", "best_by"):
        given = bool(getattr(training, name))
        yield given and training.eval_steps == 0, f"--{name} looks at evaluations: give --eval_steps"
    yield (
        bool(training.stop_when_forgotten) and not training.eval_on_start,
        "--stop_when_forgotten compares with the start: drop --no_eval_on_start",
    )


def _optimizer(arguments: Arguments) -> Iterator[Check]:
    training = arguments.training
    yield choice("optimizer", training.optimizer, OptimizerKind)
    muon = training.optimizer == OptimizerKind.MUON.value
    yield (
        muon and arguments.adapter.adapter != AdapterKind.MORA.value,
        "--optimizer muon is for squares: --adapter mora, or --optimizer adamw",
    )
    for name in ("learning_rate", "muon_learning_rate"):
        value = getattr(training, name)
        yield not 0 < value < float("inf"), f"--{name} must be above 0, got {value}"
    yield from _embedding_rate(arguments)
    yield training.bf16 and training.fp16, "--bf16 and --fp16: give one of them"
    for name in ("adam_beta1", "adam_beta2", "muon_momentum"):
        value = getattr(training, name)
        yield not 0 <= value < 1, f"--{name} must be at least 0 and below 1, got {value}"
    for name in ("weight_decay", "max_grad_norm"):
        value = getattr(training, name)
        yield not 0 <= value < float("inf"), f"--{name} must not be negative, got {value}"
    yield not training.adam_epsilon > 0, f"--adam_epsilon must be above 0, got {training.adam_epsilon}"
    yield (
        not 0 <= training.warmup_ratio < 1,
        f"--warmup_ratio must be at least 0 and below 1, got {training.warmup_ratio}",
    )
    yield (
        training.warmup_steps > 0 and training.warmup_ratio > 0,
        "--warmup_steps and --warmup_ratio: give one of them",
    )


def _embedding_rate(arguments: Arguments) -> Iterator[Check]:
    adapter, rate = arguments.adapter, arguments.training.embedding_learning_rate
    if rate is None:
        return
    yield not 0 < rate < float("inf"), f"--embedding_learning_rate must be above 0, got {rate}"
    yield (
        adapter.adapter in (AdapterKind.FULL.value, AdapterKind.NONE.value),
        f"--embedding_learning_rate is for what is trained beside an adapter, and --adapter is {adapter.adapter}",
    )
    beside = adapter.train_embeddings or adapter.train_new_embeddings or adapter.train_norms or adapter.train_head
    yield (
        not beside,
        "--embedding_learning_rate: nothing is trained beside the adapter; give --train_embeddings, or one like it",
    )
    yield (
        adapter.domain_adapters,
        "--embedding_learning_rate would be that of the domains' squares too: leave it out with --domain_adapters",
    )


def _refusals(arguments: Arguments) -> list[str]:
    """What the schedule and the adapter's config refuse, asked for one part at a time so that one hides no other."""
    adapter = arguments.adapter
    training = arguments.training
    rank = max(adapter.mora_rank, 1)
    steps = training.max_steps - adapter.full_rank_steps if training.max_steps > 0 else _UNKNOWN_LENGTH
    ratio = training.warmup_ratio if 0 <= training.warmup_ratio < 1 else 0.0
    when = adapter.merge_when if adapter.merge_when in list(MergeWhen) else MergeWhen.STEPS.value
    tamed = replace(training, lr_scheduler_type="constant", warmup_ratio=ratio)
    tamed = replace(tamed, learning_rate=1.0, muon_learning_rate=1.0)  # `_optimizer` looks at the rates
    ramps = replace(arguments, training=tamed, adapter=replace(adapter, merge_when=when))
    attempts: list[Callable[[], object]] = [
        lambda: MoRAConfig(rank=adapter.mora_rank),
        lambda: MoRAConfig(rank=rank, operator=adapter.operator, grouping=adapter.grouping),
        lambda: MoRAConfig(
            rank=rank, operator=adapter.operator, segments=int(adapter.tp_grouping == TPGrouping.ALIGNED.value)
        ),
        lambda: MoRAConfig(dropout=adapter.mora_dropout),
        lambda: MoRAConfig(rank=rank, operator=adapter.operator, compute=adapter.compute),
        lambda: MoRAConfig(rank=rank, operator=adapter.operator, vector_sets=adapter.subspace_cycles),
        lambda: MoRAConfig(base_bits=adapter.base_bits),
        lambda: MoRAConfig(target_modules=tuple(adapter.target_modules)),
        lambda: schedule_kind(training.lr_scheduler_type),
        lambda: ramps.schedule(max(steps, 1)),
        lambda: LoRAConfig(rank=rank if adapter.lora_rank is None else adapter.lora_rank),
        lambda: LoRAConfig(alpha=adapter.lora_alpha),
        lambda: member_named(MergeWhen, "merge_when", adapter.merge_when),
        lambda: adapter.stall_rule(),
        lambda: Watch.of(training.stop_when_forgotten, ()),
        lambda: Watch.of((), training.best_by),
    ]
    return [line for attempt in attempts for line in _refusal_of(attempt)]


def _refusal_of(attempt: Callable[[], object]) -> list[str]:
    try:
        attempt()
    except UserError as error:
        return str(error).splitlines()
    return []
