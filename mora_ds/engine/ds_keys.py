"""The keys of a DeepSpeed JSON: those that DeepSpeed 0.19 reads, and those that mora_ds
does not support, with the reason.

DeepSpeed silently ignores an unknown top-level key; a test compares our list with the
source of the installed version.
"""

import json
from collections.abc import Iterator
from typing import Any, TypeAlias

from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

DsConfig: TypeAlias = dict[str, Any]
"""A DeepSpeed config, or a part of one."""

AUTO = "auto"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TOP_LEVEL = _words(
    """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping optimizer bf16 fp16
    zero_optimization data_types zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    communication_data_type prescale_gradients gradient_predivide_factor gradient_allreduce_op disable_allgather
    managed_gradient_accumulation steps_per_print wall_clock_breakdown memory_breakdown dump_state log_level
    disable_python_gc vocabulary_size dataloader_drop_last activation_checkpointing comms_logger flops_profiler
    tensorboard wandb csv_monitor comet timers compile
    """
)


def _fields(model: Any) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in model.model_fields.items())


SECTIONS: dict[str, frozenset[str]] = {
    "zero_optimization": _fields(DeepSpeedZeroConfig),
    "zero_optimization.offload_optimizer": _fields(DeepSpeedZeroOffloadOptimizerConfig),
    "bf16": _fields(DeepSpeedBF16Config),
    "fp16": _fields(DeepSpeedFP16Config),
    "data_types": _words(
        "grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules"
    ),
    "optimizer": _words("type params legacy_fusion"),
    "optimizer.params": _words(
        """
        lr betas eps weight_decay torch_adam adam_w_mode foreach fused
        muon_lr momentum ns_method
        """
    ),
}
"""Dotted path of a checked section -> its keys."""

OTHER_SECTIONS = _words(
    """
    activation_checkpointing comet comms_logger compile csv_monitor flops_profiler tensorboard timers wandb
    """
)
"""Sections whose keys only DeepSpeed checks."""

_BASE_IS_UNSHARDED = (
    "the frozen base is not a parameter for DeepSpeed: it is unsharded on every rank"
)

_ZERO_PLUS_PLUS = "ZeRO++ is for sharded bases; here only the MoRA matrices are sharded, which must not be rounded"

_AUTO_TP = "it would shard the base: --tensor_parallel_size (`tensor_parallel_size` of initialize) splits MoRA matrices"

_MASTER = "the master weights of the MoRA matrices and Adam's moments must stay in fp32"

REFUSED: dict[str, str] = {
    "scheduler": "the learning rate follows the merges: set it with --lr_scheduler_type, --warmup_steps, --merge_every",
    "autotp": _AUTO_TP,
    "tensor_parallel": _AUTO_TP,
    "amp": 'DeepSpeed no longer has apex: use "bf16" or "fp16"',
    "bfloat16": 'write "bf16"',
    "torch_autocast": 'the base is loaded in the compute dtype: use "bf16" or "fp16"',
    "pipeline": "mora_ds does not run on DeepSpeed's pipeline engine",
    "expert_parallel": "mora_ds does not run under expert parallelism",
    "sequence_parallel_size": "set it with --sequence_parallel_size",
    "hybrid_engine": "it is for generation between training steps",
    "data_efficiency": "mora_ds packs the batches: a batch is a function of the step",
    "weight_quantization": "it is for inference",
    "checkpoint": "mora_ds writes and reads checkpoints itself",
    "datastates_ckpt": "mora_ds writes checkpoints itself; --async_save writes them in the background",
    "aio": "nothing is offloaded to disks",
    "zero_optimization.offload_param": f"{_BASE_IS_UNSHARDED}, and the MoRA matrices are small",
    "zero_optimization.cpu_offload_param": f"{_BASE_IS_UNSHARDED}, and the MoRA matrices are small",
    "zero_optimization.cpu_offload": 'write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.offload_optimizer.super_offload": "it steps in a process whose Adam's state no merge can reset",
    "zero_optimization.zero_hpz_partition_size": _ZERO_PLUS_PLUS,
    "zero_optimization.zero_quantized_weights": _ZERO_PLUS_PLUS,
    "zero_optimization.zero_quantized_gradients": _ZERO_PLUS_PLUS,
    "zero_optimization.zenflow": "it keeps Adam's state where a merge cannot reset it",
    "zero_optimization.round_robin_gradients": "a merge relies on the order of the master weights",
    "optimizer.params.adam_lr": 'with Muon, "lr" is the learning rate of AdamW and "muon_lr" that of the MoRA matrices',
    "optimizer.params.per_head_muon": "a MoRA matrix is not an attention projection",
    "bf16.bf16_master_weights_and_grads": _MASTER,
    "bf16.bf16_optimizer_states": _MASTER,
    "fp16.fp16_master_weights_and_grads": _MASTER,
}
"""Dotted path of an unsupported setting -> the reason. `false`, `null` and
`{"enabled": false}` are accepted."""

REFUSED_WITH_MUON: dict[str, str] = {
    "zero_optimization.save_muon_momentum_buffer_in_memory": "a resumed run would start with the momentum at zero",
}
"""The same for settings that are unsupported with Muon."""

ONLY_FOR_ADAM = frozenset(("foreach", "fused"))

ONLY_FOR_MUON = frozenset(("muon_lr", "momentum", "ns_method"))
"""Keys of optimizer.params that the other optimizer rejects or ignores."""

DISABLED_VALUES: tuple[Any, ...] = (
    None, False, {}, {"enabled": False}, {"device": "none"}, {"autotp_size": 0}, {"autotp_size": 1}
)  # fmt: skip
"""Values with which an unsupported key has no effect. The key is removed, because
DeepSpeed rejects some of them even with such a value."""


def at(config: DsConfig, path: str) -> Any:
    """The value at a dotted path, or None. The empty path is the config itself."""
    value: Any = config
    for key in path.split(".") if path else ():
        value = value.get(key) if isinstance(value, dict) else None
    return value


def fill(config: DsConfig, *wanted: tuple[str, Any, str]) -> Iterator[str]:
    """Set each (dotted path, value, reason) whose path is missing or "auto". Yields a
    message for each path with another value."""
    for path, value, why in wanted:
        *sections, key = path.split(".")
        section = config
        for name in sections:
            section = section.setdefault(name, {})
        if section.get(key, AUTO) in (AUTO, value):
            section[key] = value
        else:
            yield f'{path} = {json.dumps(section[key])} but {why}; set it to "auto"'


DEFAULTS = {"zero_optimization.zero_hpz_partition_size": 1}
"""Unsupported key -> its default, with which it has no effect."""


def refused_keys(config: DsConfig, table: dict[str, str]) -> Iterator[str]:
    """Remove all keys of `table` from the config. Yields a message for each that was
    set."""
    for path, reason in table.items():
        parent, _, key = path.rpartition(".")
        holder = at(config, parent)
        if not holder or key not in holder:
            continue
        if holder.pop(key) not in (*DISABLED_VALUES, DEFAULTS.get(path)):
            yield f'"{path}" cannot be used: {reason}'


_SECRETS = ("key", "token", "secret", "password")
_MASK = "***"


def masked(content: Any, is_secret: bool = False) -> Any:
    """A copy of `content` without secrets: all strings below a name such as comet's
    api_key are masked."""
    if isinstance(content, dict):
        copy = {}
        for name, value in content.items():
            names_secret = any(word in str(name).lower() for word in _SECRETS)
            copy[name] = masked(value, is_secret or names_secret)
        return copy
    if isinstance(content, list):
        return [masked(value, is_secret) for value in content]
    return _MASK if is_secret and isinstance(content, str) and content else content
