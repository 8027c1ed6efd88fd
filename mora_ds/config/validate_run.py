"""Checks of the settings of model, text and run together."""

from __future__ import annotations

from collections.abc import Iterator

from mora_ds.common.errors import UserError
from mora_ds.config.data import DataArguments, ModelArguments
from mora_ds.config.mixture import mixture_plan
from mora_ds.config.training import TrainingArguments
from mora_ds.parallel.limits import sequence_parallel_problems


def run_problems(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> Iterator[str]:
    """One message for each contradiction between the settings of the three groups."""
    yield from sequence_parallel_problems(training.sequence_parallel_size, data.seq_len, model.attn_implementation)
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
    if plan is not None and plan.streams:
        yield from _streaming(model, data, training)


def _streaming(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> Iterator[str]:
    if training.max_steps < 1:
        yield "--streaming: the length of a stream is unknown, so give the number of steps with --max_steps"
    if data.held_out_share > 0:
        yield (
            "--held_out_share reads the complete text before training, which --streaming does not: name held-out text "
            "with --eval_files, and keep it out of training with --exclude_eval_documents"
        )
    if model.train_tokenizer_vocab > 0:
        yield (
            "--train_tokenizer_vocab reads the complete text before training, which --streaming does not: give "
            "--tokenizer_name"
        )
