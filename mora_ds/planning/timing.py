"""How long a step takes, from the rates of arithmetic and links: products, and every byte that a rank sends.

A model of rates only: kernels that do not reach the matrix rate, latency of collectives and waiting for a slow rank are
not in it. ZeRO's traffic runs beside the products (`overlap_comm`, stage 3's default); that of tensor and sequence
parallelism between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mora_ds.planning.costs import Costs
from mora_ds.planning.step import Work


@dataclass(frozen=True)
class Cluster:
    """Ranks, where they are, and what they can do."""

    ranks: int
    per_node: int = 8
    memory: float = 80e9
    """Bytes of a device."""
    tflops: float = 400.0
    """10^12 floating-point operations a second that matrix products reach on one device."""
    link: float = 200e9
    """Bytes a second that a rank sends within its node."""
    node_link: float = 50e9
    """Bytes a second that a node sends to others, all its ranks together."""

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.per_node)

    def rate(self, group: int, stride: int = 1) -> float:
        """Bytes a second of a rank in a ring of `group` ranks, `stride` apart; one that leaves the node shares the
        node's link with the rings of its neighbours."""
        if (group - 1) * stride < self.per_node:
            return self.link
        return min(self.link, self.node_link / min(stride, self.per_node))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by cause."""

    products: float
    zero: float
    """Gathers and reductions of what is trained."""
    groups: float
    """Activations between the ranks of a tensor- or sequence-parallel group."""

    @property
    def step(self) -> float:
        return max(self.products, self.zero) + self.groups

    @property
    def bottleneck(self) -> str:
        """What takes longest."""
        causes = {
            "arithmetic": self.products,
            "gathering and reducing the squares": self.zero,
            "activations between ranks of a group": self.groups,
        }
        return max(causes, key=lambda name: causes[name])


def step_time(
    work: Work, costs: Costs, cluster: Cluster, zero_bytes: float, accumulation: int, head_macs: int
) -> StepTime:
    """`costs`: of one micro-batch; `zero_bytes`: that this rank sends for ZeRO in a step."""
    t, s = work.tensor_parallel, work.sequence_parallel
    macs = costs.macs + head_macs + attention_macs(work)
    if work.checkpointing:  # all but the head once more: half of the base's products, a third of the squares'
        macs += costs.base_macs // 2 + costs.square_macs // 3 + attention_macs(work) * 2 // 7
    groups = costs.wire("activation") * work.dtype.itemsize / cluster.rate(t) if t > 1 else 0.0
    groups += exchanged_bytes(work) / cluster.rate(s) if s > 1 else 0.0
    # with groups of t, ZeRO's ring takes every t-th rank; without, all ranks in order: one of them leaves the node
    ring = cluster.rate(cluster.ranks // t, t)
    return StepTime(2e-12 * macs * accumulation / cluster.tflops, zero_bytes / ring, groups * accumulation)


def attention_macs(work: Work) -> int:
    """Of scores and their product with the values in one micro-batch, causal, forward and backward (which forms the
    scores again: 7 products in all, half of each)."""
    text: Any = work.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    shared = work.sequence_parallel * work.tensor_parallel
    return 7 * text.num_hidden_layers * work.micro_batch * work.seq_len**2 * width // (2 * shared)


def head_macs(work: Work) -> int:
    """Of the frozen output head, forward and input gradient."""
    text: Any = work.config.get_text_config()
    return 2 * work.tokens * text.hidden_size * text.vocab_size


def exchanged_bytes(work: Work) -> float:
    """That a rank sends in a micro-batch for Ulysses: queries, keys, values and outputs, forward and backward."""
    text: Any = work.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_values = max(getattr(text, "num_key_value_heads", None) or heads, work.sequence_parallel)
    width, s = 2 * head * (heads + key_values), work.sequence_parallel
    passes = 3 if work.checkpointing else 2
    return passes * text.num_hidden_layers * work.tokens * width * work.dtype.itemsize * (s - 1) / s


def tokens_a_second(work: Work, cluster: Cluster, time: StepTime, accumulation: int) -> float:
    """Of all ranks together."""
    replicas = cluster.ranks // (work.tensor_parallel * work.sequence_parallel)
    return work.micro_batch * work.seq_len * accumulation * replicas / time.step


def rates(cluster: Cluster) -> Mapping[str, float]:
    """The cluster in the units of the flags."""
    return {
        "gpus": cluster.ranks,
        "gpus_per_node": cluster.per_node,
        "gpu_memory": cluster.memory / 1e9,
        "tflops": cluster.tflops,
        "link_gbps": cluster.link * 8e-9,
        "node_link_gbps": cluster.node_link * 8e-9,
    }
