"""Checks of all settings that need no file's contents; every problem is reported at once.

    settings without effect     effects.py
    own values of a group       `problems()` of its class
    several groups at once      here

Files, tokenizers and models are checked where they are read; DeepSpeed's JSON file by `engine/ds_config.py`.
"""

from collections.abc import Iterator

from mora_ds.common import research
from mora_ds.common.errors import UserError, refuse
from mora_ds.config.adapter import AdapterArguments, AdapterKind
from mora_ds.config.arguments import Arguments
from mora_ds.config.data import DataArguments, ModelArguments
from mora_ds.config.effects import idle_settings
from mora_ds.config.mixture import mixture_plan
from mora_ds.config.training import TrainingArguments
from mora_ds.engine.device import BaseDevice
from mora_ds.engine.ds_optimizer import OptimizerKind
from mora_ds.parallel.limits import sequence_parallel_problems, tensor_parallel_problems
from mora_ds.remora.schedule import conflicts

_UNKNOWN_LENGTH = 2**62
"""Stands for the number of steps of a run that depends on the data."""


def validate(arguments: Arguments) -> None:
    """Raises one `UserError` that lists everything wrong with `arguments`, one problem a line; where nothing is, the
    settings that have no effect."""
    model = arguments.model
    adapter = arguments.adapter
    data = arguments.data
    training = arguments.training
    has_length = training.max_steps > 0 and training.decay_from is None  # a branch is past its warm-up
    steps = training.max_steps if has_length else _UNKNOWN_LENGTH
    refuse(
        [
            *model.problems(),
            *data.problems(),
            *adapter.problems(),
            *training.problems(),
            *_adapter_and_run(adapter, training),
            *(research.load("settings").problems(arguments) if arguments.research else ()),
            *_text_and_run(model, data, training),
            *conflicts(
                steps,
                training.first_warmup(steps),
                adapter.merge_every,
                adapter.restart_warmup_steps,
            ),
        ]
    )
    refuse(idle_settings(arguments).values())


def _adapter_and_run(adapter: AdapterArguments, training: TrainingArguments) -> Iterator[str]:
    """One message for each setting of the run that the adapter does not go with."""
    uses_muon = training.optimizer == OptimizerKind.MUON.value
    if adapter.adapter == AdapterKind.FULL.value and training.push_to_hub and not training.export_merged:
        yield "--push_to_hub: --adapter full has no adapter to upload; add --export_merged"
    if uses_muon and adapter.adapter not in (AdapterKind.MORA.value, AdapterKind.LORA.value):
        yield "--optimizer muon is for the matrices of an adapter: use --adapter mora or lora, or --optimizer adamw"
    if uses_muon and adapter.adapts_experts:
        yield "--optimizer muon is for single MoRA matrices, and --target_modules names experts: use --optimizer adamw"
    yield from tensor_parallel_problems(
        training.tensor_parallel_size,
        adapter=adapter.adapter,
        dropout={"--mora_dropout": adapter.mora_dropout},
        base_bits=adapter.base_bits,
        sequence=training.sequence_parallel_size,
        experts=adapter.adapts_experts,
        muon=uses_muon,
        streams_base=training.base_device == BaseDevice.HOST.value,
    )


def _text_and_run(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> Iterator[str]:
    """One message for each contradiction between the settings of the three groups."""
    yield from sequence_parallel_problems(
        training.sequence_parallel_size,
        data.seq_len,
        model.attn_implementation,
    )
    if model.model_name_or_path and not data.names_text and not training.dry_run:
        yield "--model_name_or_path without --train_files or --dataset_name: nothing to train on"
    if data.names_text and not model.is_named:
        yield "--train_files or --dataset_name without a model: give --model_name_or_path or --model_config"
    has_tokenizer = model.model_name_or_path or model.tokenizer_name or model.train_tokenizer_vocab
    if data.names_text and model.model_config and not has_tokenizer:
        yield "--model_config comes without a tokenizer: give --tokenizer_name or --train_tokenizer_vocab"
    try:
        plan = mixture_plan(data)
    except UserError as error:
        yield str(error)
        return
    if plan.streams:
        yield from _streaming(model, data, training)


def _streaming(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> Iterator[str]:
    if training.max_steps < 1:
        yield "--streaming: the length of a stream is unknown, so give the number of steps with --max_steps"
    if data.held_out_share > 0:
        yield (
            "--held_out_share reads the complete text before training, which --streaming does not: name held-out text "
            "with --eval_files"
        )
    if model.train_tokenizer_vocab > 0:
        yield (
            "--train_tokenizer_vocab reads the complete text before training, which --streaming does not: give "
            "--tokenizer_name"
        )
