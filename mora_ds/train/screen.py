"""What a person reads of a run before its first step and after its last one."""

import math
from collections.abc import Mapping
from shlex import quote

import torch

from mora_ds.adapters.registry import Control, adapter_type
from mora_ds.checkpoint.layout import CHECKPOINTS, LATEST, MERGED_FOLDER
from mora_ds.common.untrusted import expanded, is_url
from mora_ds.config.adapter import AdapterArguments
from mora_ds.config.arguments import Arguments
from mora_ds.data import Mixture
from mora_ds.train.metrics import duration, peak_memory_bytes
from mora_ds.train.run_file import Facts
from mora_ds.train.trackers import TENSORBOARD
from mora_ds.train.training_setup import TrainingSetup

_LABEL = 12
"""Characters of the column of labels."""


def opening(setup: TrainingSetup, total_steps: int) -> list[str]:
    """The lines before the first step: model, trained parameters, data, steps,
    memory."""
    arguments = setup.arguments
    training = arguments.training
    world = setup.context.ranks.world
    model_type = setup.loaded.model.config.model_type
    origin = arguments.model.model_name_or_path or arguments.model.model_config
    rows = {"model": f"{model_type}, {_base_numel(setup):,} parameters, from {origin}"}
    if setup.is_trained:
        share = setup.trainable_parameters / setup.total_parameters
        sequences = training.global_batch_size(world)
        tokens = sequences * setup.data.train.seq_len
        first_step = f"from {setup.state.step:,} to " if setup.state.step else ""
        trained = f"{setup.trainable_parameters:,} parameters ({share:.2%})"
        rows["trained"] = f"{trained}: {names_of_trained(arguments.adapter)}"
        batch = f"{sequences:,} sequences of {setup.data.train.seq_len:,} tokens"
        rows["data"] = f"{batch}, {tokens:,} tokens per step"
        rows["steps"] = f"{first_step}{total_steps:,} ({total_steps * tokens:,} tokens)"
        if epochs := _epochs(setup.data.train, total_steps):
            rows["epochs"] = epochs
    processes = "1 process" if world == 1 else f"each of {world} processes"
    device = "a GPU" if torch.cuda.is_available() else "CPUs"
    memory = f"{peak_memory_bytes() / 2**30:.2f} GiB"
    rows["memory"] = f"{memory} in {processes} on {device}, after loading"
    return _labeled(rows)


def _base_numel(setup: TrainingSetup) -> int:
    """Elements of the base's weights, without what the adapter adds."""
    base = setup.loaded.base
    shapes = [base.shape_dtype(key)[0] for key in set(setup.loaded.keys.values())]
    return sum(map(math.prod, shapes))


def _epochs(train: Mixture, steps: int) -> str:
    """How often each source is read in `steps` steps, such as "domain 1.50, general
    0.02"; streams have no known end."""
    tokens = train.tokens(steps)
    epochs = {
        name: tokens[name] / (source.n_blocks * train.seq_len)
        for name, source in zip(train.names, train.sources, strict=True)
        if source.n_blocks
    }
    return ", ".join(f"{name} {number:.2f}" for name, number in epochs.items())


def names_of_trained(adapter: AdapterArguments) -> str:
    """What is trained, such as "MoRA of rank 8, embeddings"."""
    if adapter.adapter == Control.FULL:
        return "all of the model, sharded by ZeRO"
    kind = adapter_type(adapter.adapter).title
    rank = adapter.train_embedding_rank
    others = {
        "embeddings": adapter.train_embeddings,
        "new rows of the embeddings": adapter.train_new_embeddings,
        f"a product of rank {rank} on the embeddings": rank > 0,
        "norms": adapter.train_norms,
        "head": adapter.train_head,
    }
    parameters = [name for name, is_trained in others.items() if is_trained]
    return ", ".join([f"{kind} of rank {adapter.mora_rank}", *parameters])


def closing(arguments: Arguments, summary: Facts, seconds: float) -> list[str]:
    """The lines after the last step: what was done, where it lies, what comes next."""
    if arguments.adapter.adapter == Control.NONE:
        return _labeled({"done": f"evaluated in {duration(seconds)}"})
    done = f"{summary['steps']:,} steps, {summary['tokens']:,} tokens"
    rows = {"done": f"{done} in {duration(seconds)}"}
    if is_url(arguments.training.output_dir):
        rows["output"] = arguments.training.output_dir
        return _labeled(rows)
    folder = expanded(arguments.training.output_dir)
    checkpoint = folder / CHECKPOINTS / LATEST
    latest = quote(str(checkpoint))
    merged = quote(str(folder / MERGED_FOLDER))
    rows["checkpoint"] = str(checkpoint.with_name(checkpoint.resolve().name))
    if TENSORBOARD in arguments.training.report_to:
        rows["curves"] = f"tensorboard --logdir {quote(str(folder / TENSORBOARD))}"
    is_full = arguments.adapter.adapter == Control.FULL
    is_one_adapter = not is_full and not arguments.research
    if is_one_adapter:
        sets = dict(arguments.data.named_eval_files()) or {"NAME": "FILE"}
        named = " ".join(quote(f"{name}={path}") for name, path in sets.items())
        rows["evaluate"] = f"mora-ds evaluate {latest} --sets {named}"
    if is_one_adapter and not arguments.training.export_merged:
        rows["export"] = f"mora-ds export --checkpoint {latest} --output {merged}"
    if is_one_adapter or arguments.training.export_merged:
        rows["serve"] = f"vllm serve {merged}"
    return _labeled(rows)


def _labeled(rows: Mapping[str, str]) -> list[str]:
    return [f"{label:<{_LABEL}}{text}" for label, text in rows.items()]
