"""Checks of ranks that share work, rows or layers. Asked by `validation`."""

from __future__ import annotations

from collections.abc import Iterator

from mora_ds.adapters.config import SPLIT_IN_8_BITS
from mora_ds.adapters.tp_plan import TPInputs
from mora_ds.checks import Check, at_least, choice
from mora_ds.config.adapter import AdapterArguments, AdapterKind, TPGrouping
from mora_ds.config.arguments import Arguments
from mora_ds.engine.ds_optimizer import OptimizerKind


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
