"""How long a step takes, from the speed of devices and links: arithmetic, and every byte that a rank sends.

Where the base is in host memory, its layers are copied in parallel with the arithmetic, which waits for those that take
longer than it.

Only speeds are modelled: kernels that do not reach the given arithmetic speed, latency of collectives and waiting for
a slow rank are not included. ZeRO's traffic runs in parallel with the arithmetic (`overlap_comm`, stage 3's default);
that of tensor and sequence parallelism does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mora_ds.planning.costs import Costs
from mora_ds.planning.step import Streamed, Work

HOST_LINK = 50e9
"""Bytes a second from host memory, where nothing better is known: about what PCIe 5.0 x16 reaches."""


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a run: how many, how they are connected, and how fast they are."""

    ranks: int
    per_node: int = 8
    memory: float = 80e9
    """Bytes of a device."""
    tflops: float = 400.0
    """10^12 floating-point operations a second that matrix products reach on one device."""
    link: float = 200e9
    """Bytes a second that a rank sends within its node."""
    node_link: float = 50e9
    """Bytes a second that a node sends to other nodes, all its ranks together."""
    host_link: float = HOST_LINK
    """Bytes a second that a device receives from its node's host memory while the node's other devices do, too."""

    def bandwidth(self, group: int, stride: int = 1) -> float:
        """Bytes a second of a rank in a ring of `group` ranks, `stride` apart. A ring that leaves the node shares the
        node's link with the rings of its neighbours."""
        if (group - 1) * stride < self.per_node:
            return self.link
        return min(self.link, self.node_link / min(stride, self.per_node))

    def flags(self) -> Mapping[str, float]:
        """The cluster in the units of tools/plan.py's flags."""
        return {
            "gpus": self.ranks,
            "gpus_per_node": self.per_node,
            "gpu_memory": self.memory / 1e9,
            "tflops": self.tflops,
            "link_gbps": self.link * 8e-9,
            "node_link_gbps": self.node_link * 8e-9,
            "host_link_gbps": self.host_link * 8e-9,
        }


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by cause."""

    products: float
    """Arithmetic."""
    zero: float
    """All-gathers and reductions of trained parameters."""
    groups: float
    """Activations between the ranks of a tensor- or sequence-parallel group."""
    copies: float = 0.0
    """Copies of the base's layers from host memory, beside the arithmetic."""
    waits: float = 0.0
    """What the arithmetic waits for them: the part of the copies that it does not hide."""

    @property
    def step(self) -> float:
        return max(self.products + self.waits, self.zero) + self.groups

    @property
    def resident(self) -> float:
        """Seconds of the step if the base were on the device."""
        return max(self.products, self.zero) + self.groups

    @property
    def bottleneck(self) -> str:
        """The cause that takes longest."""
        causes = {
            "arithmetic": self.products,
            "gathering and reducing the MoRA matrices": self.zero,
            "activations between GPUs of a group": self.groups,
            "copying the base from host memory": self.copies,
        }
        return max(causes, key=lambda name: causes[name])


def step_time(
    work: Work, costs: Costs, cluster: Cluster, zero_bytes: float, accumulation: int, streamed: Streamed | None = None
) -> StepTime:
    """The time of a step. `costs`: of one micro-batch; `zero_bytes`: that this rank sends for ZeRO in a step;
    `streamed`: the weights that are copied from host memory."""
    t, s = work.tensor_parallel, work.sequence_parallel
    attention = attention_macs(work)
    # Of the layers: half of the base's products, a third of the MoRA matrices' and two of attention's seven.
    forward = costs.base_macs // 2 + costs.square_macs // 3 + attention * 2 // 7
    layers = costs.macs + attention + (forward if work.checkpointing else 0)
    seconds = 2e-12 / cluster.tflops
    groups = costs.wire("activation") * work.dtype.itemsize / cluster.bandwidth(t) if t > 1 else 0.0
    groups += ulysses_bytes(work) / cluster.bandwidth(s) if s > 1 else 0.0
    # With groups of t, ZeRO's ring has every t-th rank; without, all ranks in order, one of which leaves the node.
    ring = cluster.bandwidth(cluster.ranks // t, t)
    copies = waits = 0.0
    if streamed is not None:  # while a layer computes, the next one is copied: each direction takes what is longer
        passes = (forward, streamed.forward), (layers - forward, streamed.backward)
        copies = sum(size for _, size in passes) / cluster.host_link
        waits = sum(max(0.0, size / cluster.host_link - seconds * macs) for macs, size in passes)
    products = seconds * (layers + head_macs(work))
    times = (each * accumulation for each in (groups, copies, waits))
    return StepTime(products * accumulation, zero_bytes / ring, *times)


def attention_macs(work: Work) -> int:
    """MACs of attention scores and their product with the values in one micro-batch, causal, forward and backward.

    Backward computes the scores again: 7 products in all, half of each.
    """
    width = work.heads * work.head_dim
    ranks = work.sequence_parallel * work.tensor_parallel
    return 7 * work.layers * work.micro_batch * work.seq_len**2 * width // (2 * ranks)


def head_macs(work: Work) -> int:
    """MACs of the frozen output head, forward and input gradient."""
    text = work.config.get_text_config()
    return 2 * work.tokens * text.hidden_size * text.vocab_size


def ulysses_bytes(work: Work) -> float:
    """Bytes that a rank sends in a micro-batch for Ulysses: queries, keys, values, outputs, forward and backward."""
    s = work.sequence_parallel
    width = 2 * work.head_dim * (work.heads + max(work.key_value_heads, s))
    exchanges = 3 if work.checkpointing else 2
    return exchanges * work.layers * work.tokens * width * work.dtype.itemsize * (s - 1) / s


def tokens_a_second(work: Work, cluster: Cluster, time: StepTime, accumulation: int) -> float:
    """Tokens a second of all ranks together."""
    replicas = cluster.ranks // (work.tensor_parallel * work.sequence_parallel)
    return work.micro_batch * work.seq_len * accumulation * replicas / time.step
