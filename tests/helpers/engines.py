"""DeepSpeed engines for the tests: the settings, a merge by hand, a small model without
adapters, a run with merges.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.ops.mora import delta_weight
from mora_ds.engine import zero
from mora_ds.engine.initialize import initialize
from mora_ds.engine.node_base import node_base_of
from mora_ds.engine.traffic import nbytes_of
from mora_ds.engine.zero import view_of
from mora_ds.models.base import BaseCheckpoint, write_own_base
from mora_ds.remora.ledger import Ledger
from mora_ds.remora.merge import layers_to_write, rebuild_weights
from mora_ds.train.run import Run
from tests.helpers.adapters import summed
from tests.helpers.models import causal_loss, micro_step, tiny_model, tokens

ROWS = 6
STEPS = 3
ACCUMULATION = 2
LEARNING_RATE = 1e-2
CLIP = 0.5
EPSILON = 1e-4
"""Large against rounding errors of a gradient: Adam's first step is a sign where epsilon is
small, and a sign of noise says nothing about equality."""


def ds_config(stage, micro, accumulation=ACCUMULATION, **changes):
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIP,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": False,
        },
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": LEARNING_RATE,
                "eps": EPSILON,
                "weight_decay": 0.0,
                "torch_adam": True,
            },
        },
        "steps_per_print": 10**9,
    }
    return {**config, **changes}


def plain_steps(
    model,
    losses_of,
    steps,
    learning_rate=LEARNING_RATE,
):
    """Train in one process without DeepSpeed, by AdamW with clipped gradients.

    `losses_of`: the losses of a step, whose gradients are summed. Returns the sum of losses
    and the gradient norm of each step, the gradients of the first step, and the trained
    values at the end.
    """
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=learning_rate, eps=EPSILON, weight_decay=0.0
    )
    results = {"losses": [], "norms": []}
    for step in range(steps):
        total = 0.0
        for loss in losses_of(step):
            loss.backward()
            total += loss.item()
        if step == 0:
            results["gradients"] = {
                name: parameter.grad.clone() for name, parameter in parameters.items()
            }
        results["norms"].append(
            torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP).item()
        )
        optimizer.step()
        optimizer.zero_grad()
        results["losses"].append(total)
    results["values"] = {
        name: parameter.detach().clone() for name, parameter in parameters.items()
    }
    return results


def trained_values(engine):
    """{name: the unsharded fp32 tensor} of every trained parameter. Collective."""
    return {
        name: zero.full_fp32(parameter).clone()
        for name, parameter in engine.module.named_parameters()
    }


def half_precision(dtype):
    """The bf16 section of a DeepSpeed config, summed in fp32; empty for another
    dtype."""
    if dtype not in ("bfloat16", torch.bfloat16):
        return {}
    return {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


def state_tensors(engine, group):
    """(key, this process's flat partition) of a group's optimizer state, e.g. ("exp_avg",
    ...).
    """
    for flat in view_of(engine).flats(group):
        for key, value in flat.state.items():
            if isinstance(value, Tensor):
                yield key, value


def merge_by_hand(engine):
    model = engine.module
    layers = mora_layers(model)
    mora_matrices = {
        name: zero.full_fp32(layer.mora_matrix) for name, layer in layers.items()
    }

    def add(name, _):
        layers[name].weight += delta_weight(layers[name].spec, mora_matrices[name])

    rewrite(model, add)
    zero.reset_group(engine, 0)


def rewrite(model, work):
    """work(name, None) for each layer whose frozen weight this process writes in a
    merge."""
    node = node_base_of(model)
    items = [(name, None) for name in layers_to_write(node, mora_layers(model))]
    rebuild_weights(node, model, items, work)


class CountedBelow(TorchDispatchMode):
    """Counts the bytes of every c10d operator at PyTorch's dispatcher, independently of
    `CollectiveCounter`.
    """

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.name()
            self.seen[name] = self.seen.get(name, 0) + max(
                nbytes_of(value) for value in args
            )
        return func(*args, **(kwargs or {}))


def merging_run(folder, config, stage, dtype, merges):
    """Train, merge, train, merge, ... and save, on this rank of several. The base lies in
    `folder`/base, the run in `folder`/out.
    """
    rows = ROWS // dist.get_world_size()
    model = tiny_model("llama", dtype=getattr(torch, dtype))
    base = Path(folder) / "base"
    if dist.get_rank() == 0:
        write_own_base(model, base)
    dist.barrier()
    inject(model, config)
    settings = ds_config(stage, rows, 1, **half_precision(dtype))
    engine, *_ = initialize(model=model, config=settings)
    run = Run(engine, base=base, folder=Path(folder) / "out")
    probe = tokens(2, seed=777)

    @torch.no_grad()
    def loss_of_probe():
        return causal_loss(engine, probe).item()

    reports = []
    for step in range(1, merges + 1):
        batch = tokens(ROWS, seed=step)[dist.get_rank() * rows :][:rows]
        for _ in range(
            2
        ):  # after the first of them LoRA's B is no longer zero, and A learns too
            micro_step(engine, batch)
        reports.append(vars(run.merge(step, loss_of_probe)))
    moments = {key: value.clone() for key, value in state_tensors(engine, 0)}
    run.save(merges)
    layers = mora_layers(model).items()
    return {
        "reports": reports,
        "weights": {name: layer.weight.clone() for name, layer in layers},
        "values": {
            name: zero.full_fp32(layer.adapter_weight) for name, layer in layers
        },
        "moments": moments,
    }


def assert_replayed(ranks, folder):
    """The merged weights of each rank of `merging_run` equal the base with all cycles of
    the ledger, to the bit.
    """
    base = BaseCheckpoint.open(folder / "base")
    ledger = Ledger.open(folder / "out/ledger")
    for result in ranks:
        for name, weight in result["weights"].items():
            original = base.read(f"{name}.weight")
            replayed = summed(
                original, ledger.mora_matrices_of(name), False, weight.dtype
            )
            assert torch.equal(weight, replayed), name
            assert not torch.equal(weight, original), name
