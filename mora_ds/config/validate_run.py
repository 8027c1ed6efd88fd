"""Checks of what a run reads: model, tokenizer, text. Asked by `validation`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from mora_ds.adapters.config import SPLIT_IN_8_BITS
from mora_ds.config.adapter import AdapterArguments, AdapterKind, TPGrouping
from mora_ds.config.arguments import Arguments
from mora_ds.config.data import DataArguments
from mora_ds.config.mixture import mixture_plan
from mora_ds.engine.ds_optimizer import OptimizerKind
from mora_ds.errors import Check, UserError, at_least, choice, unknown
from mora_ds.parallel.saved_inputs import TPInputs


def parallel_checks(arguments: Arguments) -> Iterator[Check]:
    yield from _sequence(arguments)
    yield from _tensor_parallel(arguments)


def _sequence(arguments: Arguments) -> Iterator[Check]:
    size, attention = arguments.training.sequence_parallel_size, arguments.model.attn_implementation
    yield (
        size > 1 and arguments.data.seq_len % size != 0,
        f"--sequence_parallel_size {size} does not divide --seq_len {arguments.data.seq_len}",
    )
    yield (
        size > 1 and attention == "eager",
        "--sequence_parallel_size: --attn_implementation eager cannot be split over ranks; leave it to auto, or sdpa",
    )


def _tensor_parallel(arguments: Arguments) -> Iterator[Check]:
    """The world, the heads and the squares are looked at where they are known: `topology`, `tensor_plan`."""
    adapter, degree = arguments.adapter, arguments.training.tensor_parallel_size
    flag = f"--tensor_parallel_size {degree}"
    yield degree < 1, at_least("tensor_parallel_size", 1, degree)
    yield degree > 1 and adapter.train_new_embeddings, f"{flag} has not been tried with --train_new_embeddings"
    yield choice("tp_grouping", adapter.tp_grouping, TPGrouping)
    yield choice("tp_inputs", arguments.training.tp_inputs, TPInputs)
    yield adapter.tp_segments < 1, at_least("tp_segments", 1, adapter.tp_segments)
    aligned = adapter.tp_grouping == TPGrouping.ALIGNED.value
    yield (
        aligned and adapter.adapter != AdapterKind.MORA.value,
        f"--tp_grouping aligned is for squares, and --adapter is {adapter.adapter}",
    )
    yield (
        adapter.tp_segments != AdapterArguments.tp_segments and not aligned,
        "--tp_segments is for --tp_grouping aligned, and it is gather",
    )
    yield (
        aligned and degree > 1 and adapter.tp_segments % degree > 0,
        f"{flag} does not divide --tp_segments {adapter.tp_segments}: a segment belongs to one rank",
    )
    yield (
        degree > 1 and arguments.training.sequence_parallel_size > 1,
        f"{flag} and --sequence_parallel_size {arguments.training.sequence_parallel_size}: one of them at a time",
    )
    if degree > 1:
        yield from _split(arguments, flag)


def _split(arguments: Arguments, flag: str) -> Iterator[Check]:
    adapter = arguments.adapter
    yield (
        adapter.adapter != AdapterKind.MORA.value,
        f"{flag} splits squares, and --adapter {adapter.adapter} has none: leave it at 1",
    )
    yield adapter.base_bits == 8, SPLIT_IN_8_BITS.format(arguments.training.tensor_parallel_size)
    yield adapter.full_rank_steps > 0, f"{flag}: --full_rank_steps train every parameter under plain ZeRO, at 1 only"
    yield adapter.mora_dropout > 0, f"{flag}: every rank of a group would draw other masks, so --mora_dropout must be 0"
    yield (
        arguments.training.optimizer == OptimizerKind.MUON.value,
        f"{flag}: --optimizer muon makes whole squares orthogonal, and no rank has a whole one: use adamw",
    )


def data_checks(arguments: Arguments) -> Iterator[Check]:
    yield from _model_and_data(arguments)
    yield from _data(arguments.data)
    yield from _streaming(arguments)


def _model_and_data(arguments: Arguments) -> Iterator[Check]:
    model, data = arguments.model, arguments.data
    has_data = data.names_text
    named = model.model_name_or_path is not None
    yield named and model.model_config is not None, "--model_name_or_path and --model_config: give one of them"
    needs_data = not arguments.training.dry_run
    yield (
        named and not has_data and needs_data,
        "--model_name_or_path without --train_files or --dataset_name: nothing to train on",
    )
    yield (
        has_data and not named and model.model_config is None,
        "--train_files or --dataset_name without a model: give --model_name_or_path or --model_config",
    )
    yield bool(data.train_files and data.dataset_name), "--train_files and --dataset_name: give one of them"
    yield bool(data.eval_files) and not has_data, "--eval_files without --train_files or --dataset_name"
    trains_tokenizer = model.train_tokenizer_vocab != 0
    yield model.train_tokenizer_vocab < 0, at_least("train_tokenizer_vocab", 0, model.train_tokenizer_vocab)
    kinds, kind = ("bpe", "unigram"), model.train_tokenizer_type
    yield (
        kind not in kinds,
        unknown("--train_tokenizer_type", kind, kinds),
    )
    yield (
        trains_tokenizer and model.tokenizer_name is not None,
        "--tokenizer_name and --train_tokenizer_vocab: give one of them",
    )
    yield (
        has_data
        and not named
        and model.model_config is not None
        and not trains_tokenizer
        and model.tokenizer_name is None,
        "--model_config comes without a tokenizer: give --tokenizer_name or --train_tokenizer_vocab",
    )


def _data(data: DataArguments) -> Iterator[Check]:
    yield data.seq_len < 2, at_least("seq_len", 2, data.seq_len)
    yield data.preprocessing_workers < 1, at_least("preprocessing_workers", 1, data.preprocessing_workers)
    yield not data.text_column, "--text_column must not be empty"
    counts = Counter(name for name, _ in data.named_eval_files())
    twice = [name for name, count in counts.items() if count > 1]
    yield bool(twice), f"--eval_files: {', '.join(twice)} would name two sets; write NAME=PATH"


def _streaming(arguments: Arguments) -> Iterator[Check]:
    data = arguments.data
    yield (
        not 0 <= data.held_out_share < 1,
        f"--held_out_share must be at least 0 and below 1, got {data.held_out_share}",
    )
    yield data.shuffle_buffer < 0, at_least("shuffle_buffer", 0, data.shuffle_buffer)
    yield (
        not 0 <= data.stream_retry_s < float("inf"),
        f"--stream_retry_s must not be negative, got {data.stream_retry_s}",
    )
    yield bool(data.replay) and not data.names_text, "--replay without --train_files, --dataset_name or --mixture"
    yield data.exclude_eval_documents and not data.eval_files, "--exclude_eval_documents without --eval_files"
    try:
        plan = mixture_plan(data)
    except UserError as error:
        yield True, str(error)
        return
    if plan is None or not plan.streams:
        return
    yield (
        arguments.training.max_steps < 1,
        "--streaming: nobody knows how long a stream is, so the steps must be given with --max_steps",
    )
    yield (
        data.held_out_share > 0,
        "--held_out_share reads the whole text before training, which --streaming does not: name held-out text with "
        "--eval_files, and keep it out of training with --exclude_eval_documents",
    )
    yield (
        arguments.model.train_tokenizer_vocab > 0,
        "--train_tokenizer_vocab reads the whole text before training, which --streaming does not: --tokenizer_name",
    )
