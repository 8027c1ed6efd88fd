"""A plan as text and as JSON."""

from dataclasses import asdict

from mora_ds.adapters.config import AS_LOADED
from mora_ds.adapters.registry import adapter_type
from mora_ds.common.files import JsonObject
from mora_ds.engine.settings import BaseDevice
from mora_ds.planning.plan import USABLE, Plan
from mora_ds.planning.utilization import PEAK_TFLOPS

FEWER_BITS = {AS_LOADED: ", --base_bits 8 or 4", 8: ", --base_bits 4"}
"""The alternatives if the base with this number of bits is too large."""


def report(plan: Plan) -> str:
    """The plan as tables; sizes in GB (10^9 bytes), or MB where they are small."""
    rows = [
        f"  {name:<28}{size_text(size):>10}  {note}".rstrip()
        for name, size, note in _rows(plan)
    ]
    return "\n".join([*_head(plan), *rows, verdict(plan)])


def verdict(plan: Plan) -> str:
    """Whether the run fits, as a sentence."""
    peak = size_text(plan.memory.peak)
    capacity = size_text(plan.cluster.memory)
    if plan.fits:
        return f"it fits: {peak} of {capacity} at the peak, in {plan.memory.peaks_in}"
    if plan.memory.base <= USABLE * plan.cluster.memory:
        return f"it does not fit: {peak} at the peak, in {plan.memory.peaks_in}; a device has {capacity}"
    advice = "use devices with more memory, a smaller base"
    if plan.work.adapter is not None:
        advice += FEWER_BITS.get(plan.work.adapter.base_bits, "")
    if not plan.work.base_on_host:
        advice += ", or --base_device host"
    return (
        f"it does not fit: the base alone is {size_text(plan.memory.base)} on every GPU, and a device has {capacity}. "
        f"The base is never sharded: {advice}"
    )


def _head(plan: Plan) -> list[str]:
    cluster = plan.cluster
    flags = " ".join(f"--{name} {value}" for name, value in _settings(plan).items())
    return [
        f"plan: {cluster.ranks} ranks, {cluster.per_node} per node; base {plan.base_elements:,} elements, "
        f"{plan.trained.total:,} trained; {str(plan.work.dtype).removeprefix('torch.')}, ZeRO {plan.trained.stage}",
        f"{flags}: {plan.tokens:,} tokens per step",
    ]


def _settings(plan: Plan) -> JsonObject:
    """The flags of training that decide what a micro-batch takes."""
    work = plan.work
    base_device = BaseDevice.HOST if work.base_on_host else BaseDevice.DEVICE
    return {
        "per_device_train_batch_size": work.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "seq_len": work.seq_len,
        "tensor_parallel_size": work.tensor_parallel,
        "sequence_parallel_size": work.sequence_parallel,
        "gradient_checkpointing": work.checkpointing,
        "base_device": base_device.value,
    }


def _rows(plan: Plan) -> list[tuple[str, float, str]]:
    """(name, bytes, note) of each line."""
    memory = plan.memory
    in_host_memory = "in host memory" if plan.trained.offloads else ""
    share = f"1/{plan.trained.ranks}" if plan.trained.stage == 3 else ""
    matrix_bytes = memory.trained * plan.trained.matrix_numel / plan.trained.total
    title = "trained parameters"
    is_full = plan.work.adapter is None
    if plan.work.adapter is None:
        matrix_bytes = memory.trained
    else:
        title = adapter_type(plan.work.adapter.adapter).weights_title
    activations = f"activations {size_text(memory.activations)}"
    gathered = f"gathered parameters {size_text(memory.gathered)}"
    collected = f"rank 0 collects {size_text(memory.host_save)} in host memory"
    base = "never sharded"
    if memory.host_base:
        base = f"{size_text(memory.host_base)} more in host memory, unsharded; two layers of it are here"
    if plan.quantized:
        base += f"; {size_text(plan.quantized)} of it quantized"
    rows: list[tuple[str, float, str]] = [
        ("base, unsharded", memory.base, base),
        ("index tables", memory.tables, ""),
        (f"{title}, this shard", matrix_bytes, share),
        ("embeddings and others", memory.trained - matrix_bytes, share),
        ("fp32 master weights", memory.master_weights, in_host_memory),
        ("optimizer's moments", memory.moments, in_host_memory),
        ("gradients", memory.gradients, ""),
        ("gradient bucket", memory.bucket, ""),
        ("= static memory", memory.static, ""),
        (
            "+ forward and backward",
            memory.forward_backward,
            f"{activations}; {gathered}",
        ),
        ("+ or: optimizer's step", memory.optimizer_step, ""),
        ("+ or: a merge", memory.merge, ""),
        ("+ or: a save", memory.save, collected),
        ("= peak", memory.peak, memory.peaks_in),
        ("host memory of a node", plan.host_memory, "one copy of the base"),
        ("all-gather volume", plan.gathered, "trained parameters; base 0"),
        ("sent per GPU per step", plan.sent, "by ZeRO"),
        ("a checkpoint", plan.checkpoint, "" if is_full else "and the merge ledger"),
    ]
    if plan.bytes_per_merge:
        kinds = "its matrices, unsharded, and index tables"
        rows.append(("each merge adds", plan.bytes_per_merge, kinds))
    if plan.copied:
        rows.append(
            ("copied from host memory", plan.copied, "the base, per GPU per step")
        )
    return [row for row in rows if row[1] or row[0] != "embeddings and others"]


def cost_lines(plan: Plan, steps: int, mfu: float | None = None) -> list[str]:
    """What a run of `steps` steps computes, and for how long if it uses the fraction `mfu`
    of an H100's peak. `steps`: -1 where --num_train_epochs decides."""
    lines = [f"compute: {plan.token_flops:.2e} FLOPs per token"]
    if steps > 0:
        tokens = steps * plan.tokens
        flops = tokens * plan.token_flops
        lines.append(f"the run: {steps:,} steps, {tokens:,} tokens, {flops:.2e} FLOPs")
        if mfu is not None:
            hours = flops / (mfu * PEAK_TFLOPS["H100"] * 1e12 * 3600)
            lines.append(f"at an MFU of {mfu:.0%}: {hours:,.1f} GPU-hours of an H100")
    return lines


def as_json(plan: Plan) -> JsonObject:
    """The plan for programs, in bytes."""
    return {
        "settings": _settings(plan),
        "gpus": plan.cluster.ranks,
        "base_elements": plan.base_elements,
        "trained_elements": plan.trained.total,
        "bytes": {
            **asdict(plan.memory),
            "held": plan.memory.static,
            "peak": plan.memory.peak,
        },
        "host_bytes_of_node": plan.host_memory,
        "bytes_a_merge_adds": plan.bytes_per_merge,
        "bytes_gathered": plan.gathered,
        "bytes_reduced": plan.reduced,
        "bytes_sent": plan.sent,
        "base_bytes_copied": plan.copied,
        "bytes_of_checkpoint": plan.checkpoint,
        "tokens_per_step": plan.tokens,
        "flops_per_token": plan.token_flops,
        "fits": plan.fits,
    }


def size_text(count: float) -> str:
    """Bytes in GB (10^9), or in MB where they are few."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
