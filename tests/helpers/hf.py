"""Runs by Hugging Face's Trainer for the tests, and the same run by a loop of its own."""

import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM, TrainingArguments

import mora_ds
from mora_ds.engine import zero
from mora_ds.hf import MoRACallback, MoRATrainer
from mora_ds.models.base import write_own_base
from tests.helpers.models import tiny_model, tokens

ROWS = 4
STEPS = 8
MERGE_EVERY = 3
REWARMUP = 1
RATE = 1e-2
"""Sequences a step over all ranks; optimizer steps; the merges' settings; learning rate."""


class Trainer(MoRATrainer, transformers.Trainer):
    """The code that a user writes."""


def ds_config(stage=3):
    return {
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": 0,
        },
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def arguments(out, accumulation=1, **changes):
    micro = ROWS // accumulation // dist.get_world_size()
    values = {
        "deepspeed": ds_config(),
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "linear",
        "adam_epsilon": 1e-4,
        "weight_decay": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(out), **{**values, **changes})


class InOrder(Trainer):
    """Reads its rows in the order of the dataset, as the loop does."""

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def dataset(rows=ROWS * STEPS):
    return [{"input_ids": row, "labels": row} for row in tokens(rows, seed=5)]


def base_in(folder):
    """A tiny model in `folder`, written once."""
    if dist.get_rank() == 0 and not folder.exists():
        write_own_base(tiny_model(), folder)
    dist.barrier()
    return folder


def trainer_in(
    root,
    name,
    accumulation=1,
    merges=MERGE_EVERY,
    kind=InOrder,
    **changes,
):
    """A trainer of a run in root/name, before training."""
    base = base_in(root / "base")
    return kind(
        str(base),
        arguments(root / name, accumulation, **changes),
        train_dataset=dataset(),
        eval_dataset=dataset(6),
        mora=mora_ds.MoRAConfig(rank=4),
        callbacks=[MoRACallback(merges, REWARMUP)],
    )


def matrices(engine):
    """The unsharded MoRA matrices and the merged weights. Collective."""
    layers = mora_ds.mora_layers(engine.module)
    mora_matrices = {
        name: zero.full_fp32(layer.adapter_weight).clone()
        for name, layer in layers.items()
    }
    return {
        **mora_matrices,
        **{f"{name}.weight": layer.weight.clone() for name, layer in layers.items()},
    }


def assert_same_parameters(one, another):
    """Equal to the bit, in order."""
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.parameters(), another.parameters(), strict=True)
    )


def own_loop(root, rates):
    """The same run by a loop around `mora_ds.initialize`: (matrices and weights at the end,
    losses).
    """
    world = dist.get_world_size()
    rank = dist.get_rank()
    base = base_in(root / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    config = mora_ds.MoRAConfig(rank=4)
    mora_ds.inject(model, config)
    micro = ROWS // world
    settings = {
        **ds_config(),
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": RATE, "eps": 1e-4, "weight_decay": 0.01},
        },
    }
    engine, *_ = mora_ds.initialize(model=model, config=settings)
    run = mora_ds.Run(engine, base=base, folder=root / "loop")
    rows = torch.stack([row["input_ids"] for row in dataset()]).view(STEPS, ROWS, -1)
    losses = []
    engine.train()
    for step, rate in enumerate(rates, 1):
        zero.set_learning_rate(engine, rate)
        batch = rows[step - 1, rank * micro : (rank + 1) * micro]
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / world)
        if step in run_merges():
            run.merge(step)
    return matrices(engine), losses


def run_merges():
    """The steps after which the runs above merge."""
    return [
        step
        for step in range(MERGE_EVERY, STEPS, MERGE_EVERY)
        if STEPS - step > REWARMUP
    ]


def rates():
    """The learning rate of each step: linear decay, with a re-warmup of one step after each
    merge.
    """
    curve = [RATE * (1 - step / STEPS) for step in range(STEPS + 1)]
    return [
        curve[step + 1] / 2 if step in run_merges() else curve[step]
        for step in range(STEPS)
    ]
