"""Whether a run fits and what it sends: one plan of a run on a cluster, from a model's config alone.

    Planner(...).plan()     of given settings
    recommend(planner)      with micro-batch, checkpointing, t and s chosen

No weights are read and no process group is started: everything comes from the meta device and from shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import base_elements, mora_layers
from mora_ds.adapters.quantized import merge_bytes
from mora_ds.adapters.target_patterns import names_experts
from mora_ds.common.errors import UserError, refuse
from mora_ds.engine.device import BaseDevice
from mora_ds.engine.ds_config import avoid_slices, fill_bucket_sizes
from mora_ds.engine.ds_optimizer import uses_muon
from mora_ds.engine.initialize import trainable_numels
from mora_ds.models.decoder_layers import find_decoder_layers
from mora_ds.models.loss import bound
from mora_ds.parallel.limits import check_world, sequence_parallel_problems, tensor_parallel_problems
from mora_ds.planning.costs import group_traffic
from mora_ds.planning.memory import (
    RankMemory,
    Trained,
    all_gather_volume,
    gathers,
    rank_memory,
    reduced_bytes,
)
from mora_ds.planning.step import (
    StepMemory,
    Streamed,
    Work,
    base_bytes,
    measure_merge,
    other_buffer_bytes,
    planned_model,
    step_memory,
)

USABLE = 0.92
"""Share of a device's memory that a recommendation fills: the rest is for its context, communication buffers and
fragments."""

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
    """All-gather volume of trained parameters in a step: bytes of complete outputs, as a rank's counter sees them."""
    reduced: int
    """Bytes of their gradients that are reduced in a step, counted likewise."""
    sent: float
    """Bytes that a rank sends in a step, for all causes."""
    base_elements: int
    quantized: int
    """Bytes of the base's weights in 8 or 4 bits, with their scales."""
    copied: int
    """Bytes of the base that are copied from host memory to a device in a step."""
    a_merge_adds: int
    """Bytes on every rank (`merge_bytes`); not in `memory`, as the number of merges is not known."""

    @property
    def passes(self) -> float:
        """All-gather volume / bytes of the trained parameters: how often each is gathered in a step."""
        return self.gathered / max(1, self.trained.total * self.trained.bytes_each)

    @property
    def fits(self) -> bool:
        return self.memory.peak <= USABLE * self.cluster.memory

    @property
    def host_memory(self) -> int:
        """Bytes of a node's host memory: the base's files, mapped and shared by its ranks, offloaded optimizer states,
        and what rank 0 collects to save. On CPUs also everything else of a rank, and its own quantized weights. Merged
        weights are in memory that the ranks share, in place of the files."""
        memory = self.memory
        on_cpu = memory.peak - memory.base + memory.base_buffers + self.quantized if self.trained.on_cpu else 0
        ranks_of_node = min(self.cluster.ranks, self.cluster.per_node)
        return self.files + ranks_of_node * (memory.host_optimizer + on_cpu) + memory.host_save

    @property
    def files(self) -> int:
        """Bytes of the base's files, which are assumed to be in the compute dtype, and of the model's other buffers; or
        of the base in host memory from which devices copy, in whose place the files need not be in memory."""
        if not self.quantized or self.memory.host_base:
            return self.memory.base - self.memory.base_buffers + self.memory.host_base
        return self.base_elements * self.work.dtype.itemsize


@dataclass
class Planner:
    """Makes plans of one model and cluster; measurements that several of them share are made once."""

    work: Work
    cluster: Cluster
    ds_config: Mapping[str, Any]
    """The complete DeepSpeed config, in which ZeRO's sizes may be "auto"."""
    accumulation: int = 1
    on_cpu: bool = False
    note: Callable[[str], object] = lambda text: None
    """Told of each measurement, which takes seconds, before it is made."""

    def __post_init__(self) -> None:
        self._models: dict[int, _MeasuredModel] = {}
        """By the tensor-parallel degree."""
        self._steps: dict[tuple[Any, ...], StepMemory] = {}

    def plan(self, **changes: Any) -> Plan:
        """The plan, with `changes` of the work's fields."""
        work = replace(self.work, **changes)
        refuse(self.tensor_problems(work))
        check_world(self.cluster.ranks, work.tensor_parallel, work.sequence_parallel)
        refuse(sequence_parallel_problems(work.sequence_parallel, work.seq_len))
        model = self._model(work)
        trained = self._trained(model, work)
        gathered = gathers(trained)
        vocabulary = work.config.get_text_config().vocab_size
        logits = 0 if bound(model.model) else work.tokens * vocabulary * work.dtype.itemsize
        base = model.base_bytes + model.other_buffers
        streamed = model.streamed() if work.base_on_host else None
        memory = rank_memory(
            base,
            model.merge,
            logits,
            self._step(work),
            trained,
            gathered,
            streamed,
        )
        volume = all_gather_volume(trained, gathered, self.accumulation)
        reduced = reduced_bytes(trained, self.accumulation)
        # An all-reduce also gathers what it has reduced.
        sent_as_often = 1 if trained.zero.get("reduce_scatter", True) else 2
        zero_sends = volume + sent_as_often * reduced
        copied = 0 if streamed is None else streamed.forward + streamed.backward
        groups_send = model.group_bytes(work) + ulysses_bytes(work)
        return Plan(
            work=work,
            cluster=self.cluster,
            accumulation=self.accumulation,
            trained=trained,
            memory=memory,
            gathered=volume,
            reduced=reduced,
            sent=zero_sends * (trained.ranks - 1) / trained.ranks + groups_send * self.accumulation,
            base_elements=model.base_elements,
            quantized=model.quantized,
            copied=copied * self.accumulation,
            a_merge_adds=model.a_merge_adds,
        )

    def tensor_problems(self, work: Work) -> Iterator[str]:
        """One message for each setting that the work's tensor-parallel degree does not go with, as a run checks it."""
        adapter = work.adapter
        mora = adapter if isinstance(adapter, MoRAConfig) else None
        return tensor_parallel_problems(
            work.tensor_parallel,
            adapter="full" if adapter is None else adapter.adapter,
            dropout={"--mora_dropout": 0.0 if adapter is None else adapter.dropout},
            segments=0 if mora is None else mora.segments,
            base_bits=work.base_bits,
            domains=mora is not None and bool(mora.domains),
            sequence=work.sequence_parallel,
            experts=adapter is not None and any(map(names_experts, adapter.target_modules)),
            muon=uses_muon(dict(self.ds_config)),
            zero_stage=self.ds_config["zero_optimization"]["stage"],
            streams_base=work.base_on_host,
        )

    @property
    def base_bytes(self) -> int:
        """Bytes of the base on every device."""
        work = replace(self.work, tensor_parallel=1, sequence_parallel=1)
        size = self._model(work).base_bytes
        if not work.base_on_host:
            return size
        streamed = self.streamed()
        return size - streamed.total + streamed.on_device

    def streamed(self) -> Streamed:
        """The part of the base that --base_device host keeps in host memory. Raises `UserError` for a model whose
        decoder layers are not found."""
        return self._model(self.work).streamed()

    def _model(self, work: Work) -> _MeasuredModel:
        if work.tensor_parallel not in self._models:
            self._models[work.tensor_parallel] = _MeasuredModel(work)
        return self._models[work.tensor_parallel]

    def _step(self, work: Work) -> StepMemory:
        key = (work.micro_batch, work.checkpointing, work.tensor_parallel, work.sequence_parallel)
        if key not in self._steps:
            checkpointing = ", with gradient checkpointing" if work.checkpointing else ""
            self.note(f"measuring a micro-batch of {work.micro_batch} x {work.seq_len:,} tokens{checkpointing}")
            self._steps[key] = step_memory(work)
        return self._steps[key]

    def _trained(self, model: _MeasuredModel, work: Work) -> Trained:
        ranks = self.cluster.ranks // work.tensor_parallel
        filled = fill_bucket_sizes(dict(self.ds_config), model.numels)
        if work.adapter is not None:
            avoid_slices(filled, model.numels, ranks)
        muon = uses_muon(dict(self.ds_config))
        return Trained(
            model.numels,
            model.layer,
            model.squares,
            ranks,
            work.dtype.itemsize,
            filled,
            muon,
            self.on_cpu,
        )


class _MeasuredModel:
    """A model on the meta device, and its sizes."""

    def __init__(self, work: Work) -> None:
        self.model = model = planned_model(work)
        self._unsplit = model if work.tensor_parallel == 1 else planned_model(replace(work, tensor_parallel=1))
        self.numels = tuple(trainable_numels(self._unsplit, work.tensor_parallel))
        layers = find_decoder_layers(model).values()
        self.layer = max((sum(map(Tensor.numel, layer.parameters())) for layer in layers), default=0)
        self.squares = len(mora_layers(model))
        self.base_elements = self.base_bytes = self.quantized = 0
        if work.adapter is not None:
            self.base_elements = base_elements(model)
            self.base_bytes, self.quantized = base_bytes(model, work.dtype)
        self.other_buffers = other_buffer_bytes(model)
        self.merge = measure_merge(model)
        self.a_merge_adds = merge_bytes(model)

    def streamed(self) -> Streamed:
        return Streamed.of(self._unsplit)

    def group_bytes(self, work: Work) -> float:
        """Bytes that a rank sends within its tensor-parallel group in a micro-batch."""
        if work.tensor_parallel == 1:
            return 0.0
        traffic = group_traffic(self._unsplit, work.tensor_parallel, work.tokens)
        return sum(collective.wire for collective in traffic) * work.dtype.itemsize


def ulysses_bytes(work: Work) -> float:
    """Bytes that a rank sends in a micro-batch for Ulysses: queries, keys, values and outputs, in forward, in backward,
    and once more where gradient checkpointing recomputes them. Too few keys and values are repeated."""
    ranks = work.sequence_parallel
    width = 2 * work.head_dim * (work.heads + max(work.key_value_heads, ranks))
    exchanges = 3 if work.checkpointing else 2
    return exchanges * work.layers * work.tokens * width * work.dtype.itemsize * (ranks - 1) / ranks


def place_base(planner: Planner, device: BaseDevice) -> Planner:
    """The planner with its base where `device` says; auto: in host memory if its work does not fit otherwise. Raises
    `UserError` for work that has no frozen base to be there."""
    work = planner.work
    if device is BaseDevice.HOST and work.adapter is None:
        raise UserError("--base_device host is for a base that is frozen under an adapter: use device")
    can_be_there = work.adapter is not None and work.tensor_parallel == 1
    stays = device is BaseDevice.AUTO and (not can_be_there or planner.plan().fits)
    if stays or device is BaseDevice.DEVICE:
        return planner
    return replace(planner, work=replace(work, base_on_host=True))


# -- a recommendation -------------------------------------------------------------------------------------------------


def recommend(planner: Planner, rows: int | None = None) -> Plan | None:
    """The simplest plan that fits, with its largest micro-batch; None where none fits.

    Without gradient checkpointing is simpler than with it, and both are simpler than groups of ranks that share rows
    (t, s), which are taken where nothing fits otherwise or where there are fewer rows than ranks. `rows`: of the global
    batch, at least one a group of ranks. Raises `UserError` where the work's own groups do not fill the cluster.
    """
    check_world(
        planner.cluster.ranks,
        planner.work.tensor_parallel,
        planner.work.sequence_parallel,
    )
    if planner.base_bytes > USABLE * planner.cluster.memory:
        return None  # the base is unsharded, whatever t and s
    for t, s in _group_sizes(planner):
        replicas = planner.cluster.ranks // (t * s)
        if rows is not None and rows < replicas:
            continue
        limit = LARGEST_MICRO_BATCH if rows is None else rows // replicas
        for checkpointing in (False, True):
            plan = _largest(
                planner,
                limit,
                checkpointing=checkpointing,
                tensor_parallel=t,
                sequence_parallel=s,
            )
            if plan is not None:
                return plan
    return None


def _group_sizes(planner: Planner) -> Iterator[tuple[int, int]]:
    """(t, s) of groups within a node, the simplest first."""
    yield 1, 1
    work = planner.work
    cluster = planner.cluster
    key_values = work.key_value_heads
    for size in (2, 4, 8):
        if cluster.ranks % size or size > cluster.per_node or work.heads % size:
            continue
        if work.by_documents and work.seq_len % size == 0 and (key_values % size == 0 or size % key_values == 0):
            yield 1, size
        split = replace(work, tensor_parallel=size, sequence_parallel=1)
        if key_values % size == 0 and not any(planner.tensor_problems(split)):
            yield size, 1


def _largest(planner: Planner, limit: int, **changes: Any) -> Plan | None:
    """The plan with the largest power of two as micro-batch that fits."""
    one = planner.plan(micro_batch=1, **changes)
    if not one.fits:
        return None
    if limit == 1:
        return one
    # Activations grow by about the same bytes with each row: two measurements say where to begin.
    row = planner.plan(micro_batch=2, **changes).memory.forward_backward - one.memory.forward_backward
    free = USABLE * planner.cluster.memory - one.memory.static - one.memory.forward_backward
    micro = 2 ** int(math.log2(max(1, min(limit, 1 + free // max(row, 1)))))
    while micro >= 1:
        plan = planner.plan(micro_batch=micro, **changes)
        if plan.fits:
            return plan
        micro //= 2
    return None
