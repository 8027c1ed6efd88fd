"""Runs on a base in 8 or 4 bits: ranks, merges, kills, export, memory, plans, and what is
refused.
"""

import os
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoConfig

import mora_ds
from mora_ds.adapters import nf4
from mora_ds.adapters.config import LoRAConfig, MoRAConfig
from mora_ds.adapters.inject import frozen_buffers, inject, mora_layers
from mora_ds.adapters.ops.int8 import quantize
from mora_ds.adapters.ops.updates import join, merged_weight
from mora_ds.deploy.adapter_io import load_adapter
from mora_ds.deploy.export import export_merged
from mora_ds.engine.ds_config import complete_ds_config
from mora_ds.engine.initialize import initialize
from mora_ds.engine.traffic import CollectiveCounter
from mora_ds.models.base import BaseCheckpoint, write_own_base
from mora_ds.planning.plan import Cluster, Planner, recommend
from mora_ds.planning.report import report, verdict
from mora_ds.planning.step import Work, measure_step, planned_model
from mora_ds.remora.ledger import Ledger
from tests.helpers.engines import ds_config, half_precision
from tests.helpers.errors import user_error
from tests.helpers.gloo import run_alone
from tests.helpers.jobs import run, validation_errors_of
from tests.helpers.models import FAMILIES, micro_step, tiny_model, tokens
from tests.helpers.pool import run_pooled
from tests.helpers.resume import MERGING, assert_same_run, stop_and_resume
from tests.helpers.tables import heavy, parsed, rows

ROWS = 6
SHARE = MoRAConfig(rank=4, operator="share", base_bits=8)
packed = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs the extra bits4"
)
BITS = [8, pytest.param(4, marks=packed)]


def step_of(engine, step):
    """Train on this rank's rows of a step. Returns the mean loss over all ranks."""
    world = dist.get_world_size()
    rank = dist.get_rank()
    rows_of_rank = tokens(ROWS, seed=step).view(world, ROWS // world, -1)[rank]
    mean = micro_step(engine, rows_of_rank)
    dist.all_reduce(mean)
    return mean.item() / world


def quantized(model):
    """Module -> its weight in few bits, and scales."""
    return {
        name: (layer.weight.clone(), layer.get_buffer("weight_scales").clone())
        for name, layer in mora_layers(model).items()
    }


def assert_same_pair(pair, expected, name):
    """Weights in few bits, and scales, to the bit."""
    for tensor, wanted in zip(pair, expected, strict=True):
        assert torch.equal(tensor, wanted), name


# -- merges in loops of a user's own ---------------------------------------------------


def assert_rounded_once(layers, base, ledger):
    for name, pair in layers.items():
        updates = [] if ledger is None else ledger.mora_matrices_of(name)
        exact = merged_weight(
            base.read(f"{name}.weight"), updates, False, torch.float32
        )
        assert_same_pair(pair, quantize(exact), name)


def loop_of(folder, config, stage, merges, dtype="float32"):
    """Steps of this rank of several, with a merge after each but the last two."""
    world = dist.get_world_size()
    os.chdir(folder)
    model = tiny_model("llama", dtype=getattr(torch, dtype))
    inject(model, config)
    settings = ds_config(stage, ROWS // world, 1, **half_precision(dtype))
    engine, *_ = initialize(model=model, config=settings)
    work = mora_ds.Run(engine, base="base", folder=f"out-{world}")
    at_first = quantized(model)
    counter = CollectiveCounter(frozen_buffers(model).values())
    losses = []
    lost = []
    with counter.counting():
        for step in range(1, merges + 3):
            losses.append(step_of(engine, step))
            if step <= merges:
                lost.append(work.merge(step).rounding_loss)
    work.save(merges + 2)
    return {
        "losses": losses,
        "at_first": at_first,
        "bits": quantized(model),
        "merged": {name: layer.merged for name, layer in mora_layers(model).items()},
        "base_bytes": counter.base_bytes,
        "lost": lost,
    }


@pytest.mark.parametrize("file_dtype", ["float32", heavy("bfloat16")])
def test_after_ten_merges_every_rank_holds_the_base_plus_all_deltas_rounded_once(
    tmp_path, base_folder, file_dtype
):
    """The run is in bf16, and the base's files in the same dtype or another: the same
    numbers, rounded."""
    write_own_base(tiny_model("llama", dtype=getattr(torch, file_dtype)), base_folder)
    results = run_pooled(2, loop_of, str(tmp_path), SHARE, 3, 10, "bfloat16")
    base = BaseCheckpoint.open(base_folder)
    ledger = Ledger.open(tmp_path / "out-2/ledger")
    assert ledger.cycles == 10
    for result in results:
        assert_rounded_once(result["at_first"], base, None)
        assert_rounded_once(result["bits"], base, ledger)
        assert result["lost"] == results[0]["lost"]
        assert 0 < result["lost"][-1] < 1
    loaded = load_adapter(base_folder, tmp_path / "out-2")
    for name, pair in quantized(loaded).items():
        assert_same_pair(pair, results[0]["bits"][name], name)


IN_4_BITS = """
{operator: share, grouping: alternate, compute: weight} | 2
{operator: rotate, compute: activation} | 1
{operator: decouple, dropout: 0.1} | 1
lora | 3
"""
IN_8_BITS = """
{operator: rotate, compute: activation} | 2
{operator: decouple, compute: weight} | 3
{operator: truncate} | 1
lora | 3
"""
"""An adapter | the ZeRO stage."""


def config_of(settings, bits):
    if settings == "lora":
        return LoRAConfig(rank=4, base_bits=bits)
    return MoRAConfig(rank=4, base_bits=bits, **parsed(settings))


@pytest.mark.parametrize(
    "adapter, stage",
    [
        ("{operator: share, compute: weight}", 3),
        *(heavy(*row) for row in rows(IN_8_BITS)),
    ],
)
def test_ranks_train_alike_on_a_base_in_8_bits(tmp_path, base_folder, adapter, stage):
    write_own_base(tiny_model("llama"), base_folder)
    arguments = (str(tmp_path), config_of(adapter, 8), int(stage), 0)
    (one,) = run_pooled(1, loop_of, *arguments)
    for result in run_pooled(2, loop_of, *arguments):
        assert result["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert result["base_bytes"] == 0


@packed
@pytest.mark.parametrize(
    "adapter, stage",
    [("{operator: share}", 3), *(heavy(*row) for row in rows(IN_4_BITS))],
)
def test_ranks_hold_the_base_bits_and_the_ledger_matrices(
    tmp_path, base_folder, adapter, stage
):
    """Two ranks are one, no byte of the base is sent, and what a checkpoint loads is what
    the run had.
    """
    write_own_base(tiny_model("llama"), base_folder)
    config = config_of(adapter, 4)
    arguments = (str(tmp_path), config, int(stage), 3)
    (one,) = run_pooled(1, loop_of, *arguments)
    two = run_pooled(2, loop_of, *arguments)
    base = BaseCheckpoint.open(base_folder)
    ledger = Ledger.open(tmp_path / "out-2/ledger")
    model = load_adapter(base_folder, tmp_path / "out-2")
    loaded = mora_layers(model)
    for result in two:
        if not config.dropout:
            assert result["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert result["base_bytes"] == 0
        assert result["lost"][-1] < 1e-5
        for name, bits in result["bits"].items():
            exact = nf4.quantize(base.read(f"{name}.weight"))
            terms = join(ledger.mora_matrices_of(name))
            of_grouping = {"alternate": 2, "permuted": 3}
            assert len(terms) == of_grouping.get(getattr(config, "grouping", ""), 1)
            assert_same_pair(bits, exact, name)
            assert_same_pair(quantized(model)[name], exact, name)
            for have in (result["merged"][name], loaded[name].merged):
                for (spec, mora_matrix), (wanted, expected) in zip(
                    have, terms, strict=True
                ):
                    assert spec == wanted
                    assert torch.equal(mora_matrix, expected)


# -- runs ------------------------------------------------------------------------------


def exact_export(out, model):
    """The original plus all deltas and the live matrices, by the checkpoint's own files."""
    latest = out / "checkpoints/latest"
    adapter = load_file(latest / "adapter.safetensors")
    base = BaseCheckpoint.open(model)
    ledger = Ledger.open(latest / "ledger")
    return {
        f"{name}.weight": merged_weight(
            base.read(f"{name}.weight"),
            [
                *ledger.mora_matrices_of(name),
                (layer.spec, adapter[f"{name}.mora_matrix"]),
            ],
            False,
            torch.float32,
        )
        for name, layer in mora_layers(load_adapter(model, out)).items()
    }


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("ranks", [1, heavy(2)])
def test_killed_and_resumed_is_uninterrupted_and_the_export_is_exact(
    user, tmp_path, merged, out, ranks, bits
):
    """The export knows nothing of few bits: originals and deltas, in fp32."""
    reference = tmp_path / "reference"
    flags = f"{MERGING} --base_bits {bits} --per_device_train_batch_size 2"
    summary = run(ranks, user.flags(reference, flags))
    assert summary["base_bytes_gathered"] == 0
    assert summary["merges"] == 2
    stop_and_resume(ranks, user.flags(out, flags), 5)
    assert_same_run(out, reference)
    comparison = export_merged(out, merged, verify=True).comparison
    assert comparison.error < 0.6 * comparison.tolerance
    exported = load_file(merged / "model.safetensors")
    for name, weight in exact_export(out, user.model).items():
        assert torch.equal(exported[name], weight), name
    message = validation_errors_of(
        user.flags(out, MERGING, "--resume_from_checkpoint auto")
    )
    assert f"--base_bits: {bits} there, 16 here" in message


# -- plans -----------------------------------------------------------------------------

SHAPE = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4}


def work_of(bits):
    config = AutoConfig.for_model("llama", **{**FAMILIES["llama"], **SHAPE})
    adapter = replace(SHARE, rank=8, base_bits=bits)
    return Work(config, adapter, 64, 2, torch.bfloat16)


def plan_of(bits):
    work = work_of(bits)
    numels = [parameter.numel() for parameter in planned_model(work).parameters()]
    zero3 = {
        "zero_optimization": {"stage": 3},
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
    }
    return Planner(
        work, Cluster(2), complete_ds_config(zero3, numels), on_cpu=False
    ).plan()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_plan_counts_numbers_and_scales_and_what_a_merge_adds(monkeypatch, bits):
    monkeypatch.setattr(nf4, "find_spec", lambda name: None)  # a plan needs no package
    small = plan_of(bits)
    unquantized = plan_of(16)
    model = planned_model(work_of(bits))
    layers = mora_layers(model).values()
    in_few_bits = sum(
        weight.nbytes + scales.nbytes for weight, scales in quantized(model).values()
    )
    assert small.quantized == in_few_bits
    in_bf16 = sum(2 * layer.in_features * layer.out_features for layer in layers)
    assert unquantized.memory.base - small.memory.base == in_bf16 - in_few_bits
    assert small.memory.activations == unquantized.memory.activations
    assert small.files == 2 * unquantized.base_elements, (
        "the files have all of their bits"
    )
    assert "of it quantized" in report(small)
    assert "quantized" not in report(unquantized)
    assert ("each merge adds" in report(small)) == (bits == 4)
    tables = sum(12 * (layer.in_features + layer.out_features) for layer in layers)
    mora_matrices = sum(2 * layer.adapter_weight.numel() for layer in layers)
    assert small.bytes_per_merge == (mora_matrices + tables if bits == 4 else 0)
    assert unquantized.bytes_per_merge == unquantized.quantized == 0


def test_a_plan_counts_the_dense_weight():
    """The dense weight of the largest layer, in 8 bits; few tokens, so that weights
    outweigh activations."""
    few = {bits: replace(work_of(bits), micro_batch=1, seq_len=2) for bits in (8, 16)}
    steps = {
        bits: measure_step(planned_model(work), work) for bits, work in few.items()
    }
    largest = max(
        2 * layer.weight.numel()
        for layer in mora_layers(planned_model(few[8])).values()
    )
    assert 0.7 * largest < steps[8].peak - steps[16].peak <= largest
    assert steps[8].saved == steps[16].saved


def test_a_recommendation_may_use_a_quantized_base():
    zero3 = complete_ds_config(
        {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}, [10]
    )
    planners = {
        bits: Planner(work_of(bits), Cluster(2, memory=0.3e6), zero3)
        for bits in (16, 8, 4)
    }
    assert [planners[bits].base_fits for bits in (16, 8)] == [False, True]
    assert recommend(planners[16]) is None
    assert "--base_bits 8 or 4, or --base_device host" in verdict(planners[16].plan())


# -- bad input -------------------------------------------------------------------------


def refused_by_the_plugin(folder, bits):
    """For `run_ranks`."""
    config = replace(SHARE, base_bits=bits)
    split, full = (tiny_model("llama") for _ in range(2))
    inject(split, config)
    inject(full, config)
    with user_error("--tensor_parallel_size 2"):
        initialize(model=split, config=ds_config(3, 2, 1), tensor_parallel_size=2)
    engine, *_ = initialize(model=full, config=ds_config(3, 2, 1))
    another = tiny_model("llama")
    another.model.layers[1].mlp.down_proj.weight.data.neg_()
    write_own_base(another, folder / "other")
    with user_error(
        f"down_proj.weight of the model is not, in {bits} bits.*{folder / 'other'}"
    ):
        mora_ds.Run(engine, base=folder / "other", folder=folder / "out")


@pytest.mark.parametrize("bits", BITS)
def test_split_layers_and_another_base_are_refused(tmp_path, bits):
    run_alone(refused_by_the_plugin, tmp_path, bits)
