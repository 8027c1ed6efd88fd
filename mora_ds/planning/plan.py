"""Will it fit, how fast will it be, what crosses the wire: one plan of a run on a cluster, from a model's config alone.

    make_plan(work, cluster, ...)      of settings that are given
    recommend(work, cluster, ...)      micro-batch, checkpointing, t and s, chosen

No weights are read and no process group is started: everything comes of the meta device, shapes and rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mora_ds.adapters.inject import mora_layers
from mora_ds.engine.ds_config import fill_bucket_sizes
from mora_ds.engine.ds_optimizer import uses_muon
from mora_ds.engine.initialize import trainable_numels
from mora_ds.errors import refuse
from mora_ds.parallel.limits import check_tensor_parallel, check_world, sequence_parallel_problems
from mora_ds.planning.costs import Costs, costs
from mora_ds.planning.memory import RankMemory, Trained, gathered_bytes, rank_memory, reduced_bytes
from mora_ds.planning.step import (
    StepMemory,
    Work,
    base_bytes,
    base_elements,
    measure_merge,
    own_buffer_bytes,
    planned_model,
    step_memory,
    trace_step,
)
from mora_ds.planning.timing import Cluster, StepTime, head_macs, step_time, tokens_a_second
from mora_ds.planning.zero_trace import Gathers, gathers

USABLE = 0.92
"""Share of a device's memory that a recommendation fills: the rest is for its context, communication buffers and
fragments."""

LARGEST_MICRO_BATCH = 256
ENOUGH = 0.97
"""Of the best speed, at which a recommendation prefers what is simpler."""


@dataclass(frozen=True)
class Plan:
    """One rank's, and the run's."""

    work: Work
    cluster: Cluster
    accumulation: int
    trained: Trained
    memory: RankMemory
    gathered: int
    """Bytes of all-gathers of trained parameters in a step, as a rank's counter sees them: whole outputs."""
    gather_calls: int
    reduced: int
    """Bytes of their gradients, likewise."""
    sent: float
    """Bytes that a rank puts on the wire in a step, all causes together."""
    time: StepTime
    base_elements: int
    eight_bits: int
    """Bytes of the base that are held in 8 bits, scales included."""

    @property
    def passes(self) -> float:
        """How often everything trained is gathered in a step."""
        return self.gathered / max(1, self.trained.whole * self.trained.bytes_each)

    @property
    def fits(self) -> bool:
        return self.memory.peak <= USABLE * self.cluster.memory

    @property
    def tokens_per_second(self) -> float:
        return tokens_a_second(self.work, self.cluster, self.time, self.accumulation)

    @property
    def ranks_of_node(self) -> int:
        return min(self.cluster.ranks, self.cluster.per_node)

    @property
    def host_memory(self) -> int:
        """Bytes of a node's host memory: the base's files, mapped and shared by its ranks, offloaded states, and what
        rank 0 collects to save. On CPUs everything else of a rank as well, and its own copy of what is in 8 bits."""
        memory = self.memory
        own = memory.peak - memory.base + self.eight_bits
        each = memory.host_optimizer + (own if self.trained.on_cpu else 0)
        return self.files + self.ranks_of_node * each + memory.host_save

    @property
    def files(self) -> int:
        """Bytes of the base's files, taken to be in the run's dtype, and of the model's own buffers."""
        return self.memory.base if not self.eight_bits else self.base_elements * self.work.dtype.itemsize

    @property
    def host_memory_after_merge(self) -> int:
        """On CPUs a merge writes to the mapped pages: every rank then has its own copy of what is adapted."""
        written = self.memory.base if self.trained.on_cpu and not self.eight_bits else 0
        return self.host_memory + max(0, self.ranks_of_node - 1) * written


@dataclass
class Planner:
    """Plans of one model and cluster; what several of them share is measured once."""

    work: Work
    cluster: Cluster
    ds_config: Mapping[str, Any]
    """Resolved; ZeRO's sizes may be "auto"."""
    accumulation: int = 1
    on_cpu: bool = False

    def __post_init__(self) -> None:
        self._models: dict[tuple[int, bool], _Facts] = {}
        self._steps: dict[tuple[Any, ...], StepMemory] = {}

    def plan(self, exact: bool = True, **changes: Any) -> Plan:
        """With `changes` of the work. Not `exact`: ZeRO's gathers are bounded, not followed."""
        work = replace(self.work, **changes)
        _check(work, self.cluster)
        facts = self._facts(work)
        trained = self._trained(facts, work)
        gathered = self._gathers(facts, trained, work) if exact else _bound(trained)
        base = facts.base_bytes + facts.own_buffers
        logits = work.tokens * work.config.get_text_config().vocab_size * work.dtype.itemsize
        memory = rank_memory(base, facts.merge, logits, self._step(work), trained, gathered)
        took, calls = gathered_bytes(trained, gathered, self.accumulation)
        reduced = reduced_bytes(trained, self.accumulation)
        replicas = self.cluster.ranks // work.tensor_parallel
        spent = facts.costs(replicas, work.tokens)
        sent = (took + reduced) * (trained.ranks - 1) / trained.ranks
        time = step_time(work, spent, self.cluster, sent, self.accumulation, head_macs(work))
        moved = spent.wire("activation") * work.dtype.itemsize * self.accumulation
        return Plan(
            work, self.cluster, self.accumulation, trained, memory, took, calls, reduced, sent + moved, time,
            facts.base_elements, facts.eight_bits,
        )  # fmt: skip

    @property
    def base_bytes(self) -> int:
        """Of every rank."""
        work = replace(self.work, tensor_parallel=1, sequence_parallel=1)
        return self._facts(work).base_bytes

    def _facts(self, work: Work) -> _Facts:
        key = (work.tensor_parallel, work.checkpointing)
        if key not in self._models:
            self._models[key] = _Facts.of(work)
        return self._models[key]

    def _step(self, work: Work) -> StepMemory:
        key = (work.micro_batch, work.checkpointing, work.tensor_parallel, work.sequence_parallel)
        if key not in self._steps:
            self._steps[key] = step_memory(work)
        return self._steps[key]

    def _trained(self, facts: _Facts, work: Work) -> Trained:
        filled = fill_bucket_sizes(dict(self.ds_config), facts.numels)
        return Trained(
            facts.numels,
            facts.squares,
            self.cluster.ranks // work.tensor_parallel,
            work.dtype.itemsize,
            filled,
            uses_muon(dict(self.ds_config)),
            self.on_cpu,
        )

    def _gathers(self, facts: _Facts, trained: Trained, work: Work) -> Gathers:
        if trained.stage < 3 or trained.ranks == 1 or not facts.numels:
            return Gathers(0, 0, 0, 0)
        short = replace(work, micro_batch=1, seq_len=8 * work.sequence_parallel)
        return gathers(trace_step(facts.model, short), facts.numels, trained.zero)


@dataclass(frozen=True)
class _Facts:
    """Of a model on the meta device."""

    model: Any
    numels: tuple[int, ...]
    squares: int
    base_elements: int
    base_bytes: int
    eight_bits: int
    own_buffers: int
    merge: int
    costs: Callable[[int, int], Costs]

    @classmethod
    def of(cls, work: Work) -> _Facts:
        model = planned_model(work)
        whole = model if work.tensor_parallel == 1 else planned_model(replace(work, tensor_parallel=1))
        elements = base_elements(model) if work.adapter is not None else 0

        def spent(replicas: int, tokens: int) -> Costs:
            found = costs(whole, work.tensor_parallel, replicas, tokens)
            return found if work.adapter is not None else replace(found, base_macs=found.base_macs * 3 // 2)

        numels = trainable_numels(whole, work.tensor_parallel)
        return cls(
            model,
            tuple(numels),
            len(mora_layers(model)),
            elements,
            *(base_bytes(model, work.dtype) if work.adapter is not None else (0, 0)),
            own_buffer_bytes(model),
            measure_merge(model),
            spent,
        )


def _bound(trained: Trained) -> Gathers:
    rest = trained.whole - sum(trained.persistent)
    passes = 1 if 3 * rest <= trained.zero.get("stage3_max_reuse_distance", 10**9) else 2
    held = min(rest, trained.zero.get("stage3_max_live_parameters", 10**9))
    return Gathers(0, passes * rest, held, min(rest, trained.zero["stage3_prefetch_bucket_size"]))


def _check(work: Work, cluster: Cluster) -> None:
    check_tensor_parallel(work.tensor_parallel, base_bits=work.base_bits, sequence=work.sequence_parallel)
    check_world(cluster.ranks, work.tensor_parallel, work.sequence_parallel)
    refuse(sequence_parallel_problems(work.sequence_parallel, work.seq_len))


# -- a recommendation -------------------------------------------------------------------------------------------------


def recommend(planner: Planner, rows: int | None = None) -> Plan | None:
    """The fastest plan that fits, the simplest of those that are about as fast; None where none does.

    `rows`: of the global batch, at least one a group of ranks. Ranks share work (t, s) where nothing fits otherwise,
    or where rows are fewer than ranks.
    """
    if planner.base_bytes > USABLE * planner.cluster.memory:
        return None  # whole on every rank, whatever t and s
    for t, s in _ways(planner):
        replicas = planner.cluster.ranks // (t * s)
        if rows is not None and rows < replicas:
            continue
        found = []
        for checkpointing in (False, True):
            limit = LARGEST_MICRO_BATCH if rows is None else rows // replicas
            best = _largest(planner, limit, checkpointing=checkpointing, tensor_parallel=t, sequence_parallel=s)
            found += [] if best is None else [best]
        if found:
            most = max(plan.tokens_per_second for plan in found)
            return next(plan for plan in found if plan.tokens_per_second >= ENOUGH * most)
    return None


def _ways(planner: Planner) -> Iterator[tuple[int, int]]:
    """(t, s), simplest first, within a node."""
    yield 1, 1
    text = planner.work.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    key_values = getattr(text, "num_key_value_heads", None) or heads
    for size in (2, 4, 8):
        if planner.cluster.ranks % size or size > planner.cluster.per_node or heads % size:
            continue
        if planner.work.seq_len % size == 0 and (key_values % size == 0 or size % key_values == 0):
            yield 1, size
        if key_values % size == 0 and planner.work.adapter is not None and planner.work.base_bits != 8:
            yield size, 1


def _largest(planner: Planner, limit: int, **changes: Any) -> Plan | None:
    """With the largest power of two as micro-batch that fits."""
    one = planner.plan(exact=False, micro_batch=1, **changes)
    if not one.fits:
        return None
    row = planner.plan(exact=False, micro_batch=2, **changes).memory.forward_backward - one.memory.forward_backward
    free = USABLE * planner.cluster.memory - one.memory.held - one.memory.forward_backward
    micro = 2 ** int(math.log2(max(1, min(limit, 1 + free // max(row, 1)))))
    while micro >= 1:
        plan = planner.plan(micro_batch=micro, **changes)
        if plan.fits:
            return plan
        micro //= 2
    return None
