"""Bytes of one rank: what it holds all the time, and at its highest in a step, a merge and a save.

    held       base, tables, squares, masters, moments, gradients, bucket
    step       held + gathered squares + activations, or held + what the optimizer makes on its way
    merge      held + the work on the largest layer
    save       held + a whole square at a time; rank 0 of a run collects all of them in host memory

ZeRO's share are facts of DeepSpeed 0.19.8: stage3.py (`_create_fp16_partitions_with_defragmentation`,
`_create_fp32_partitions`, `grad_partitions_flat_buffer`, `ipg_buckets`), stage_1_and_2.py, partition_parameters.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mora_ds.planning.step import StepMemory
from mora_ds.planning.zero_trace import Gathers

FP32 = 4


@dataclass(frozen=True)
class Trained:
    """What ZeRO shards, and how."""

    numels: tuple[int, ...]
    """Elements of each parameter, as a tensor-parallel rank holds it."""
    squares: int
    """How many of them are squares: those that Muon, where it is the optimizer, trains with one moment."""
    ranks: int
    """Over which ZeRO shards."""
    bytes_each: int
    """In the dtype that a run computes in."""
    ds_config: Mapping[str, Any]
    """Resolved."""
    muon: bool = False
    on_cpu: bool = False
    """Whether ranks compute on CPUs: torch's Adam then makes two temporary tensors in place of one."""

    @property
    def zero(self) -> Mapping[str, Any]:
        section: Mapping[str, Any] = self.ds_config["zero_optimization"]
        return section

    @property
    def stage(self) -> int:
        return int(self.zero["stage"])

    @property
    def whole(self) -> int:
        return sum(self.numels)

    @property
    def own(self) -> int:
        """Elements of this rank's shares: under ZeRO-3 each parameter is padded to the ranks, below it all together."""
        if self.stage == 3:
            return sum(-(-numel // self.ranks) for numel in self.numels)
        return -(-self.whole // self.ranks) if self.stage else self.whole

    @property
    def persistent(self) -> tuple[int, ...]:
        """Under ZeRO-3, parameters that are gathered once a step and stay."""
        most = self.zero["stage3_param_persistence_threshold"] if self.stage == 3 and self.ranks > 1 else -1
        return tuple(numel for numel in self.numels if numel <= most)

    @property
    def offloads(self) -> bool:
        return (self.zero.get("offload_optimizer") or {}).get("device") in ("cpu", "nvme")


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank. Those of the device, but for `host` ones."""

    base: int
    """The frozen base and what buffers the model has of its own."""
    tables: int
    squares: int
    """The rank's share of all that is trained, in the dtype that it computes in."""
    masters: int
    moments: int
    gradients: int
    bucket: int
    """In which gradients are collected before they are reduced."""
    gathered: int
    """Squares that are whole at the same time."""
    activations: int
    """Saved for backward at the end of forward, logits and loss included."""
    logits: int
    """Of the last dimension of a micro-batch, in the dtype computed in; a part of the activations."""
    forward_backward: int
    """At its highest, beside what is held."""
    optimizer_step: int
    merge: int
    save: int
    host_optimizer: int
    """Of a rank, with offload_optimizer."""
    host_save: int
    """Of rank 0 while it saves or merges: all squares in fp32."""

    @property
    def held(self) -> int:
        return (
            self.base + self.tables + self.squares + self.masters + self.moments + self.gradients + self.bucket
        )  # fmt: skip

    @property
    def peak(self) -> int:
        return self.held + max(self.forward_backward, self.optimizer_step, self.merge, self.save)

    @property
    def peaks_in(self) -> str:
        """What the highest moment is."""
        moments = {
            "forward and backward": self.forward_backward,
            "the optimizer's step": self.optimizer_step,
            "a merge": self.merge,
            "a save": self.save,
        }
        return max(moments, key=lambda name: moments[name])


def rank_memory(
    base_bytes: int, merge: int, logits: int, step: StepMemory, trained: Trained, gathered: Gathers
) -> RankMemory:
    """Put together. `base_bytes`, `merge`: from the model; `gathered`: one micro-batch's, of what does not persist."""
    own, whole, each = trained.own, trained.whole, trained.bytes_each
    persistent = sum(trained.persistent)
    masters, moments, gradients = _optimizer_bytes(trained)
    host = masters + moments + gradients if trained.offloads else 0
    if trained.offloads:
        masters = moments = gradients = 0
    squares = (own if trained.stage == 3 else whole) * each
    bucket, reduced = _bucket_bytes(trained)
    held_whole = (gathered.most_held + persistent) * each if trained.ranks > 1 and trained.stage == 3 else 0
    # what arrives has a buffer of its own until it is taken apart: early in forward, unless backward gathers again
    again = gathered.elements > whole - persistent
    arriving = gathered.largest_call * each if held_whole and again else 0
    kept_whole = persistent * each if trained.ranks > 1 else 0
    largest = max(trained.numels, default=0) * FP32
    return RankMemory(
        base=base_bytes,
        tables=step.tables,
        squares=squares,
        masters=masters,
        moments=moments,
        gradients=gradients,
        bucket=bucket,
        gathered=held_whole,
        activations=step.kept,
        logits=logits,
        forward_backward=held_whole + arriving + max(step.peak, reduced),
        optimizer_step=max(kept_whole, 0 if trained.offloads else (2 + trained.on_cpu) * own * FP32),
        merge=merge + 2 * largest + kept_whole if merge else 0,
        save=2 * largest + kept_whole,
        host_optimizer=host,
        host_save=whole * FP32,
    )


def _optimizer_bytes(trained: Trained) -> tuple[int, int, int]:
    """Masters, moments, gradients. ZeRO has masters in fp32 too: stage3.py compares a torch.device with its name, and
    so never takes the parameters for their own masters."""
    own, stage = trained.own, trained.stage
    masters = own * FP32 if stage or trained.bytes_each < FP32 else 0
    share = own / max(trained.whole, 1)
    squares = sum(trained.numels[: trained.squares]) * share
    moments = round((squares if trained.muon else 2 * squares) * FP32 + 2 * (own - squares) * FP32)
    if stage == 0:
        return masters, moments, trained.whole * trained.bytes_each
    accumulated = {"fp16": 2, "bf16": 2}.get(
        str((trained.ds_config.get("data_types") or {}).get("grad_accum_dtype")), FP32
    )
    return masters, moments, (trained.whole if stage == 1 else own) * accumulated


def _bucket_bytes(trained: Trained) -> tuple[int, int]:
    """The bucket, and what reducing a full one takes beside it: the shares in order, and this rank's in fp32."""
    if trained.stage == 0:
        return 0, 0
    size = trained.zero["reduce_bucket_size"]
    filled = min(size, trained.whole)
    if trained.stage != 3:
        return size * trained.bytes_each, filled * trained.bytes_each
    own = filled // trained.ranks * FP32 if trained.bytes_each < FP32 else 0
    return size * trained.bytes_each, (filled * trained.bytes_each if trained.ranks > 1 else 0) + own


def gathered_bytes(trained: Trained, gathered: Gathers, accumulation: int) -> tuple[int, int]:
    """(bytes, calls) of all-gathers that a rank takes part in in a step, whole outputs as a counter sees them. ZeRO
    pads each parameter to its ranks."""
    if trained.ranks == 1 or trained.stage == 0:
        return 0, 0
    if trained.stage < 3:
        return _padded((trained.whole,), trained.ranks) * trained.bytes_each, 1
    padding = _padded(trained.numels, trained.ranks) / max(trained.whole, 1)
    kept = _padded(trained.persistent, trained.ranks)
    elements = round(gathered.elements * accumulation * padding) + kept
    return elements * trained.bytes_each, gathered.calls * accumulation + len(trained.persistent)


def reduced_bytes(trained: Trained, accumulation: int) -> int:
    """Bytes of reduce-scatters in a step."""
    if trained.ranks == 1:
        return 0
    return _padded(trained.numels, trained.ranks) * trained.bytes_each * accumulation


def _padded(numels: Sequence[int], ranks: int) -> int:
    return sum(-(-numel // ranks) * ranks for numel in numels)
