"""A plan as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mora_ds.adapters.config import AS_LOADED
from mora_ds.planning.plan import USABLE, Plan
from mora_ds.planning.timing import rates


def report(plan: Plan, timed: bool = True) -> str:
    """Tables for people; sizes in GB (10^9 bytes), or MB where they are small. Not `timed`: the cluster's rates are
    not known."""
    parts = [_head(plan), _memory(plan), _traffic(plan), *([_time(plan)] if timed else []), verdict(plan)]
    return "\n".join(parts)


def verdict(plan: Plan) -> str:
    """Whether it fits, in a sentence."""
    peak, room, work = plan.memory.peak, plan.cluster.memory, plan.work
    if plan.trained.on_cpu:
        after = plan.host_memory_after_merge
        return f"a node needs {_size(plan.host_memory)}, {_size(after)} once a merge has written to its base"
    if plan.fits:
        return f"it fits: {_size(peak)} of {_size(room)} at the highest, in {plan.memory.peaks_in}"
    if plan.memory.base > USABLE * room:
        return (
            f"it does not fit: the base alone is {_size(plan.memory.base)} on every rank, and a device has "
            f"{_size(room)}. It is never sharded: take devices with more memory, a smaller base"
            f"{', or --base_bits 8' if work.base_bits == AS_LOADED else ''}"
        )
    return f"it does not fit: {_size(peak)} at the highest, in {plan.memory.peaks_in}, and a device has {_size(room)}"


def _head(plan: Plan) -> str:
    work, cluster = plan.work, plan.cluster
    replicas = cluster.ranks // (work.tensor_parallel * work.sequence_parallel)
    what = f"{plan.trained.whole:,} trained" + (" a tensor-parallel rank" if work.tensor_parallel > 1 else "")
    return (
        f"plan: {cluster.ranks} ranks, {cluster.per_node} a node; base {plan.base_elements:,} elements, {what}; "
        f"{str(work.dtype).removeprefix('torch.')}, ZeRO {plan.trained.stage}\n"
        f"--per_device_train_batch_size {work.micro_batch} --gradient_accumulation_steps {plan.accumulation} "
        f"--seq_len {work.seq_len} --tensor_parallel_size {work.tensor_parallel} "
        f"--sequence_parallel_size {work.sequence_parallel}"
        f"{' --gradient_checkpointing' if work.checkpointing else ''}: "
        f"{work.micro_batch * plan.accumulation * replicas * work.seq_len:,} tokens a step"
    )


def _memory(plan: Plan) -> str:
    memory, trained = plan.memory, plan.trained
    of_a_rank = [
        ("base, whole", memory.base, _in_8_bits(plan) or "never sharded"),
        ("tables of the operators", memory.tables, ""),
        ("squares, this rank's share", memory.squares, f"1/{trained.ranks}" if trained.stage == 3 else ""),
        ("fp32 masters", memory.masters, "in host memory" if trained.offloads else ""),
        ("optimizer's moments", memory.moments, "in host memory" if trained.offloads else ""),
        ("gradients", memory.gradients, ""),
        ("bucket of gradients", memory.bucket, ""),
        ("= held all the time", memory.held, ""),
        ("+ forward and backward", memory.forward_backward,
         f"activations {_size(memory.activations)}, of them logits {_size(memory.logits)}; "
         f"whole squares {_size(memory.gathered)}"),
        ("+ or: optimizer's step", memory.optimizer_step, ""),
        ("+ or: a merge", memory.merge, ""),
        ("+ or: a save", memory.save, f"rank 0 collects {_size(memory.host_save)} in host memory"),
        ("= at the highest", memory.peak, memory.peaks_in),
        ("host memory of a node", plan.host_memory, "the base's files, mapped, once a node"),
    ]  # fmt: skip
    return "\n".join(f"  {name:<28}{_size(size):>10}  {note}".rstrip() for name, size, note in of_a_rank)


def _in_8_bits(plan: Plan) -> str:
    return f"never sharded; {_size(plan.eight_bits)} of it in 8 bits" if plan.eight_bits else ""


def _traffic(plan: Plan) -> str:
    lines = [
        f"  gathered a step and rank    {_size(plan.gathered):>10}  in {plan.gather_calls} collectives, the trained "
        f"parameters {plan.passes:.2f} times; base 0",
        f"  reduced a step and rank     {_size(plan.reduced):>10}",
        f"  sent a step and rank        {_size(plan.sent):>10}  squares and activations",
    ]
    return "\n".join(lines)


def _time(plan: Plan) -> str:
    time = plan.time
    lines = [
        f"  step {time.step:.3f} s = {plan.tokens_per_second:,.0f} tokens/s: arithmetic {time.products:.3f} s, "
        f"squares {time.zero:.3f} s beside it, activations between ranks {time.groups:.3f} s",
        f"  the bottleneck is {time.bottleneck}",
    ]
    return "\n".join(lines)


def as_json(plan: Plan) -> dict[str, Any]:
    """The same for programs; bytes and seconds."""
    work = plan.work
    return {
        "settings": {
            "per_device_train_batch_size": work.micro_batch,
            "gradient_accumulation_steps": plan.accumulation,
            "seq_len": work.seq_len,
            "tensor_parallel_size": work.tensor_parallel,
            "sequence_parallel_size": work.sequence_parallel,
            "gradient_checkpointing": work.checkpointing,
            "dtype": str(work.dtype).removeprefix("torch."),
            "base_bits": work.base_bits,
        },
        "cluster": dict(rates(plan.cluster)),
        "base_elements": plan.base_elements,
        "base_bytes_in_8_bits": plan.eight_bits,
        "trained_elements": plan.trained.whole,
        "bytes": {**asdict(plan.memory), "held": plan.memory.held, "peak": plan.memory.peak},
        "host_bytes_of_node": plan.host_memory,
        "host_bytes_of_node_after_merge": plan.host_memory_after_merge,
        "bytes_gathered": plan.gathered,
        "gather_calls": plan.gather_calls,
        "passes": plan.passes,
        "bytes_reduced": plan.reduced,
        "bytes_sent": plan.sent,
        "seconds": {**asdict(plan.time), "step": plan.time.step},
        "tokens_per_second": plan.tokens_per_second,
        "bottleneck": plan.time.bottleneck,
        "peaks_in": plan.memory.peaks_in,
        "fits": plan.fits,
    }


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
