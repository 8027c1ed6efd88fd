"""Whether a run fits and what it sends: its plan, from a model's config alone.

    Planner(...).plan()     of given settings
    recommend(planner)      with micro-batch and checkpointing chosen

No weights are read and no process group is started: everything comes from the meta
device and from shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from mora_ds.adapters.inject import base_elements, mora_layers
from mora_ds.adapters.quantized import merge_bytes, quantized_bytes
from mora_ds.common.errors import UserError
from mora_ds.engine.ds_config import avoid_slices, fill_bucket_sizes
from mora_ds.engine.ds_keys import DsConfig
from mora_ds.engine.ds_optimizer import uses_muon
from mora_ds.engine.initialize import trainable_numels
from mora_ds.engine.settings import BaseDevice
from mora_ds.models.decoder_layers import find_decoder_layers
from mora_ds.parallel.limits import check_world
from mora_ds.planning.memory import (
    RankMemory,
    Trained,
    all_gather_volume,
    gathers,
    rank_memory,
    reduced_bytes,
)
from mora_ds.planning.step import (
    NOTHING_STREAMED,
    StepMemory,
    Streamed,
    Work,
    base_bytes,
    measure_merge,
    planned_model,
    step_memory,
)
from mora_ds.planning.utilization import token_flops

USABLE = 0.92
"""Fraction of a device's memory that a recommendation fills: the rest is for its context,
communication buffers and fragments."""

LARGEST_MICRO_BATCH = 256


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a run."""

    ranks: int
    per_node: int = 8
    memory: float = 80e9
    """Bytes of a device."""


@dataclass(frozen=True)
class Plan:
    """Memory and traffic of one rank, and what follows for the run."""

    work: Work
    cluster: Cluster
    accumulation: int
    trained: Trained
    memory: RankMemory
    gathered: int
    """All-gather volume of a step: bytes of complete outputs, as a rank's counter has
    it."""
    reduced: int
    """Bytes of their gradients that are reduced in a step, counted likewise."""
    base_elements: int
    quantized: int
    """Bytes of the base's weights in 8 or 4 bits, with their scales."""
    copied: int
    """Bytes of the base that are copied from host memory to a device in a step."""
    bytes_per_merge: int
    """Bytes on every rank (`merge_bytes`), not in `memory`: nobody knows how many
    merges."""

    token_flops: float
    """Model FLOPs of a token, forward and backward (`planning/utilization.py`)."""

    @property
    def tokens(self) -> int:
        """Tokens of a step of all ranks."""
        work = self.work
        replicas = self.cluster.ranks // (work.tensor_parallel * work.sequence_parallel)
        return work.micro_batch * self.accumulation * replicas * work.seq_len

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint without the merge ledger, in fp32: of each trained
        parameter the master weight, two moments, or one of Muon, and the adapter, which
        full training does not have."""
        trained = self.trained
        matrices = trained.matrix_numel * self.work.tensor_parallel
        others = trained.total - trained.matrix_numel
        copies = 3 if self.work.adapter is None else 4
        spared = matrices if trained.muon else 0
        return 4 * (copies * (matrices + others) - spared + trained.fixed_numel)

    @property
    def sent(self) -> float:
        """Bytes that a rank of a ring sends in a step for ZeRO's collectives."""
        zero = self.trained.zero
        scatters = zero.get("reduce_scatter", True)
        if self.trained.stage < 3:
            # What DeepSpeed calls so all-reduces whole buckets, unless each slice goes
            # to its owner alone (stage_1_and_2.py, `average_tensor`)
            scatters = scatters and not zero.get(
                "use_multi_rank_bucket_allreduce", True
            )
        # An all-reduce also gathers what it has reduced
        reductions = 1 if scatters else 2
        volume = self.gathered + reductions * self.reduced
        return volume * (self.trained.ranks - 1) / self.trained.ranks

    @property
    def fits(self) -> bool:
        return self.memory.peak <= USABLE * self.cluster.memory

    @property
    def host_memory(self) -> int:
        """Bytes of a node's host memory: the base's files, mapped and shared by its
        ranks, offloaded optimizer states, and what rank 0 collects to save. Merged
        weights are in memory that the ranks share, in place of the files."""
        ranks_of_node = min(self.cluster.ranks, self.cluster.per_node)
        offloaded = ranks_of_node * self.memory.host_optimizer
        return self.files + offloaded + self.memory.host_save

    @property
    def files(self) -> int:
        """Bytes of the base's files, which are assumed to be in the compute dtype, and
        of the model's other buffers; or of the base in host memory from which devices
        copy, in whose place the files need not be in memory."""
        if not self.quantized or self.memory.host_base:
            return self.memory.base - self.memory.base_buffers + self.memory.host_base
        return self.base_elements * self.work.dtype.itemsize


@dataclass
class Planner:
    """Plans of one model and cluster that differ in micro-batch and checkpointing."""

    work: Work
    cluster: Cluster
    ds_config: DsConfig
    """The complete DeepSpeed config, in which ZeRO's sizes may be "auto"."""
    accumulation: int = 1
    on_cpu: bool = False

    def __post_init__(self) -> None:
        self._steps: dict[tuple[int, bool], StepMemory] = {}
        """Measured once, by micro-batch size and checkpointing."""

    def plan(self, **changes: Any) -> Plan:
        """The plan, with `changes` of the work's micro-batch or checkpointing. Raises
        `UserError` where its groups do not fill the cluster."""
        work = replace(self.work, **changes)
        check_world(self.cluster.ranks, work.tensor_parallel, work.sequence_parallel)
        model = self._model
        trained = self._trained
        gathered = gathers(trained)
        streamed = self.streamed() if work.base_on_host else NOTHING_STREAMED
        memory = rank_memory(
            model.base_bytes, model.merge, self._step(work), trained, gathered, streamed
        )
        return Plan(
            work=work,
            cluster=self.cluster,
            accumulation=self.accumulation,
            trained=trained,
            memory=memory,
            gathered=all_gather_volume(trained, gathered, self.accumulation),
            reduced=reduced_bytes(trained, self.accumulation),
            base_elements=model.base_elements,
            quantized=model.quantized,
            copied=streamed.copied * self.accumulation,
            bytes_per_merge=model.bytes_per_merge,
            token_flops=model.token_flops,
        )

    @property
    def base_fits(self) -> bool:
        """Whether the base alone fits on a device, which is quick to know."""
        size = self._model.base_bytes
        if self.work.base_on_host:
            streamed = self.streamed()
            size += streamed.on_device - streamed.total
        return size <= USABLE * self.cluster.memory

    def streamed(self) -> Streamed:
        """The part of the base that --base_device host keeps in host memory. Raises
        `UserError` for a model whose decoder layers are not found."""
        return Streamed.of(self._model.unsplit)

    @cached_property
    def _model(self) -> _MeasuredModel:
        return _MeasuredModel(self.work)

    @cached_property
    def _trained(self) -> Trained:
        model = self._model
        ranks = self.cluster.ranks // self.work.tensor_parallel
        filled = fill_bucket_sizes(dict(self.ds_config), model.numels)
        if self.work.adapter is not None:
            avoid_slices(filled, model.numels, ranks)
        return Trained(
            model.numels,
            model.layer,
            model.matrix_numel,
            ranks,
            self.work.dtype.itemsize,
            filled,
            uses_muon(filled),
            self.on_cpu,
            model.fixed_numel,
        )

    def _step(self, work: Work) -> StepMemory:
        key = (work.micro_batch, work.checkpointing)
        if key not in self._steps:
            self._steps[key] = step_memory(work)
        return self._steps[key]


class _MeasuredModel:
    """A model on the meta device, and its sizes."""

    def __init__(self, work: Work) -> None:
        model = planned_model(work)
        self.unsplit = model
        if work.tensor_parallel > 1:
            self.unsplit = planned_model(replace(work, tensor_parallel=1))
        self.numels = tuple(trainable_numels(self.unsplit, work.tensor_parallel))
        layers = find_decoder_layers(model).values()
        layer_numels = [sum(map(Tensor.numel, layer.parameters())) for layer in layers]
        self.layer = max(layer_numels, default=0)
        adapted = mora_layers(model).values()
        self.matrix_numel = sum(layer.adapter_weight.numel() for layer in adapted)
        fixed = (layer.fixed for layer in adapted)
        self.fixed_numel = sum(part.numel() for part in fixed if part is not None)
        self.token_flops = token_flops(self.unsplit, work.seq_len)
        self.base_elements = 0 if work.adapter is None else base_elements(model)
        self.base_bytes = base_bytes(model)
        self.quantized = quantized_bytes(model)
        self.merge = measure_merge(model)
        self.bytes_per_merge = merge_bytes(model)


def place_base(planner: Planner, device: BaseDevice) -> Planner:
    """The planner with its base where `device` says; auto: in host memory if its work
    does not fit otherwise. Raises `UserError` for work that has no frozen base to be
    there."""
    work = planner.work
    if device is BaseDevice.HOST and work.adapter is None:
        raise UserError(
            "--base_device host is for a base that is frozen under an adapter: use device"
        )
    on_host = replace(planner, work=replace(work, base_on_host=True))
    if device is BaseDevice.HOST:
        return on_host
    can_be_there = work.adapter is not None and work.tensor_parallel == 1
    if device is BaseDevice.DEVICE or not can_be_there:
        return planner
    fits = planner.base_fits and planner.plan().fits
    return planner if fits else on_host


def recommend(planner: Planner) -> Plan | None:
    """The plan that fits with the largest micro-batch, without gradient checkpointing
    where there is one, else with it; None where none fits."""
    if not planner.base_fits:
        return None
    for checkpointing in (False, True):
        if plan := _largest(planner, checkpointing):
            return plan
    return None


def _largest(planner: Planner, checkpointing: bool) -> Plan | None:
    """The plan with the largest power of two as micro-batch that fits."""

    def with_micro_batch(micro_batch: int) -> Plan:
        return planner.plan(micro_batch=micro_batch, checkpointing=checkpointing)

    one = with_micro_batch(1)
    if not one.fits:
        return None
    # Activations grow by about the same bytes with each sequence: two measurements say where
    # to begin.
    sequence = with_micro_batch(2).memory.forward_backward - one.memory.forward_backward
    free = USABLE * planner.cluster.memory - one.memory.static
    free -= one.memory.forward_backward
    micro_batch = 2 ** int(
        math.log2(min(LARGEST_MICRO_BATCH, 1 + free // max(sequence, 1)))
    )
    while not (plan := with_micro_batch(micro_batch)).fits:
        micro_batch //= 2
    return plan
