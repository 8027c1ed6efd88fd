"""Steps, merges and reads of toy models on a CUDA device without numbers (`fake_cuda`), for
every operator, grouping and recipe.

LD_PRELOAD=SHIM python -m tests.helpers.fake_steps FILE NAME...      writes {name: what went wrong, or ""} as JSON
"""

import json
import os
import sys
import traceback
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from mora_ds.adapters import layer as layer_module
from mora_ds.adapters.domains import domains_of
from mora_ds.adapters.inject import inject, mora_layers, move_base, set_cycle
from mora_ds.adapters.ops import index_tables
from mora_ds.adapters.ops.index_tables import clear_tables, make_tables
from mora_ds.adapters.ops.linear import mora_linear
from mora_ds.config.arguments import from_flat
from mora_ds.data.documents import Documents
from mora_ds.engine import zero
from mora_ds.engine.host_copies import Copies
from mora_ds.engine.layer_prefetcher import LayerPrefetcher, names_on_host
from mora_ds.models.attention import use_document_attention
from mora_ds.models.loss import chunk_loss, sequence_nll, token_nll
from mora_ds.parallel.tensor_parallel import split_model
from mora_ds.parallel.topology import Topology
from mora_ds.parallel.ulysses import bind_sequence_parallel
from tests.helpers.fake_cuda import CUDA, FakeCuda, Permits, pin
from tests.helpers.models import tiny_model, tokens
from tests.helpers.pairwise import pairwise_cases

RECIPES = Path(__file__).parents[2] / "configs/recipes"
WORLD = 2
"""Processes of the tensor- or sequence-parallel steps; collectives of torch's fake group
change nothing.
"""
ROWS = 2
LENGTH = 48
DEFAULTS = {"mora_rank": 4, "bf16": True, "family": "llama", "chunked_loss": True}

OPERATORS = yaml.safe_load("""
operator: [truncate, share, decouple, rotate]
compute: [activation, weight]
base_bits: [16, 8]
kernels: [true, false]
checkpointing: [none, gradient_checkpointing, reentrant]
""")


def configurations():
    """Name -> settings: those of the YAML file, every recipe, every combination of an
    operator, with the ways of checkpointing in turn.
    """
    named = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    for path in RECIPES.glob("*.yaml"):
        named[f"recipe {path.stem}"] = yaml.safe_load(path.read_text())
    *choices, checkpointing = OPERATORS.values()
    in_turn = [
        dict(zip(OPERATORS, (*values, kind), strict=True))
        for values, kind in zip(product(*choices), cycle(checkpointing), strict=False)
    ]
    for settings in (*in_turn, *pairwise_cases(OPERATORS)):
        named[str(settings)] = {**settings, settings["checkpointing"]: True}
    return named


PAIRS = [str(case) for case in pairwise_cases(OPERATORS)]
"""Names of combinations that hold every pair of an operator's settings."""


class FakeCopies(Copies):
    """`CudaCopies` without streams."""

    pin = staticmethod(pin)

    def start(self, pairs):
        for target, source in pairs:
            target.copy_(source, non_blocking=True)


def run(settings):
    """A step in which tables are copied to the device, one that waits for nothing, a merge,
    what a checkpoint and an export read, and the first step of the next cycle."""
    clear_tables()
    settings = {**DEFAULTS, **settings}
    arguments = from_flat(settings)
    config = replace(arguments.adapter.config(seed=0), **settings.get("more", {}))
    with FakeCuda() as cuda, ExitStack() as patches:
        patches.enter_context(
            patch.object(F, "scaled_dot_product_attention", without_grouped_heads)
        )
        if not settings.get("kernels", True):
            patches.enter_context(patch.object(layer_module, "KERNEL_DEVICES", ()))
        # Its layers are all alike, and one is placed as two are, unless they take turns
        is_one = (
            settings["family"] == "llama" and arguments.training.base_device != "host"
        )
        model = tiny_model(
            settings["family"], **({"num_hidden_layers": 1} if is_one else {})
        )
        if arguments.training.gradient_checkpointing or settings.get("reentrant"):
            model.gradient_checkpointing_enable(
                {"use_reentrant": settings.get("reentrant", False)}
            )
            model.enable_input_require_grads()
        inject(model, config)
        if names := settings.get("more", {}).get("domains"):
            domains_of(model).set(names)
        prepare(model, arguments, dense=settings.get("dense", False))
        step(model, settings, first=20)
        cuda.permits = Permits.NOTHING
        step(model, settings, first=30)
        cuda.permits = Permits.READS
        for layer in mora_layers(model).values():
            merge(layer)
            layer.adapter_weight.detach().float().cpu()
            layer.read().cpu()
        set_cycle(model, config, 1)
        cuda.permits = Permits.COPIES
        step(model, settings, first=20)


def prepare(model, arguments, dense):
    """An injected model as `load_base` and `initialize` leave it: split, and on the
    device."""
    training = arguments.training
    dtype = (
        torch.bfloat16
        if training.bf16
        else torch.float16
        if training.fp16
        else torch.float32
    )
    if not dense:
        use_document_attention(model)
        bind_sequence_parallel(model, training.sequence_parallel_size)
    if training.tensor_parallel_size > 1:
        split_model(model, Topology.of(WORLD))
    streams = training.base_device == "host"
    move_base(model, CUDA, dtype, names_on_host(model) if streams else ())
    with (
        LayerPrefetcher(model, CUDA, FakeCopies()).device_bound()
        if streams
        else nullcontext()
    ):
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(CUDA))
            for name, parameter in list(module.named_parameters(recurse=False)):
                moved = nn.Parameter(parameter.data.to(CUDA, dtype))
                vars(moved).update(vars(parameter))
                setattr(module, name, moved)
    if training.chunked_loss:
        chunk_loss(model, 16)
    model.train()


def step(model, settings, first):
    """Forward and backward of rows whose first document has `first` tokens; every trained
    tensor gets a gradient.
    """
    positions = (
        torch.cat((torch.arange(first), torch.arange(LENGTH - first)))
        .expand(ROWS, -1)
        .contiguous()
    )
    ids = tokens(ROWS, LENGTH // settings.get("sequence_parallel_size", 1))
    rows = {
        "input_ids": ids,
        "labels": ids,
        "position_ids": positions[:, : ids.shape[1]].contiguous(),
    }
    rows["documents"] = Documents.of(positions)
    rows = {
        name: part.pin_memory().to(CUDA, non_blocking=True)
        for name, part in rows.items()
    }
    loss = (
        sequence_nll(model, rows).sum()
        if settings.get("by_row")
        else token_nll(model, rows)
    )
    loss.backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None and gradient.device == parameter.device == CUDA, (
            f"{name}: {gradient}"
        )
        parameter.grad = None


def merge(layer):
    mora_matrix = layer.unshard(layer.adapter_weight.detach()).float()
    norms = layer.merge(
        torch.randn(layer.shape).bfloat16(), [(layer.spec, mora_matrix)], mora_matrix
    )
    assert {norm.device for norm in norms} == {CUDA}


attend = F.scaled_dot_product_attention


def without_grouped_heads(*tensors, enable_gqa=False, **options):
    """Torch's attention, which takes its kernel that keeps all scores for grouped heads in
    fp32, and says nothing.
    """
    assert not enable_gqa, (
        "grouped heads make torch take its kernel that keeps all (T, T) scores"
    )
    return attend(*tensors, **options)


# -- planted faults --------------------------------------------------------------------


def before_layers(work):
    """A patch that has layers do more with their input."""
    return (
        layer_module,
        "mora_linear",
        lambda x, *others: (work(x), mora_linear(x, *others))[1],
    )


PLANTS = {
    "misplaced table": (
        index_tables,
        "make_tables",
        lambda spec, device: make_tables(spec, torch.device("cpu")),
    ),
    "item": before_layers(lambda x: x.sum().item()),
    "blocking copy": before_layers(lambda x: torch.ones(1).to(x)),
    "copy that is not pinned": before_layers(
        lambda x: torch.ones(1).to(x, non_blocking=True)
    ),
}
"""Planted faults: what replaces which code in layers of plain torch."""


def main():
    file, *names = sys.argv[1:]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    zero.prepare_backend()
    deepspeed.init_distributed(verbose=False)
    settings = {**configurations(), **{plant: {"kernels": False} for plant in PLANTS}}
    faults = dict.fromkeys(names, "")
    for name in names:
        try:
            with patch.object(*PLANTS[name]) if name in PLANTS else nullcontext():
                run(settings[name])
        except Exception as error:
            faults[name] = "".join(traceback.format_exception(error))
    Path(file).write_text(json.dumps(faults))


if __name__ == "__main__":
    main()
    # The autograd engine keeps a thread for the device, which comes back for the
    # interpreter's lock. One that finds the interpreter gone is unwound through C++ that
    # may not throw, and aborts the process, after all was done.
    sys.stdout.flush()
    os._exit(0)
