"""Checks of the settings that have a run read singular vectors of the base: subspace operator, alignment loss."""

from __future__ import annotations

from collections.abc import Iterator

from mora_ds.adapters.config import ALL_LINEAR
from mora_ds.adapters.ops.subspace import SUBSPACE
from mora_ds.adapters.target_plan import AUTO, parse_budget
from mora_ds.config.adapter import AdapterArguments, AdapterKind
from mora_ds.config.training import TrainingArguments
from mora_ds.errors import UserError


def target_checks(adapter: AdapterArguments) -> Iterator[tuple[bool, str]]:
    """Pairs (whether it is wrong, what to say then), for `validation`."""
    targets, budget = adapter.targets, adapter.trainable_budget
    yield (
        targets is not None and adapter.adapter != AdapterKind.MORA.value,
        f"--targets plans squares, and --adapter {adapter.adapter} has none: --target_modules chooses its layers",
    )
    yield targets == AUTO and budget is None, "--targets auto: give --trainable_budget, such as 0.5%"
    yield budget is not None and targets != AUTO, "--trainable_budget is for --targets auto; a plan's file has sides"
    from_file = targets not in (None, AUTO)
    yield (
        from_file and adapter.target_modules != [ALL_LINEAR],
        f"--targets {targets} names the layers itself: drop --target_modules",
    )
    yield (
        from_file and adapter.full_rank_steps > 0,
        f"--targets {targets} is for a model that --full_rank_steps change first: use --targets auto",
    )
    if budget is not None:
        try:
            parse_budget(budget)
        except UserError as error:
            yield True, str(error)


def vector_checks(adapter: AdapterArguments, training: TrainingArguments) -> Iterator[tuple[bool, str]]:
    """(whether it is wrong, what to say then). What needs the layers' sides is checked by `run_vectors`."""
    yield from _subspace(adapter, training)
    yield from _alignment(adapter, training)


def _subspace(adapter: AdapterArguments, training: TrainingArguments) -> Iterator[tuple[bool, str]]:
    wanted, squares = adapter.operator == SUBSPACE, adapter.adapter == AdapterKind.MORA.value
    yield wanted and not squares, f"--operator subspace is for squares, and --adapter is {adapter.adapter}"
    yield (
        adapter.subspace_cycles != 1 and not squares,
        f"--subspace_cycles is for squares, and --adapter is {adapter.adapter}",
    )
    degree = training.tensor_parallel_size
    yield (
        wanted and degree > 1,
        f"--tensor_parallel_size {degree}: --operator subspace reads whole inputs, and no rank of a group has them: "
        "leave it at 1",
    )


def _alignment(adapter: AdapterArguments, training: TrainingArguments) -> Iterator[tuple[bool, str]]:
    weight, wanted = adapter.alignment_weight, adapter.alignment_weight != 0
    yield not 0 <= weight < float("inf"), f"--alignment_weight must be at least 0 and finite, got {weight}"
    yield adapter.alignment_rank < 1, f"--alignment_rank must be at least 1, got {adapter.alignment_rank}"
    yield (
        adapter.alignment_rank != AdapterArguments.alignment_rank and not wanted,
        "--alignment_rank is for --alignment_weight, and it is 0",
    )
    yield (
        wanted and adapter.adapter != AdapterKind.MORA.value,
        f"--alignment_weight is for squares, and --adapter is {adapter.adapter}",
    )
    yield (
        wanted and training.tensor_parallel_size > 1,
        "--alignment_weight needs whole squares, and no rank of a --tensor_parallel_size above 1 has them",
    )
