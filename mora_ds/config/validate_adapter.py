"""Checks of the adapter's settings together with those of the run."""

from __future__ import annotations

from collections.abc import Iterator

from mora_ds.config.adapter import SEGMENTS, AdapterArguments, AdapterKind, TPGrouping
from mora_ds.config.training import TrainingArguments
from mora_ds.engine.base_device import BaseDevice
from mora_ds.engine.ds_optimizer import OptimizerKind
from mora_ds.parallel.limits import tensor_parallel_problems


def adapter_problems(adapter: AdapterArguments, training: TrainingArguments) -> Iterator[str]:
    """One message for each setting of the run that the adapter does not go with."""
    if adapter.adapter == AdapterKind.FULL.value and training.push_to_hub and not training.export_merged:
        yield "--push_to_hub: --adapter full has no adapter to upload; add --export_merged"
    if training.optimizer == OptimizerKind.MUON.value and adapter.adapter != AdapterKind.MORA.value:
        yield "--optimizer muon is for MoRA matrices: use --adapter mora, or --optimizer adamw"
    if training.optimizer == OptimizerKind.MUON.value and adapter.adapts_experts:
        yield "--optimizer muon is for single MoRA matrices, and --target_modules names experts: use --optimizer adamw"
    yield from _tensor_parallel(adapter, training)


def _tensor_parallel(adapter: AdapterArguments, training: TrainingArguments) -> Iterator[str]:
    return tensor_parallel_problems(
        training.tensor_parallel_size,
        adapter=adapter.adapter,
        operator=adapter.operator or "",
        dropout={"--mora_dropout": adapter.mora_dropout},
        segments=SEGMENTS if adapter.tp_grouping == TPGrouping.ALIGNED.value else 0,
        base_bits=adapter.base_bits,
        sequence=training.sequence_parallel_size,
        experts=adapter.adapts_experts,
        muon=training.optimizer == OptimizerKind.MUON.value,
        streams_base=training.base_device == BaseDevice.HOST.value,
    )
