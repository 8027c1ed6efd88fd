"""The keys of a DeepSpeed JSON that DeepSpeed 0.19 reads, those that a run with whole bases must not hold, and how to
reach them.

DeepSpeed ignores an unknown top-level key without a word; a test holds these tables against the installed version.
"""

from __future__ import annotations

import json
from typing import Any

SECTION, KEY = "tensor_parallel", "autotp_size"

FLAG = "--tensor_parallel_size"


def degree_in(config: dict[str, Any]) -> int | None:
    """The degree that a config names; None where it leaves it open. One that makes no sense is found by
    `take_degree`."""
    section = config.get(SECTION)
    degree = section.get(KEY, AUTO) if isinstance(section, dict) else AUTO
    if not isinstance(degree, int) or isinstance(degree, bool):
        return None
    return max(degree, 1)  # DeepSpeed's 0: off


def take_degree(config: dict[str, Any], wanted: int | None) -> list[str]:
    """Takes the section out of a config; what is wrong with it, or differs from the degree `wanted` (None: any)."""
    section = config.pop(SECTION, None)
    if section in QUIETLY_OFF:
        return []
    if not isinstance(section, dict):
        return [f'"{SECTION}" must be an object with keys of its own, not {section!r}']
    problems = [
        f'"{SECTION}.{key}" cannot be used: it is for AutoTP, which shards the base; "{KEY}" is all that is read'
        for key in section
        if key != KEY
    ]
    found = section.get(KEY, AUTO)
    degree = degree_in({SECTION: section})
    if found != AUTO and (degree is None or found < 0):
        problems.append(f"{SECTION}.{KEY} must be a whole number or {json.dumps(AUTO)}, got {json.dumps(found)}")
    elif degree is not None and wanted is not None and degree != wanted:
        problems.append(f'{SECTION}.{KEY} = {found} but {FLAG} = {wanted}; set it to "auto", or leave the flag out')
    return problems


AUTO = "auto"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TOP_LEVEL = _words(
    """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping optimizer bf16 fp16
    zero_optimization data_types checkpoint zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    communication_data_type prescale_gradients gradient_predivide_factor gradient_allreduce_op disable_allgather
    managed_gradient_accumulation steps_per_print wall_clock_breakdown memory_breakdown dump_state log_level
    disable_python_gc vocabulary_size dataloader_drop_last activation_checkpointing comms_logger flops_profiler
    tensorboard wandb csv_monitor comet aio timers compile datastates_ckpt
    """
)

SECTIONS: dict[str, frozenset[str]] = {
    "zero_optimization": _words(
        """
        stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
        allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights
        elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size cpu_offload_param
        cpu_offload_use_pin_memory cpu_offload stage3_prefetch_bucket_size stage3_param_persistence_threshold
        stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance
        stage3_gather_16bit_weights_on_model_save stage3_module_granularity_threshold
        stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential stage3_gather_fp16_weights_on_model_save
        ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment zero_hpz_partition_size
        zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear
        pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks
        save_muon_momentum_buffer_in_memory leaf_module
        """
    ),
    "zero_optimization.offload_optimizer": _words(
        """
        device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload
        cpuadam_cores_perc
        """
    ),
    "bf16": _words(
        "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
    ),
    "fp16": _words(
        """
        enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
        min_loss_scale fp16_master_weights_and_grads
        """
    ),
    "data_types": _words("grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules"),
    "optimizer": _words("type params legacy_fusion"),
    "optimizer.params": _words(
        """
        lr betas eps weight_decay torch_adam adam_w_mode bias_correction foreach fp32_optimizer_states
        muon_lr momentum ns_method
        """
    ),
}
"""Keys of each section that is checked, by its dotted path."""

_BASE_IS_WHOLE = "the frozen base is no parameter of DeepSpeed's here: every rank holds it whole"

_MASTER = "the master copy of the squares and Adam's moments must stay in fp32"

REFUSED: dict[str, str] = {
    "scheduler": "the learning rate follows the merges: set it with --lr_scheduler_type, --warmup_steps, --merge_every",
    "autotp": 'it would shard the base; write "tensor_parallel": {"autotp_size": t}',
    "amp": 'apex is gone from DeepSpeed: use "bf16" or "fp16"',
    "bfloat16": 'write "bf16"',
    "torch_autocast": 'the base is loaded in the compute dtype: use "bf16" or "fp16"',
    "pipeline": "mora_ds does not run on DeepSpeed's pipeline engine",
    "expert_parallel": "mora_ds does not run under expert parallelism",
    "sequence_parallel_size": "set it with --sequence_parallel_size",
    "hybrid_engine": "it is for generation in between training steps",
    "data_efficiency": "batches are packed by mora_ds: a batch is a function of the step",
    "weight_quantization": "it is for inference",
    "zero_optimization.offload_param": f"{_BASE_IS_WHOLE}, and the squares are small",
    "zero_optimization.cpu_offload_param": f"{_BASE_IS_WHOLE}, and the squares are small",
    "zero_optimization.cpu_offload": 'write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.zenflow": "it keeps Adam's state where a merge cannot reset it",
    "zero_optimization.round_robin_gradients": "masters then lie in another order than a merge reads them in",
    "optimizer.params.adam_lr": 'with Muon "lr" is the rate of AdamW\'s half and "muon_lr" that of the squares',
    "optimizer.params.per_head_muon": "a square is no attention projection",
    "bf16.bf16_master_weights_and_grads": _MASTER,
    "bf16.bf16_optimizer_states": _MASTER,
    "fp16.fp16_master_weights_and_grads": _MASTER,
}
"""Settings that cannot be, by dotted path, with the reason. `false`, `null` and `{"enabled": false}` pass."""

REFUSED_WITH_MUON: dict[str, str] = {
    "zero_optimization.save_muon_momentum_buffer_in_memory": "a resumed run would start with the momentum at zero",
    "zero_optimization.zero_quantized_gradients": "stage 3 refuses it",
    "zero_optimization.offload_optimizer.ratio": "Muon's momentum is offloaded whole",
    "zero_optimization.offload_optimizer.super_offload": "it steps on its own Adam",
}
"""The same for what Muon cannot run with."""

ONLY_FOR_ADAM = frozenset(("bias_correction", "fp32_optimizer_states"))

ONLY_FOR_MUON = frozenset(("muon_lr", "momentum", "ns_method"))
"""Keys of optimizer.params that the other optimizer would stumble over, or ignore."""

QUIETLY_OFF: tuple[Any, ...] = (None, False, {}, {"enabled": False}, {"device": "none"})
"""Values with which a refused key does nothing: it is dropped, as DeepSpeed refuses some of them even so."""


def at(config: dict[str, Any], path: str) -> Any:
    """The value at a dotted path, or None."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def fill(config: dict[str, Any], path: str, wanted: Any, flag: str) -> list[str]:
    """Puts `wanted` at a dotted path that is absent or "auto"; a problem where another value stands there."""
    *sections, key = path.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    found = config.get(key, AUTO)
    if found in (AUTO, wanted):
        config[key] = wanted
        return []
    return [f'{path} = {json.dumps(found)} but {flag}; set it to "auto"']


def refused_keys(config: dict[str, Any], table: dict[str, str]) -> list[str]:
    """A problem for every key of `table` (dotted path -> reason) that is set; all of them are taken out."""
    problems = []
    for path, reason in table.items():
        parent, _, key = path.rpartition(".")
        holder = at(config, parent) if parent else config
        if holder and key in holder and holder.pop(key) not in QUIETLY_OFF:
            problems.append(f'"{path}" cannot be used: {reason}')
    return problems
