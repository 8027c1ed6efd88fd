"""A plan as text and as JSON."""

from dataclasses import asdict
from typing import Any

from mora_ds.adapters.config import AS_LOADED
from mora_ds.engine.device import BaseDevice
from mora_ds.planning.plan import USABLE, Plan

FEWER_BITS = {AS_LOADED: ", --base_bits 8 or 4", 8: ", --base_bits 4"}
"""What else there is where the base of so many bits is too large."""


def report(plan: Plan) -> str:
    """The plan as tables; sizes in GB (10^9 bytes), or MB where they are small."""
    lines = [*_head(plan), *_memory(plan), *_traffic(plan), verdict(plan)]
    return "\n".join(lines)


def verdict(plan: Plan) -> str:
    """Whether the run fits, as a sentence."""
    peak = plan.memory.peak
    capacity = plan.cluster.memory
    if plan.trained.on_cpu:
        return f"a node needs {size_text(plan.host_memory)}"
    if plan.fits:
        return f"it fits: {size_text(peak)} of {size_text(capacity)} at the peak, in {plan.memory.peaks_in}"
    if plan.memory.base > USABLE * capacity:
        return (
            f"it does not fit: the base alone is {size_text(plan.memory.base)} on every GPU, and a device has "
            f"{size_text(capacity)}. The base is never sharded: use devices with more memory, a smaller base"
            f"{FEWER_BITS.get(plan.work.base_bits or 0, '')}"
            f"{'' if plan.work.base_on_host else ', or --base_device host'}"
        )
    return (
        f"it does not fit: {size_text(peak)} at the peak, in {plan.memory.peaks_in}; a device has {size_text(capacity)}"
    )


def _head(plan: Plan) -> list[str]:
    work = plan.work
    cluster = plan.cluster
    replicas = cluster.ranks // (work.tensor_parallel * work.sequence_parallel)
    what = f"{plan.trained.total:,} trained" + (" a tensor-parallel rank" if work.tensor_parallel > 1 else "")
    flags = [
        f"--per_device_train_batch_size {work.micro_batch}",
        f"--gradient_accumulation_steps {plan.accumulation}",
        f"--seq_len {work.seq_len}",
    ]
    if work.tensor_parallel > 1:
        flags.append(f"--tensor_parallel_size {work.tensor_parallel}")
    if work.sequence_parallel > 1:
        flags.append(f"--sequence_parallel_size {work.sequence_parallel}")
    if work.checkpointing:
        flags.append("--gradient_checkpointing")
    if work.base_on_host:
        flags.append("--base_device host")
    tokens = work.micro_batch * plan.accumulation * replicas * work.seq_len
    return [
        f"plan: {cluster.ranks} ranks, {cluster.per_node} a node; base {plan.base_elements:,} elements, {what}; "
        f"{_dtype(plan)}, ZeRO {plan.trained.stage}",
        f"{' '.join(flags)}: {tokens:,} tokens a step",
    ]


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    trained = plan.trained
    in_host_memory = "in host memory" if trained.offloads else ""
    quantized = f"; {size_text(plan.quantized)} of it in {plan.work.base_bits} bits" if plan.quantized else ""
    where = "never sharded"
    if memory.host_base:
        buffers = size_text(memory.base_buffers)
        host = size_text(memory.host_base)
        where = f"{buffers} of it buffers of decoder layers, which are in host memory: {host}, unsharded"
    merges = (
        [("each merge adds", plan.a_merge_adds, "its matrices, unsharded, and index tables")]
        if plan.a_merge_adds
        else []
    )
    logits = f", of them logits {size_text(memory.logits)}" if memory.logits else ""
    rows = [
        ("base, unsharded", memory.base, f"{where}{quantized}"),
        ("index tables", memory.tables, ""),
        ("MoRA matrices, this shard", memory.squares, f"1/{trained.ranks}" if trained.stage == 3 else ""),
        ("fp32 masters", memory.masters, in_host_memory),
        ("optimizer's moments", memory.moments, in_host_memory),
        ("gradients", memory.gradients, ""),
        ("gradient bucket", memory.bucket, ""),
        ("= static memory", memory.static, ""),
        ("+ forward and backward", memory.forward_backward,
         f"activations {size_text(memory.activations)}{logits}; "
         f"gathered MoRA matrices {size_text(memory.gathered)}"),
        ("+ or: optimizer's step", memory.optimizer_step, ""),
        ("+ or: a merge", memory.merge, ""),
        ("+ or: a save", memory.save, f"rank 0 collects {size_text(memory.host_save)} in host memory"),
        ("= peak", memory.peak, memory.peaks_in),
        *merges,
        ("host memory of a node", plan.host_memory,
         "the base, locked, once a node" if memory.host_base else "the base's files, mapped, once a node"),
    ]  # fmt: skip
    return [_row(*row) for row in rows]


def _traffic(plan: Plan) -> list[str]:
    return [
        _row(
            "all-gather volume",
            plan.gathered,
            f"the trained parameters {plan.passes:.2f} times; base 0",
        ),
        _row("reduced a step and GPU", plan.reduced, ""),
        _row("sent a step and GPU", plan.sent, "MoRA matrices and activations"),
        *([_row("copied from host memory", plan.copied, "the base, a step and GPU")] if plan.memory.host_base else []),
    ]


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan for programs, in bytes."""
    work = plan.work
    return {
        "settings": {
            "per_device_train_batch_size": work.micro_batch,
            "gradient_accumulation_steps": plan.accumulation,
            "seq_len": work.seq_len,
            "tensor_parallel_size": work.tensor_parallel,
            "sequence_parallel_size": work.sequence_parallel,
            "gradient_checkpointing": work.checkpointing,
            "dtype": _dtype(plan),
            "base_bits": work.base_bits,
            "base_device": (BaseDevice.HOST if work.base_on_host else BaseDevice.DEVICE).value,
        },
        "cluster": {
            "gpus": plan.cluster.ranks,
            "gpus_per_node": plan.cluster.per_node,
            "gpu_memory": plan.cluster.memory / 1e9,
        },
        "base_elements": plan.base_elements,
        "base_bytes_in_8_bits": plan.quantized if work.base_bits == 8 else 0,
        "base_bytes_in_4_bits": plan.quantized if work.base_bits == 4 else 0,
        "bytes_a_merge_adds": plan.a_merge_adds,
        "trained_elements": plan.trained.total,
        "bytes": {**asdict(plan.memory), "held": plan.memory.static, "peak": plan.memory.peak},
        "host_bytes_of_node": plan.host_memory,
        "bytes_gathered": plan.gathered,
        "passes": plan.passes,
        "bytes_reduced": plan.reduced,
        "bytes_sent": plan.sent,
        "base_bytes_copied": plan.copied,
        "peaks_in": plan.memory.peaks_in,
        "fits": plan.fits,
    }


def _row(name: str, size: float, note: str) -> str:
    return f"  {name:<28}{size_text(size):>10}  {note}".rstrip()


def _dtype(plan: Plan) -> str:
    return str(plan.work.dtype).removeprefix("torch.")


def size_text(count: float) -> str:
    """Bytes in GB (10^9), or in MB where they are few."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
