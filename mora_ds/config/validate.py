"""Checks of all settings that need no file's contents; every problem is reported at
once.

    settings without effect     effects.py
    limits of single values     here, `_LIMITS`
    other rules of a group      `problems()` of its class
    several groups at once      here

Files, tokenizers and models are checked where they are read; DeepSpeed's JSON file by
`engine/ds_config.py`.
"""

from collections.abc import Iterator
from enum import Enum
from types import SimpleNamespace

from mora_ds.adapters.registry import Capability, Control, unsupported
from mora_ds.common.errors import (
    BELOW_1,
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SECONDS,
    Bounds,
    raise_validation_errors,
    validation_errors_of,
    wrong_values,
)
from mora_ds.config.adapter import AdapterArguments
from mora_ds.config.arguments import Arguments, dump
from mora_ds.config.data import DataArguments, ModelArguments
from mora_ds.config.effects import unused_options
from mora_ds.config.flags import Settings
from mora_ds.config.lr_schedule import conflicts
from mora_ds.config.mixture import mixture_config
from mora_ds.config.research import research_problems
from mora_ds.config.training import TrainingArguments
from mora_ds.engine.settings import BaseDevice, OptimizerKind
from mora_ds.parallel.limits import sequence_parallel_problems, tensor_parallel_problems
from mora_ds.runtime.log_setup import LogLevel

_UNKNOWN_LENGTH = 2**62
"""Stands for the number of steps of a run that depends on the data."""

_RATE = Bounds(above=0, most=1e30)
"""Of a learning rate: torch's AdamW takes no factors beyond fp32."""

_LIMITS: dict[str, Bounds | type[Enum]] = {
    "train_tokenizer_vocab": Bounds(least=0, most=10_000_000),
    "lora_alpha": POSITIVE,
    "merge_every": NOT_NEGATIVE,
    "restart_warmup_steps": NOT_NEGATIVE,
    "seq_len": Bounds(least=2),
    "preprocessing_workers": COUNT,
    "held_out_share": BELOW_1,
    "shuffle_buffer": NOT_NEGATIVE,
    "tensor_parallel_size": COUNT,
    # All sequences of a micro-batch are in memory at a time.
    "per_device_train_batch_size": Bounds(least=1, most=1_000_000),
    "per_device_eval_batch_size": Bounds(least=1, most=1_000_000),
    "gradient_accumulation_steps": COUNT,
    "sequence_parallel_size": COUNT,
    "optimizer": OptimizerKind,
    "learning_rate": _RATE,
    "embedding_learning_rate": _RATE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": BELOW_1,
    "adam_beta2": BELOW_1,
    "adam_epsilon": POSITIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "log_level": LogLevel,
    "base_device": BaseDevice,
    "logging_steps": COUNT,
    "profile": COUNT,
    "eval_steps": NOT_NEGATIVE,
    "max_eval_batches": COUNT,
    "eval_tasks_steps": NOT_NEGATIVE,
    "save_steps": NOT_NEGATIVE,
    "save_total_limit": COUNT,
    # Torch's generators take 64 bits, of which 16 tell the replicas apart.
    "seed": Bounds(least=0, below=2**48),
    "collective_timeout_s": Bounds(least=1, most=SECONDS.most),
}
"""Setting -> the limits of its number, or the enum of its words."""

_EXCLUSIVE = (
    "model_name_or_path model_config",
    "tokenizer_name train_tokenizer_vocab",
    "train_files dataset_name",
    "mixture train_files",
    "mixture dataset_name",
    "bf16 fp16",
    "overwrite_output_dir resume_from_checkpoint",
    "train_new_embeddings train_embedding_rank",
    "train_new_embeddings train_embeddings",
    "train_new_embeddings train_head",
    "train_embedding_rank train_embeddings",
    "train_embedding_rank train_head",
)
"""Pairs of settings of which a run has one at most."""


def validate(arguments: Arguments) -> None:
    """Raise one `UserError` that lists everything wrong with `arguments`, one problem a
    line; where nothing is, the settings that have no effect."""
    training = arguments.training
    adapter = arguments.adapter
    schedule = arguments.schedule
    # The steps of --decay_from come after the warm-up, which they need not hold.
    has_length = training.max_steps > 0 and schedule.decay_from is None
    steps = training.max_steps if has_length else _UNKNOWN_LENGTH
    settings = dump(arguments)
    problems = list(wrong_values(SimpleNamespace(**settings), _LIMITS))
    for group in (arguments.model, arguments.data, adapter, training, schedule):
        problems += group.problems()
    problems += _both_given(settings)
    if arguments.research:
        problems += research_problems(arguments)
    problems += _contradictions(arguments.model, adapter, arguments.data, training)
    if schedule.decay_from is not None and training.max_steps < 1:
        problems.append("--decay_from: give the steps of the decay with --max_steps")
    warmup_steps = schedule.first_warmup(steps)
    problems += conflicts(
        steps, warmup_steps, adapter.merge_every, adapter.restart_warmup_steps
    )
    raise_validation_errors(problems)
    raise_validation_errors(unused_options(arguments).values())


def _both_given(settings: Settings) -> Iterator[str]:
    for pair in _EXCLUSIVE:
        one, another = pair.split()
        if settings[one] and settings[another]:
            yield f"--{one} and --{another}: give one of them"


def _contradictions(
    model: ModelArguments,
    adapter: AdapterArguments,
    data: DataArguments,
    training: TrainingArguments,
) -> Iterator[str]:
    """One message for each setting of a group that those of another one do not go
    with."""
    muon = training.has_muon
    is_full = adapter.adapter == Control.FULL
    uploads_adapter = training.push_to_hub and not training.export_merged
    names_tokenizer = (
        model.model_name_or_path or model.tokenizer_name or model.train_tokenizer_vocab
    )
    wrong_sources = validation_errors_of(mixture_config, data)
    streams = not wrong_sources and mixture_config(data).streams
    rules = {
        "--push_to_hub: --adapter full has no adapter to upload; add --export_merged": (
            is_full and uploads_adapter
        ),
        "--optimizer muon is for single MoRA matrices, and --target_modules names experts: use --optimizer adamw": (
            muon and adapter.adapts_experts
        ),
        "--model_name_or_path without --train_files or --dataset_name: nothing to train on": (
            model.model_name_or_path and not data.names_text and not training.dry_run
        ),
        "--train_files or --dataset_name without a model: give --model_name_or_path or --model_config": (
            data.names_text and not model.is_named
        ),
        "--model_config comes without a tokenizer: give --tokenizer_name or --train_tokenizer_vocab": (
            data.names_text and model.model_config and not names_tokenizer
        ),
        "--eval_tasks: a task file can run code, such as that of its templates: allow it with --trust_remote_code": (
            any(name.endswith((".yaml", ".yml")) for name in training.eval_tasks)
            and not model.trust_remote_code
        ),
        "--streaming: the length of a stream is unknown, so give the number of steps with --max_steps": (
            streams and training.max_steps < 1
        ),
        "--held_out_share reads the complete text before training, which --streaming does not: name held-out text with "
        "--eval_files": (streams and data.held_out_share > 0),
        "--train_tokenizer_vocab reads the complete text before training, which --streaming does not: give "
        "--tokenizer_name": (streams and model.train_tokenizer_vocab > 0),
    }
    for message, is_broken in rules.items():
        if is_broken:
            yield message
    yield from wrong_sources
    if muon:
        yield from unsupported(adapter.adapter, Capability.MUON, "--optimizer muon")
    yield from sequence_parallel_problems(
        training.sequence_parallel_size, data.seq_len, model.attn_implementation
    )
    yield from tensor_parallel_problems(
        training.tensor_parallel_size,
        adapter=adapter.adapter,
        dropout={"--mora_dropout": adapter.mora_dropout},
        base_bits=adapter.base_bits,
        sequence=training.sequence_parallel_size,
        experts=adapter.adapts_experts,
        muon=muon,
        streams_base=training.base_device == BaseDevice.HOST,
    )
