"""How long a step takes, from the speed of devices and links: arithmetic, and every byte that a rank sends.

Only speeds are modelled: kernels that do not reach the given arithmetic speed, latency of collectives and waiting for
a slow rank are not included. ZeRO's traffic runs in parallel with the arithmetic (`overlap_comm`, stage 3's default);
that of tensor and sequence parallelism does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mora_ds.planning.costs import Costs
from mora_ds.planning.step import Work


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

    @property
    def step(self) -> float:
        return max(self.products, self.zero) + self.groups

    @property
    def bottleneck(self) -> str:
        """The cause that takes longest."""
        causes = {
            "arithmetic": self.products,
            "gathering and reducing the MoRA matrices": self.zero,
            "activations between GPUs of a group": self.groups,
        }
        return max(causes, key=lambda name: causes[name])


def step_time(work: Work, costs: Costs, cluster: Cluster, zero_bytes: float, accumulation: int) -> StepTime:
    """The time of a step. `costs`: of one micro-batch; `zero_bytes`: that this rank sends for ZeRO in a step."""
    t, s = work.tensor_parallel, work.sequence_parallel
    attention = attention_macs(work)
    macs = costs.macs + head_macs(work) + attention
    if work.checkpointing:  # all but the head once more: half of the base's products, a third of the MoRA matrices'
        macs += costs.base_macs // 2 + costs.square_macs // 3 + attention * 2 // 7
    groups = costs.wire("activation") * work.dtype.itemsize / cluster.bandwidth(t) if t > 1 else 0.0
    groups += ulysses_bytes(work) / cluster.bandwidth(s) if s > 1 else 0.0
    # With groups of t, ZeRO's ring has every t-th rank; without, all ranks in order, one of which leaves the node.
    ring = cluster.bandwidth(cluster.ranks // t, t)
    return StepTime(2e-12 * macs * accumulation / cluster.tflops, zero_bytes / ring, groups * accumulation)


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
