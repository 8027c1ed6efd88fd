"""Checks of the adapter's settings together with those of the run."""

from __future__ import annotations

from collections.abc import Iterator

from mora_ds.adapters.config import SPLIT_IN_8_BITS
from mora_ds.adapters.ops.subspace import SUBSPACE
from mora_ds.config.adapter import AdapterArguments, AdapterKind, TPGrouping
from mora_ds.config.training import TrainingArguments
from mora_ds.engine.ds_optimizer import OptimizerKind


def adapter_problems(adapter: AdapterArguments, training: TrainingArguments) -> Iterator[str]:
    """One message for each setting of the run that the adapter does not go with."""
    if adapter.adapter == AdapterKind.NONE.value:
        if training.export_merged:
            yield "--adapter none trains nothing: leave out --export_merged"
        if training.resume_from_checkpoint is not None:
            yield "--adapter none trains nothing, so there is nothing to resume: leave out --resume_from_checkpoint"
    if 0 < adapter.full_rank_steps >= training.max_steps:
        yield f"--full_rank_steps {adapter.full_rank_steps} must be less than --max_steps, got {training.max_steps}"
    if training.optimizer == OptimizerKind.MUON.value and adapter.adapter != AdapterKind.MORA.value:
        yield "--optimizer muon is for MoRA matrices: use --adapter mora, or --optimizer adamw"
    if training.embedding_learning_rate is not None:
        yield from _other_learning_rate(adapter)
    if training.tensor_parallel_size > 1:
        yield from _tensor_parallel(adapter, training)


def _other_learning_rate(adapter: AdapterArguments) -> Iterator[str]:
    flag = "--embedding_learning_rate"
    if adapter.is_control:
        yield f"{flag} is for parameters trained in addition to an adapter, and --adapter is {adapter.adapter}"
    if not adapter.trains_others:
        yield f"{flag}: only the adapter is trained; give --train_embeddings, or a flag like it"
    if adapter.domain_adapters:
        yield f"{flag} would hold for the domains' MoRA matrices too: leave it out with --domain_adapters"


def _tensor_parallel(adapter: AdapterArguments, training: TrainingArguments) -> Iterator[str]:
    """The number of processes, the heads and the matrices are checked where they are known: `parallel/topology.py`,
    `adapters/tp_plan.py`."""
    degree = training.tensor_parallel_size
    flag = f"--tensor_parallel_size {degree}"
    if adapter.adapter != AdapterKind.MORA.value:
        yield f"{flag} splits MoRA matrices, and --adapter {adapter.adapter} has none: leave it at 1"
    if adapter.tp_grouping == TPGrouping.ALIGNED.value and adapter.tp_segments % degree > 0:
        yield f"{flag} does not divide --tp_segments {adapter.tp_segments}: a segment belongs to one rank"
    if adapter.operator == SUBSPACE:
        yield f"{flag}: --operator subspace reads unsplit inputs, which no rank of a group has: leave it at 1"
    if adapter.alignment_weight != 0:
        yield f"{flag}: --alignment_weight needs unsharded MoRA matrices, which no rank of a group has: leave it at 1"
    if adapter.base_bits == 8:
        yield SPLIT_IN_8_BITS.format(degree)
    if adapter.train_new_embeddings:
        yield f"{flag} is not supported with --train_new_embeddings: leave it at 1"
    if adapter.full_rank_steps > 0:
        yield f"{flag}: --full_rank_steps train every parameter under plain ZeRO: leave it at 1"
    if adapter.mora_dropout > 0:
        yield f"{flag}: each rank of a group would draw a different mask, so --mora_dropout must be 0"
    if training.sequence_parallel_size > 1:
        yield f"{flag} and --sequence_parallel_size {training.sequence_parallel_size}: use one of them"
    if training.optimizer == OptimizerKind.MUON.value:
        yield f"{flag}: --optimizer muon orthogonalises unsharded MoRA matrices, which no rank has: use adamw"
