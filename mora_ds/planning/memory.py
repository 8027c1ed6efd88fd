"""Bytes of one rank: static memory, and the peaks of a step, a merge and a save.

    static     base, index tables, trained parameters, master weights, moments, gradients, gradient bucket
    step       static + gathered parameters + activations, or static + temporary tensors of the optimizer
    merge      static + the work on the largest layer
    save       static + one complete MoRA matrix at a time; rank 0 collects all of them in host memory

and the bytes that ZeRO moves: `gathers` of one micro-batch, `all_gather_volume` and
`reduced_bytes` of a step.

What ZeRO allocates is taken from DeepSpeed 0.19.8: stage3.py
(`_create_fp16_partitions_with_defragmentation`, `_create_fp32_partitions`,
`grad_partitions_flat_buffer`, `ipg_buckets`), stage_1_and_2.py,
partition_parameters.py, and partitioned_param_coordinator.py (`fetch_sub_module`,
`release_sub_module`), with a decoder layer in place of the modules in it
(`engine.module_hooks`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mora_ds.engine.ds_keys import DsConfig
from mora_ds.planning.step import NOTHING_STREAMED, StepMemory, Streamed

FP32 = 4


@dataclass(frozen=True)
class Trained:
    """The trained parameters, and how ZeRO shards them."""

    numels: tuple[int, ...]
    """Elements of each parameter, as a tensor-parallel rank holds it."""
    layer: int
    """Elements of the parameters of the largest decoder layer."""
    matrix_numel: int
    """Elements of all MoRA matrices, of which Muon has one moment."""
    ranks: int
    """Number of ranks over which ZeRO shards."""
    bytes_each: int
    """Bytes of an element in the compute dtype."""
    ds_config: DsConfig
    """The complete DeepSpeed config."""
    muon: bool = False
    on_cpu: bool = False
    """Whether ranks compute on CPUs, where torch's Adam makes one more temporary
    tensor."""
    fixed_numel: int = 0
    """Elements of adapter weights that are not trained, but saved with them."""

    @property
    def zero(self) -> DsConfig:
        return self.ds_config["zero_optimization"]

    @property
    def stage(self) -> int:
        return self.zero["stage"]

    @property
    def total(self) -> int:
        """Elements of all trained parameters, unsharded."""
        return sum(self.numels)

    @property
    def shard(self) -> int:
        """Elements of one rank's shards. ZeRO-3 pads each parameter to a multiple of
        the ranks, stages 1 and 2 the sum."""
        numels = self.numels if self.stage == 3 else (self.total,)
        return _padded(numels, self.ranks) // self.ranks

    @property
    def persistent(self) -> tuple[int, ...]:
        """Sizes of the parameters that ZeRO-3 gathers once a step and keeps."""
        if self.stage < 3 or self.ranks == 1:
            return ()
        threshold = self.zero["stage3_param_persistence_threshold"]
        return tuple(numel for numel in self.numels if numel <= threshold)

    @property
    def offloads(self) -> bool:
        return (self.zero.get("offload_optimizer") or {}).get("device") == "cpu"


@dataclass(frozen=True)
class Gathers:
    """What ZeRO-3 gathers on a rank in a micro-batch, in elements of whole
    parameters."""

    elements: int = 0
    """Each parameter counted as often as it is gathered."""
    most_at_once: int = 0
    """The most that are gathered at the same time."""
    largest_call: int = 0
    """The most that one collective gathers."""


def gathers(trained: Trained) -> Gathers:
    """What one micro-batch gathers: each sharded parameter for forward, and again for
    backward unless it stayed.

    Parameters up to the persistence threshold are left out: they are gathered once a
    step. Of the others stay, exact to two decoder layers of a deep model, the larger
    one of

    - `stage3_max_live_parameters`, where prefetching is on and its bucket holds more than a layer. It then runs ahead
      of the layers, past the end of forward, and does not release what backward uses next;
    - half of `stage3_max_reuse_distance`: the distance from a layer in forward to itself in backward is twice the
      layers after it.
    """
    if trained.stage < 3 or trained.ranks == 1:
        return Gathers()
    sharded = trained.total - sum(trained.persistent)
    bucket = trained.zero["stage3_prefetch_bucket_size"]
    most_live = trained.zero.get("stage3_max_live_parameters", 10**9)
    reuse_distance = trained.zero.get("stage3_max_reuse_distance", 10**9)
    stays = reuse_distance // 2
    if bucket > trained.layer:
        stays = max(stays, most_live)
    stays = min(sharded, stays)
    one_call = min(sharded, max(bucket, trained.layer))
    return Gathers(2 * sharded - stays, min(sharded, stays + one_call), one_call)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank, on its device but for `host_optimizer`, `host_save`,
    `host_base`."""

    base: int
    """The frozen base, or its part on the device, and the model's other buffers."""
    tables: int
    """Index tables of the operators."""
    trained: int
    """The rank's shards of everything trained, in the compute dtype."""
    master_weights: int
    """Master weights in fp32."""
    moments: int
    gradients: int
    bucket: int
    """Buffer in which gradients are collected before they are reduced."""
    gathered: int
    """The most trained parameters that are gathered at the same time."""
    activations: int
    """Saved for backward at the end of forward, logits and loss included."""
    forward_backward: int
    """Peak of forward and backward, on top of static memory."""
    optimizer_step: int
    merge: int
    save: int
    host_optimizer: int
    """Optimizer state of a rank in host memory, with offload_optimizer."""
    host_save: int
    """Host memory of rank 0 while it saves or merges: all trained parameters, and what
    is fixed of adapter weights, in fp32."""
    base_buffers: int
    """The part of `base` that is buffers for decoder layers copied from host memory."""
    host_base: int
    """Frozen weights in host memory, from which they are copied."""

    @property
    def static(self) -> int:
        """What is allocated all the time."""
        of_optimizer = self.master_weights + self.moments + self.gradients + self.bucket
        return self.base + self.tables + self.trained + of_optimizer

    @property
    def _on_top(self) -> dict[str, int]:
        return {
            "forward and backward": self.forward_backward,
            "the optimizer's step": self.optimizer_step,
            "a merge": self.merge,
            "a save": self.save,
        }

    @property
    def peak(self) -> int:
        return self.static + max(self._on_top.values())

    @property
    def peaks_in(self) -> str:
        """The activity in which memory has its peak."""
        return max(self._on_top, key=lambda name: self._on_top[name])


def rank_memory(
    base_bytes: int,
    merge: int,
    step: StepMemory,
    trained: Trained,
    gathered: Gathers,
    streamed: Streamed = NOTHING_STREAMED,
) -> RankMemory:
    """The memory of a rank. `base_bytes`, `merge`: from the model; `gathered`: of one
    micro-batch, without persistent parameters; `streamed`: the part of the base that
    stays in host memory."""
    itemsize = trained.bytes_each
    weights = trained.shard if trained.stage == 3 else trained.total
    persistent = sum(trained.persistent) * itemsize
    unsharded = gathered.most_at_once * itemsize + persistent
    # An all-gather has an output buffer until it is split up: early in forward, unless
    # backward gathers again.
    gathers_again = gathered.elements > trained.total - sum(trained.persistent)
    output_buffer = gathered.largest_call * itemsize if gathers_again else 0
    # At most: where they are gathered by one call, its output is then split up
    refreshed = 2 * persistent
    states = _optimizer_bytes(trained)
    on_device = dict.fromkeys(states, 0) if trained.offloads else states
    temporary = 0 if trained.offloads else (2 + trained.on_cpu) * trained.shard * FP32
    if trained.muon and trained.stage == 3:
        temporary += _muon_bytes(trained)
    largest = max(trained.numels, default=0) * FP32
    step_peak = max(step.peak, _reduction_bytes(trained))
    return RankMemory(
        base=base_bytes - streamed.total + streamed.on_device,
        tables=step.tables,
        trained=weights * itemsize,
        **on_device,
        bucket=trained.zero["reduce_bucket_size"] * itemsize,
        gathered=unsharded,
        activations=step.saved,
        forward_backward=unsharded + output_buffer + step_peak,
        optimizer_step=max(refreshed, temporary),
        merge=merge + 2 * largest + persistent if merge else 0,
        save=2 * largest + persistent,
        host_optimizer=sum(states.values()) - sum(on_device.values()),
        host_save=(trained.total + trained.fixed_numel) * FP32,
        base_buffers=streamed.on_device,
        host_base=streamed.total,
    )


def _optimizer_bytes(trained: Trained) -> dict[str, int]:
    """Master weights, moments and gradients. ZeRO has master weights even in fp32:
    stage3.py compares a torch.device with its name, and so never uses the parameters as
    their own master weights."""
    shard = trained.shard
    matrix_shard = trained.matrix_numel * (shard / max(trained.total, 1))
    without_second_moment = matrix_shard if trained.muon else 0
    return {
        "master_weights": shard * FP32,
        "moments": round((2 * shard - without_second_moment) * FP32),
        "gradients": (trained.total if trained.stage == 1 else shard) * FP32,
    }


def _muon_bytes(trained: Trained) -> int:
    """What Muon gathers at a time (stage3.py, `_muon_update_sub_group`): gradients and
    momentums."""
    return 2 * FP32 * min(trained.zero["reduce_bucket_size"], trained.matrix_numel)


def _reduction_bytes(trained: Trained) -> int:
    """What reducing a full gradient bucket takes: the shards in order, and under ZeRO-3
    those of this rank in fp32."""
    filled = min(trained.zero["reduce_bucket_size"], trained.total)
    if trained.stage != 3:
        return filled * trained.bytes_each
    in_order = filled * trained.bytes_each if trained.ranks > 1 else 0
    in_fp32 = filled // trained.ranks * FP32 if trained.bytes_each < FP32 else 0
    return in_order + in_fp32


def all_gather_volume(trained: Trained, gathered: Gathers, accumulation: int) -> int:
    """Bytes of the complete outputs of a step's all-gathers. ZeRO pads each parameter
    to a multiple of the ranks."""
    if trained.ranks == 1:
        return 0
    if trained.stage < 3:
        return _padded((trained.total,), trained.ranks) * trained.bytes_each
    padding = _padded(trained.numels, trained.ranks) / max(trained.total, 1)
    persistent = _padded(trained.persistent, trained.ranks)
    elements = round(gathered.elements * accumulation * padding) + persistent
    return elements * trained.bytes_each


def reduced_bytes(trained: Trained, accumulation: int) -> int:
    """Bytes of the reduce-scatters of a step."""
    if trained.ranks == 1:
        return 0
    return _padded(trained.numels, trained.ranks) * trained.bytes_each * accumulation


def _padded(numels: Sequence[int], ranks: int) -> int:
    return sum(-(-numel // ranks) * ranks for numel in numels)
