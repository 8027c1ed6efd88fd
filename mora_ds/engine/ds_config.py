"""From DeepSpeed's JSON with "auto" values to the dictionary for
`deepspeed.initialize`.

    load_ds_config(path)          reads the file; an error names the line
    complete_ds_config(...)       for a user's own loop without our flags: fills "auto" from the model, checks
    resolve_ds_config(...)        fills "auto" from the flags, adds our defaults, lists every contradiction at once
    compute_dtype(ds_config)      the dtype in which the base is to be loaded
    fill_bucket_sizes(...)        once the model is injected: buffers and thresholds of ZeRO from its parameters' sizes
    avoid_slices(...)             on many ranks: collectives of ZeRO whose Python does not grow with their number

Facts about DeepSpeed are those of 0.19.8: runtime/config.py, runtime/zero/config.py,
runtime/engine.py.
"""

import copy
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError

from mora_ds.common.errors import (
    MOST_PROBLEMS,
    UserError,
    nearest,
    raise_validation_errors,
    reason,
)
from mora_ds.common.untrusted import parse_json, read_text
from mora_ds.engine.ds_keys import (
    AUTO,
    OTHER_SECTIONS,
    REFUSED,
    SECTIONS,
    TOP_LEVEL,
    DsConfig,
    at,
    fill,
    masked,
    refused_keys,
)
from mora_ds.engine.ds_optimizer import match_optimizer, optimizer_problems
from mora_ds.engine.settings import EngineSettings

PERSIST_BUDGET_BYTES = 64 * 2**20
"""Memory for parameters that ZeRO-3 keeps unsharded (`fill_bucket_sizes`)."""

REDUCE_BUCKET_NUMEL = 2**25
"""Most elements of the gradient bucket, which ZeRO allocates (DeepSpeed's default:
5e8)."""

PREFETCH_PARAMETERS = 8
"""Parameters to prefetch: about a transformer block, with its seven linear layers."""

FEW_SLICES = 1 << 13
"""Slices (parameters times ranks) that take ZeRO-3 little time against a step."""

BYTES_PER_SLICE_OVERHEAD = 300_000
"""Bytes that a GPU sends (50 GB/s) while Python goes through a slice (6 us)."""

MANY_RANKS = 256
"""Ranks from which on the loops of ZeRO-1 and ZeRO-2 take longer than 2 ms a bucket, a
sixth of a step of 7B."""

_BUCKET_KEYS = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
)
_KEEP_AUTO = (*_BUCKET_KEYS, "keep_in_fp32_modules")
"""Keys whose "auto" `fill_bucket_sizes` or DeepSpeed replaces."""
_FIXED: dict[str, tuple[Any, str]] = {
    "zero_optimization.offload_optimizer.ratio": (
        1,
        "the rest would step in a second optimizer, whose state no merge resets",
    ),
    "gradient_allreduce_op": ("mean", "the loss is an average over tokens"),
    "managed_gradient_accumulation": (True, "the training loop relies on it"),
}
"""Dotted path -> the value that it must have where it is set, and why."""
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def load_ds_config(config: DsConfig | str | Path | None) -> DsConfig:
    """The JSON at a path, a copy of a dictionary, or, for None, ZeRO-3 with its
    defaults.

    Raises `UserError` for a file that is missing, no JSON (with line and column), or
    has a key twice.
    """
    if config is None:
        return {"zero_optimization": {"stage": 3}}
    return copy.deepcopy(config) if isinstance(config, dict) else _read(Path(config))


def _read(path: Path) -> DsConfig:
    def unique(pairs: list[tuple[str, Any]]) -> DsConfig:
        counts = Counter(key for key, _ in pairs)
        if twice := sorted(key for key, count in counts.items() if count > 1):
            raise UserError(f"{path}: key given twice: {', '.join(twice)}")
        return dict(pairs)

    try:
        text = read_text(path)
    except (OSError, UserError) as error:
        raise UserError(f"cannot read the DeepSpeed file {path}: {error}") from error
    try:
        config = parse_json(text, object_pairs_hook=unique)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(
            f"{path} must hold a JSON object, not a {type(config).__name__}"
        )
    return config


def resolve_ds_config(
    config: DsConfig | str | Path | None,
    settings: EngineSettings | None = None,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> DsConfig:
    """A new dictionary for `deepspeed.initialize`, of a dictionary or a JSON file's
    path.

    Without `settings`, as in a user's own loop, "auto" is filled from `dtype`, that of
    the model's parameters, and by defaults. ZeRO's sizes stay "auto" until
    `fill_bucket_sizes`: the rest can be checked before a model is loaded. Raises one
    `UserError` that lists all unknown and refused keys, all contradictions with
    `settings`, and every "auto" that nothing fills.
    """
    source = config if isinstance(config, (str, Path)) else "the DeepSpeed config"
    resolved = load_ds_config(config)
    problems = list(clean_sections(resolved))
    if not problems:
        problems += islice(_unknown_keys(resolved), MOST_PROBLEMS)
        problems += refused_keys(resolved, REFUSED)
        if settings is not None:
            problems += _match_flags(resolved, settings, world_size)
            problems += match_optimizer(
                resolved,
                settings.optimizer,
                settings.learning_rate,
                settings.other_learning_rate,
            )
            problems += _precision(resolved, settings)
        else:
            resolved = _fill_without_flags(resolved, dtype)
        problems += _zero(resolved)
        problems += optimizer_problems(resolved)
        problems += _left_auto(resolved)
    if not problems:
        problems = _refused_by_deepspeed(resolved)
    raise_validation_errors(f"{source}: {problem}" for problem in problems)
    return resolved


def complete_ds_config(
    config: DsConfig | str | Path,
    trainable_numels: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> DsConfig:
    """The config of a user's own loop, checked, with "auto" filled in. `dtype`: that of
    the model's parameters."""
    resolved = resolve_ds_config(config, dtype=dtype)
    return fill_bucket_sizes(resolved, trainable_numels)


def _fill_without_flags(config: DsConfig, dtype: torch.dtype) -> DsConfig:
    """The config with "auto" filled: precision from `dtype`, one sequence per process
    and micro-batch, and DeepSpeed's and torch's defaults. ZeRO's sizes stay."""
    for section, its_dtype in _DTYPES.items():
        if at(config, f"{section}.enabled") == AUTO:
            config[section]["enabled"] = dtype == its_dtype
    filled = _without_auto(config)
    if "train_batch_size" not in filled:
        filled.setdefault("train_micro_batch_size_per_gpu", 1)
    return filled


def _without_auto(config: DsConfig) -> DsConfig:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value != AUTO or key in _KEEP_AUTO
    }


def _got(detail: Any) -> str:
    """The value of an error of pydantic, without secrets."""
    where = ".".join(map(str, detail["loc"]))
    return json.dumps(masked({where: detail["input"]})[where], default=str)


def _refused_by_deepspeed(config: DsConfig) -> list[str]:
    """What DeepSpeed's classes say of the values, before a model is loaded."""
    trial = copy.deepcopy(config)
    # `_match_flags` checks it, as DeepSpeed would take this process for the only one
    trial.pop("train_batch_size", None)
    trial.setdefault("train_micro_batch_size_per_gpu", 1)
    zero = trial["zero_optimization"]
    zero.update({key: 1 for key in _BUCKET_KEYS if zero.get(key) == AUTO})
    try:
        DeepSpeedConfig(trial)
    except ValidationError as error:
        return [
            f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}, got {_got(detail)}"
            for detail in error.errors()
        ]
    except Exception as error:
        # Assertions, and whatever a value of another type leads to
        return [f"DeepSpeed cannot use it: {reason(error)}"]
    return []


def compute_dtype(ds_config: DsConfig) -> torch.dtype:
    """The dtype in which a resolved config computes."""
    for section, dtype in _DTYPES.items():
        if at(ds_config, f"{section}.enabled") is True:
            return dtype
    return torch.float32


def fill_bucket_sizes(ds_config: DsConfig, trainable_numels: Sequence[int]) -> DsConfig:
    """A new config with ZeRO's "auto" sizes set from those of the trainable parameters.

    - `stage3_param_persistence_threshold`: persistent parameters stay unsharded on every process and are gathered
      once a step; the others are gathered one by one, in forward and again in backward. As many as fit in
      `PERSIST_BUDGET_BYTES` persist, smallest first: all MoRA matrices at a small adapter rank, only the norms at a
      large one.
    - `stage3_prefetch_bucket_size`: what one transformer block needs.
    - `reduce_bucket_size`, `allgather_bucket_size`: all trainables, or `REDUCE_BUCKET_NUMEL`, or the largest one.
    """
    filled = copy.deepcopy(ds_config)
    zero = filled["zero_optimization"]
    numels = sorted(trainable_numels)
    total = sum(numels)
    largest = numels[-1] if numels else 0
    bucket = max(min(total, REDUCE_BUCKET_NUMEL), largest, 1)
    # Even, as stage_1_and_2.py wants it (`nccl_start_alignment_factor`)
    bucket += bucket % 2
    threshold = _persistence_threshold(numels, compute_dtype(ds_config).itemsize)
    sizes = {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": min(total, PREFETCH_PARAMETERS * largest),
        "stage3_param_persistence_threshold": threshold,
    }
    zero.update({key: size for key, size in sizes.items() if zero.get(key) == AUTO})
    return filled


def avoid_slices(
    ds_config: DsConfig, trainable_numels: Sequence[int], ranks: int
) -> str:
    """Choose the collectives of ZeRO for `ranks` ranks, in place; what was chosen, and
    what it costs, or "". What the config says itself stays."""
    if ds_config["zero_optimization"]["stage"] == 3:
        return _avoid_slices_of_parameters(ds_config, trainable_numels, ranks)
    return _avoid_slices_of_buckets(ds_config, ranks)


def _avoid_slices_of_parameters(
    ds_config: DsConfig, trainable_numels: Sequence[int], ranks: int
) -> str:
    """`avoid_slices` of ZeRO-3.

    DeepSpeed 0.19.8 goes through every trained parameter times every rank in Python at
    each reduce-scatter (runtime/comm/coalesced_collectives.py,
    `reduce_scatter_coalesced`) and at each gather of several parameters
    (runtime/zero/partition_parameters.py, `AllGatherCoalescedHandle.wait`). An
    all-reduce in place of the first sends twice the bytes, gathers of single parameters
    in place of the second are more calls. Both are chosen from `FEW_SLICES` on, unless
    the bytes take longer than the loops.
    """
    zero = ds_config["zero_optimization"]
    slices = len(trainable_numels) * ranks
    added_bytes = sum(trainable_numels) * compute_dtype(ds_config).itemsize
    flat = {"reduce_scatter": False, "stage3_allgather_sequential": True}
    chosen = {key: value for key, value in flat.items() if key not in zero}
    if (
        slices <= FEW_SLICES
        or added_bytes > slices * BYTES_PER_SLICE_OVERHEAD
        or not chosen
    ):
        return ""
    zero.update(chosen)
    sends_more = ""
    if "reduce_scatter" in chosen:
        sends_more = f"; a rank sends {added_bytes / 1e6:,.1f} MB more per micro-batch"
    return (
        f"ZeRO-3 on {ranks:,} ranks: {slices:,} slices of gradients would each cost the host time, so that "
        f"{json.dumps(chosen)} is set{sends_more}"
    )


def _avoid_slices_of_buckets(ds_config: DsConfig, ranks: int) -> str:
    """`avoid_slices` of ZeRO-1 and ZeRO-2.

    DeepSpeed 0.19.8 all-reduces each full bucket of gradients, whatever
    `reduce_scatter` says, and where that is true, cuts the bucket before and after into
    the slices that the ranks own (runtime/zero/stage_1_and_2.py, `average_tensor`).
    Where it is false, a rank takes its own slice from the reduced bucket. The same
    elements are summed in the same collective, and `prescale_gradients` divides them
    before it, as is done with slices: the gradients are equal to the bit, and no byte
    more is sent. With sequence parallelism, under which DeepSpeed sends gradients in
    fp32, they are equal to rounding: slices are divided before they are cast.
    """
    zero = ds_config["zero_optimization"]
    # Else gradients are divided in fp32 and then sent in 16 bits, by slices, and the
    # other way round in whole buckets. In bf16 another class reduces them, which has no
    # slices (runtime/bf16_optimizer.py).
    in_one_dtype = zero["stage"] == 2 or compute_dtype(ds_config) == torch.float32
    # `use_multi_rank_bucket_allreduce: false` reduces each slice to its owner alone.
    written = {*zero, *ds_config} & {
        "reduce_scatter",
        "use_multi_rank_bucket_allreduce",
        "prescale_gradients",
        "gradient_predivide_factor",
        "communication_data_type",
    }
    if ranks < MANY_RANKS or not in_one_dtype or written:
        return ""
    zero["reduce_scatter"] = False
    ds_config["prescale_gradients"] = True
    return (
        f"ZeRO-{zero['stage']} on {ranks:,} ranks: a slice of each bucket for every rank would cost the host time, so "
        'that {"reduce_scatter": false} and {"prescale_gradients": true} are set; a rank sends as many bytes as before'
    )


def _persistence_threshold(numels: list[int], bytes_each: int) -> int:
    """The largest threshold at which all parameters below it fit in the budget."""
    threshold = 0
    used = 0
    for numel, equals in groupby(numels):
        used += sum(equals) * bytes_each
        if used > PERSIST_BUDGET_BYTES:
            break
        threshold = numel
    return threshold


# -- keys ------------------------------------------------------------------------------


def clean_sections(config: DsConfig) -> Iterator[str]:
    """Remove sections that are null, which means the same as absent. Yields a problem
    for each that is no JSON object; nothing else is checked in such a file."""
    for path in (*SECTIONS, *OTHER_SECTIONS):
        parent, _, key = path.rpartition(".")
        holder = at(config, parent)
        if not isinstance(holder, dict) or key not in holder:
            continue
        if holder[key] is None:
            del holder[key]
        elif not isinstance(holder[key], dict):
            yield f'"{path}" must be a JSON object, not {masked(holder[key], True)!r}'


def _unknown_keys(config: DsConfig) -> Iterator[str]:
    known = {"": TOP_LEVEL, **SECTIONS}
    for path, names in known.items():
        prefix = f"{path}." if path else ""
        for key in at(config, path) or ():
            if key not in names and prefix + key not in REFUSED:
                yield f"unknown key {prefix + key!r}.{nearest(key, names)}"


def _left_auto(config: DsConfig, prefix: str = "") -> Iterator[str]:
    """Every "auto" that neither mora_ds fills nor DeepSpeed understands."""
    for key, value in config.items():
        path = prefix + key
        if isinstance(value, dict):
            yield from _left_auto(value, f"{path}.")
        elif value == AUTO and key not in _KEEP_AUTO:
            yield f'{path}: "auto" works only for settings that `mora-ds pretrain` has a flag for; write a value'


# -- values ----------------------------------------------------------------------------


def _match_flags(
    config: DsConfig, settings: EngineSettings, world_size: int
) -> Iterator[str]:
    micro = settings.micro_batch_size
    accumulation = settings.gradient_accumulation_steps
    sequences = micro * accumulation * world_size
    formula = f"{micro} per process x {accumulation} accumulated x {world_size} processes = {sequences}"
    betas = list(settings.betas)
    flags = {
        "train_micro_batch_size_per_gpu": ("--per_device_train_batch_size", micro),
        "gradient_accumulation_steps": ("--gradient_accumulation_steps", accumulation),
        "gradient_clipping": ("--max_grad_norm", settings.max_grad_norm),
        "optimizer.params.betas": ("--adam_beta1, --adam_beta2", betas),
        "optimizer.params.eps": ("--adam_epsilon", settings.epsilon),
        "optimizer.params.weight_decay": ("--weight_decay", settings.weight_decay),
    }
    wanted = [
        (path, value, f"{flag} = {value}") for path, (flag, value) in flags.items()
    ]
    return fill(config, *wanted, ("train_batch_size", sequences, formula))


def _precision(config: DsConfig, settings: EngineSettings) -> Iterator[str]:
    for section, wanted in (("bf16", settings.bf16), ("fp16", settings.fp16)):
        if wanted or section in config:
            flag = f"--{section} {'is given' if wanted else 'is not given'}"
            yield from fill(config, (f"{section}.enabled", wanted, flag))


def _zero(config: DsConfig) -> Iterator[str]:
    """Set our defaults for ZeRO and gradient accumulation. Yields what is refused."""
    zero = config.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 3)
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        yield f"zero_optimization.stage must be 1, 2 or 3, got {json.dumps(stage)}; 1 shards the least"
        return
    # DeepSpeed's default replaces torch's F.linear everywhere, and saves the inputs of
    # frozen layers
    zero.setdefault("memory_efficient_linear", False)
    zero.update({key: zero.get(key, AUTO) for key in _BUCKET_KEYS})
    if at(zero, "offload_optimizer.device") == "nvme":
        yield (
            'zero_optimization.offload_optimizer.device = "nvme": MoRA matrices and their moments fit in host memory: '
            'use "cpu"'
        )
    for path, (value, why) in _FIXED.items():
        if at(config, path) not in (None, value):
            yield f"{path} must stay {json.dumps(value)}: {why}"
    types = config.setdefault("data_types", {})
    if types.get("grad_accum_dtype", AUTO) is None:
        # DeepSpeed's default, which is as good as absent
        del types["grad_accum_dtype"]
    why = "gradients are summed in fp32"
    yield from fill(config, ("data_types.grad_accum_dtype", "fp32", why))
