"""What of a Trainer's options cannot be honoured, and what is filled in."""

from collections.abc import Iterator, Mapping
from typing import Any

from mora_ds.common.errors import refuse
from mora_ds.engine.ds_config import clean_sections, fill_bucket_sizes
from mora_ds.engine.ds_keys import AUTO, DsConfig, at

REFUSED = {
    "fsdp": "FSDP would shard the base; DeepSpeed shards the MoRA matrices alone",
    "torch_compile": "merges change the operators that were compiled, and DeepSpeed's hooks break the graph",
    "auto_find_batch_size": "it starts the run again within the run, whose merges would stay",
    "use_cpu": "accelerate then leaves DeepSpeed out; without a GPU the CPU is used anyway",
}
"""Option of `TrainingArguments` -> why it cannot be set."""

REFUSED_ARGUMENTS = {
    "model_init": "every process loads its model once; give `model`",
    "optimizers": "the optimizer is AdamW, or Muon by `optimizer` in the DeepSpeed config; the learning rate follows "
    "`lr_scheduler_type`",
    "optimizer_cls_and_kwargs": "the optimizer is AdamW, or Muon by `optimizer` in the DeepSpeed config",
    "peft_config": "the adapter is the one of `mora`",
}
"""Argument of the Trainer -> why it cannot be given."""

ADAMW = ("adamw_torch", "adamw_torch_fused")
"""Values of `optim` that mean AdamW. The state of other optimizers no merge knows."""

WITHOUT_LAMBDA = ("reduce_lr_on_plateau", "greedy")
"""Values of `lr_scheduler_type` whose learning rate is no function of the step."""


def check_options(args: Any, arguments: Mapping[str, Any]) -> None:
    """Raise one `UserError` that names everything which contradicts an adapter under
    DeepSpeed. `args`: of `TrainingArguments`; `arguments`: further ones of the Trainer,
    by name."""
    refuse(_problems(args, arguments))


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
        yield "TrainingArguments(parallelism_config=...): only data parallelism goes with MoRATrainer"
    if args.lr_scheduler_type in WITHOUT_LAMBDA:
        kind = args.lr_scheduler_type.value
        yield f"TrainingArguments(lr_scheduler_type={kind!r}): the learning rate must be a function of the step"
    config = args.hf_deepspeed_config.config
    if args.optim not in ADAMW and "optimizer" not in config:
        yield f"TrainingArguments(optim={args.optim.value!r}): an adapter is trained by AdamW ({', '.join(ADAMW)})"
    if "scheduler" in config:
        yield '"scheduler" in the DeepSpeed config: take `lr_scheduler_type`, which MoRACallback can restart'
    # Without a stage the engine would run at 3, and accelerate takes it for none.
    if at(config, "zero_optimization.stage") not in (1, 2, 3, AUTO):
        yield '"zero_optimization.stage" in the DeepSpeed config must be 1, 2 or 3'


def fill_config(args: Any, trainable_numels: list[int]) -> None:
    """Set, in the DeepSpeed config that `args` hold, the optimizer and ZeRO's "auto"
    sizes: those that the adapter's parameters need, where transformers would take the
    model's hidden size. Raises `UserError` for a section that is no JSON object."""
    config = args.hf_deepspeed_config.config
    refuse(clean_sections(config))
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
