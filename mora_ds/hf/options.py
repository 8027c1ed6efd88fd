"""Checks a Trainer's options, and fills in its DeepSpeed config."""

from collections.abc import Iterator, Mapping
from typing import Any

from mora_ds.common.errors import raise_validation_errors
from mora_ds.engine.ds_config import clean_sections, fill_bucket_sizes
from mora_ds.engine.ds_keys import AUTO, DsConfig, at

REFUSED = {
    "fsdp": "FSDP would shard the base; DeepSpeed shards only the MoRA matrices",
    "torch_compile": "DeepSpeed's hooks break the graph",
    "auto_find_batch_size": "it restarts training in the same process, where earlier merges would stay",
    "use_cpu": "accelerate would not use DeepSpeed; without a GPU the CPU is used anyway",
}
"""Unsupported option of `TrainingArguments` -> the reason."""

REFUSED_ARGUMENTS = {
    "model_init": "every rank loads its model once; give `model`",
    "optimizers": "the optimizer is AdamW, or Muon by `optimizer` in the DeepSpeed config; the learning rate follows "
    "`lr_scheduler_type`",
    "optimizer_cls_and_kwargs": "the optimizer is AdamW, or Muon by `optimizer` in the DeepSpeed config",
    "peft_config": "the adapter is the one of `mora`",
}
"""Unsupported argument of the Trainer -> the reason."""

ADAMW = ("adamw_torch", "adamw_torch_fused")
"""Values of `optim` that mean AdamW. Merges cannot reset the state of others."""

WITHOUT_LAMBDA = ("reduce_lr_on_plateau", "greedy")
"""Values of `lr_scheduler_type` whose learning rate is not a function of the step."""


def check_options(args: Any, arguments: Mapping[str, Any]) -> None:
    """Raise one `UserError` that lists all unsupported options. `args`: the
    `TrainingArguments`; `arguments`: other arguments of the Trainer, by name."""
    raise_validation_errors(_problems(args, arguments))


def _problems(args: Any, arguments: Mapping[str, Any]) -> Iterator[str]:
    for name, reason in REFUSED_ARGUMENTS.items():
        if arguments.get(name) not in (None, (None, None)):
            yield f"MoRATrainer({name}=...) cannot be used: {reason}"
    if not args.deepspeed:
        yield "TrainingArguments(deepspeed=...) is missing: MoRATrainer trains under DeepSpeed (configs/zero3.json)"
        return
    for name, reason in REFUSED.items():
        if getattr(args, name, None):
            yield f"TrainingArguments({name}=...) cannot be used with MoRATrainer: {reason}"
    parallel = args.parallelism_config
    if parallel is not None and parallel.non_data_parallel_size > 1:
        yield "TrainingArguments(parallelism_config=...): MoRATrainer supports only data parallelism"
    if args.lr_scheduler_type in WITHOUT_LAMBDA:
        kind = args.lr_scheduler_type.value
        yield f"TrainingArguments(lr_scheduler_type={kind!r}): the learning rate must be a function of the step"
    config = args.hf_deepspeed_config.config
    if args.optim not in ADAMW and "optimizer" not in config:
        yield f"TrainingArguments(optim={args.optim.value!r}): an adapter needs AdamW ({', '.join(ADAMW)})"
    if "scheduler" in config:
        yield '"scheduler" in the DeepSpeed config: use `lr_scheduler_type`, which MoRACallback can restart'
    # Without a stage the engine would use 3, but accelerate assumes 0.
    if at(config, "zero_optimization.stage") not in (1, 2, 3, AUTO):
        yield '"zero_optimization.stage" in the DeepSpeed config must be 1, 2 or 3'


def fill_config(args: Any, trainable_numels: list[int]) -> None:
    """Set the optimizer and ZeRO's "auto" sizes in the DeepSpeed config of `args`. The
    sizes are those for the adapter's parameters; transformers would use the model's
    hidden size. Raises `UserError` for a section that is not a JSON object."""
    config = args.hf_deepspeed_config.config
    raise_validation_errors(clean_sections(config))
    optimizer: DsConfig = config.setdefault("optimizer", {})
    if optimizer.get("type", AUTO) == AUTO:
        optimizer["type"] = "AdamW"
    optimizer["params"] = {
        "lr": args.learning_rate,
        "betas": [args.adam_beta1, args.adam_beta2],
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        **optimizer.get("params", {}),
    }
    zero: DsConfig = config.setdefault("zero_optimization", {})
    zero.update(fill_bucket_sizes(config, trainable_numels)["zero_optimization"])
