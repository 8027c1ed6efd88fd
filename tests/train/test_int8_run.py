"""Runs on a base in 8 bits: ranks, merges, kills, export, memory, plans, and what is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

import mora_ds
from mora_ds.adapters.config import LoRAConfig, MoRAConfig
from mora_ds.adapters.inject import frozen_buffers, inject, mora_layers
from mora_ds.adapters.ops.delta import live_weight
from mora_ds.adapters.ops.int8 import quantize
from mora_ds.common.errors import UserError
from mora_ds.config.adapter import AdapterArguments
from mora_ds.config.arguments import parse
from mora_ds.config.validate import validate
from mora_ds.deploy.adapter_io import load_adapter
from mora_ds.deploy.export import export_merged
from mora_ds.engine import zero
from mora_ds.engine.ds_config import complete_ds_config
from mora_ds.engine.initialize import initialize
from mora_ds.engine.traffic import CollectiveCounter
from mora_ds.models.base import BaseCheckpoint, write_own_base
from mora_ds.planning.plan import Cluster, Plan, Planner, _group_sizes, recommend
from mora_ds.planning.report import as_json, report, verdict
from mora_ds.planning.step import Work, measure_step, planned_model
from mora_ds.remora.ledger import Ledger
from mora_ds.train.dry_run import planned
from tests.helpers.engines import CountedBelow, ds_config
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, losses, refusal, run
from tests.helpers.models import FAMILIES, causal_loss, tiny_model, tokens
from tests.helpers.resume import MERGING, assert_same_run, merged, stop_and_resume

pytestmark = pytest.mark.gloo
BITS = ("--base_bits", "8")
ROWS = 6
ROOT = Path(__file__).resolve().parents[2]


def trained(stage: int, operator: str, **options: Any) -> dict[str, Any]:
    """Three steps of this rank of several."""
    world, rank = dist.get_world_size(), dist.get_rank()
    adapter = LoRAConfig if operator == "lora" else MoRAConfig
    kind = {} if operator == "lora" else {"operator": operator, "compute": options.get("compute", "auto")}
    model = tiny_model(options.get("family", "llama"))
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inject(model, adapter(rank=4, base_bits=8, **kind))
    engine, *_ = initialize(model=model, config=ds_config(stage, ROWS // world, 1))
    counter, seen = CollectiveCounter(frozen_buffers(model).values()), {}
    found = []
    with counter.counting(), CountedBelow(seen):
        for step in range(3):
            counter.reset()
            seen.clear()
            loss = causal_loss(engine, tokens(ROWS, seed=step).view(world, ROWS // world, -1)[rank])
            engine.backward(loss)
            engine.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            found.append(mean.item() / world)
        carried = {"gathered": counter.gathered_bytes, "base_bytes": counter.base_bytes, "all": sum(seen.values())}
    values = {name: zero.full_fp32(engine, layer.value) for name, layer in mora_layers(model).items()}
    return {"losses": found, "values": values, **carried}


CASES: list[dict[str, Any]] = [
    {"stage": 3, "operator": "share", "compute": "weight", "checkpointing": True},
]
MORE: list[dict[str, Any]] = [
    {"stage": 2, "operator": "rotate", "compute": "activation", "family": "gpt2"},
    {"stage": 3, "operator": "lora"},
    {"stage": 3, "operator": "decouple", "compute": "weight"},
    {"stage": 3, "operator": "rotate", "compute": "activation", "checkpointing": True},
    {"stage": 1, "operator": "truncate"},
    {"stage": 0, "operator": "share"},
]


def all_trained(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [trained(**case) for case in cases]


@pytest.mark.parametrize("cases", [CASES, pytest.param(MORE, marks=pytest.mark.heavy)], ids=["", "more"])
def test_two_ranks_are_one_and_no_byte_of_the_base_is_sent(cases: list[dict[str, Any]]) -> None:
    one, two = run_ranks(1, all_trained, cases)[0], run_ranks(2, all_trained, cases)
    for index, case in enumerate(cases):
        for results in two:
            found, expected = results[index], one[index]
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5), case
            for name, value in expected["values"].items():
                torch.testing.assert_close(found["values"][name], value, rtol=1e-4, atol=2e-5)
            assert found["base_bytes"] == 0
            if case["stage"] == 3:
                values = sum(-(-value.numel() // 2) * 2 * 4 for value in expected["values"].values())
                assert found["gathered"] == values and found["all"] <= 2 * values + 1024, case


# -- merging ----------------------------------------------------------------------------------------------------------


def own_loop(folder: str, file_dtype: str, merges: int) -> dict[str, Any]:
    """A loop of a user's own, in bf16, on a base whose files are in another dtype."""
    world, rank = dist.get_world_size(), dist.get_rank()
    os.chdir(folder)
    if rank == 0:
        write_own_base(tiny_model("llama", dtype=getattr(torch, file_dtype)), Path("base"))
    dist.barrier()
    model = tiny_model("llama", dtype=torch.bfloat16)  # the same numbers, rounded
    config = MoRAConfig(rank=4, operator="share", base_bits=8)
    inject(model, config)
    half = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    engine, *_ = initialize(model=model, config=ds_config(3, ROWS // world, 1, **half))
    work = mora_ds.Run(engine, config, base="base", folder="out")
    at_first = kept(model)
    reports = []
    for step in range(1, merges + 1):
        loss = causal_loss(engine, tokens(ROWS, seed=step).view(world, ROWS // world, -1)[rank])
        engine.backward(loss)
        engine.step()
        reports.append(work.merge(step).rounding_loss)
    work.save(merges)
    return {"at_first": at_first, "weights": kept(model), "lost": reports}


def kept(model: torch.nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    layers = mora_layers(model)
    return {name: (layer.weight.clone(), layer.weight_scales.clone()) for name, layer in layers.items()}  # type: ignore[union-attr]


def assert_rounded_once(found: dict[str, tuple[Tensor, Tensor]], base: BaseCheckpoint, ledger: Ledger | None) -> None:
    for name, (values, scales) in found.items():
        updates = [] if ledger is None else ledger.squares_of(name)
        exact = quantize(live_weight(base.read(f"{name}.weight"), updates, False, torch.float32))
        assert torch.equal(values, exact[0]) and torch.equal(scales, exact[1]), name


@pytest.mark.parametrize("file_dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.heavy)])
def test_after_ten_merges_every_rank_holds_the_original_plus_all_deltas_rounded_once(
    tmp_path: Path, file_dtype: str
) -> None:
    results = run_ranks(2, own_loop, str(tmp_path), file_dtype, 10)
    base, ledger = BaseCheckpoint.open(tmp_path / "base"), Ledger.open(tmp_path / "out" / "ledger")
    assert ledger.cycles == 10
    for result in results:
        assert_rounded_once(result["at_first"], base, None)
        assert_rounded_once(result["weights"], base, ledger)
        assert result["lost"] == results[0]["lost"] and 0 < result["lost"][-1] < 1
    loaded = load_adapter(tmp_path / "base", tmp_path / "out")
    for name, (values, scales) in results[0]["weights"].items():
        layer = mora_layers(loaded)[name]
        assert torch.equal(layer.weight, values) and torch.equal(layer.weight_scales, scales)  # type: ignore[arg-type]


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.heavy)])
def test_killed_and_resumed_is_uninterrupted_and_goes_home_exactly(
    user: Playground, tmp_path: Path, ranks: int
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    flags = (*MERGING, *BITS, "--per_device_train_batch_size", 2)
    summary = run(ranks, user.flags(whole, *flags))
    assert summary["base_bytes_gathered"] == 0 and summary["merges"] == 2
    stop_and_resume(ranks, user.flags(out, *flags), 5)
    assert_same_run(out, whole)
    # the export knows nothing of 8 bits: originals and deltas, in fp32
    exported = merged(out, tmp_path / "merged")
    adapter, base = load_file(out / "checkpoints/latest/adapter.safetensors"), BaseCheckpoint.open(user.model)
    ledger = Ledger.open(out / "checkpoints/latest/ledger")
    layers = json.loads((out / "checkpoints/latest/adapter.json").read_text())["layers"]
    assert layers and ledger.cycles == 2
    live = mora_layers(load_adapter(user.model, out))
    for name in layers:
        updates = [*ledger.squares_of(name), (live[name].spec, adapter[f"{name}.square"])]
        exact = live_weight(base.read(f"{name}.weight"), updates, False, torch.float32)
        assert torch.equal(exported[f"{name}.weight"], exact)
    comparison = export_merged(out, tmp_path / "verified", verify=True).comparison
    assert comparison is not None and 0.02 * comparison.tolerance < comparison.error < 0.6 * comparison.tolerance
    message = refusal(user.flags(out, *MERGING, "--resume_from_checkpoint", "auto"))
    assert "--base_bits: 8 there, 16 here" in message


@pytest.mark.heavy
def test_a_run_learns_as_on_the_base_as_it_is(user: Playground, tmp_path: Path) -> None:
    found = {}
    for bits in (16, 8):
        flags = user.flags(tmp_path / f"{bits}", "--base_bits", bits, "--max_steps", 12, "--bf16", "true")
        run(1, [*flags, "--per_device_train_batch_size", "4"])
        found[bits] = losses(tmp_path / f"{bits}")
    assert found[8][-1] < found[8][0] - 0.05
    assert (found[8] - found[16]).abs().max() < 0.01 * found[16].mean()


# -- plans ------------------------------------------------------------------------------------------------------------

SHAPE = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4}
ADAPTER = MoRAConfig(rank=8, operator="share", base_bits=8)


def work_of(bits: int, checkpointing: bool = False) -> Work:
    config = AutoConfig.for_model("llama", **{**FAMILIES["llama"], **SHAPE})
    return Work(config, replace(ADAPTER, base_bits=bits), 64, 2, torch.bfloat16, checkpointing)


def plan_of(bits: int) -> Plan:
    work = work_of(bits)
    numels = [parameter.numel() for parameter in planned_model(work).parameters()]
    zero3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}}
    return Planner(work, Cluster(2), complete_ds_config(zero3, numels), on_cpu=False).plan()


def test_a_plan_counts_whole_numbers_scales_and_the_dense_weight() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16, **SHAPE)
    inject(model, ADAPTER)
    frozen, layers = frozen_buffers(model).values(), mora_layers(model).values()
    small, whole = plan_of(8), plan_of(16)
    own = small.memory.base - sum(tensor.nbytes for tensor in frozen)
    assert 0 <= own < 1000  # rotary frequencies
    in_8_bits = sum(layer.weight.numel() + 4 * layer.out_features for layer in layers)
    assert small.quantized == in_8_bits and whole.quantized == 0
    assert whole.memory.base - small.memory.base == sum(2 * layer.weight.numel() for layer in layers) - in_8_bits
    assert small.base_elements == whole.base_elements
    largest = max(2 * layer.weight.numel() for layer in layers)
    few = {bits: replace(work_of(bits), micro_batch=1, seq_len=2) for bits in (8, 16)}  # weights outweigh activations
    steps = {bits: measure_step(planned_model(work), work) for bits, work in few.items()}
    assert 0.7 * largest < steps[8].peak - steps[16].peak <= largest
    assert steps[8].saved == steps[16].saved
    assert small.memory.activations == whole.memory.activations
    assert "of it in 8 bits" in report(small) and "8 bits" not in report(whole)
    assert as_json(small)["settings"]["base_bits"] == 8 and as_json(small)["base_bytes_in_8_bits"] == in_8_bits


def test_a_recommendation_knows_of_8_bits() -> None:
    zero3 = complete_ds_config({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}, [10])
    planners = {bits: Planner(work_of(bits), Cluster(2, memory=0.3e6), zero3) for bits in (16, 8)}
    for bits, planner in planners.items():
        ways = {t for t, _ in _group_sizes(planner.work, planner.cluster)}
        assert ways == ({1, 2} if bits == 16 else {1})
    assert planners[16].base_bytes > 0.3e6 > planners[8].base_bytes
    assert recommend(planners[16]) is None
    assert "--base_bits 8 or 4, or --base_device host" in verdict(planners[16].plan())
    with pytest.raises(UserError, match="--tensor_parallel_size 2: --base_bits 8"):
        planners[8].plan(tensor_parallel=2)


def test_a_dry_run_says_it(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama", **FAMILIES["llama"]}))
    flags = ["--model_name_or_path", str(config), "--dry_run", "--mora_rank", "4", *BITS]
    validate(parse(flags))
    plan, told = planned(parse(flags), world=2)
    assert plan.quantized > 0 and "frozen weights of these layers in 8 bits" in told[0]


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--base_bits", "5"), "--base_bits must be 8 or 4, or 16 for the base as it is loaded, got 5"),
        ((*BITS, "--tensor_parallel_size", "2"), "--tensor_parallel_size 2: --base_bits 8 holds unsplit weights"),
    ],
)
def test_flags_that_do_not_go_together(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(parse([*flags, "--max_steps", "5"]))
    assert message in str(caught.value)
    assert AdapterArguments.base_bits == 16


def refused_by_the_plugin(folder: Path) -> None:
    """For `run_ranks`."""
    config = MoRAConfig(rank=4, operator="share", base_bits=8)
    models = [tiny_model("llama"), tiny_model("llama")]
    for model in models:
        inject(model, config)
    with pytest.raises(UserError, match="--tensor_parallel_size 2"):
        initialize(model=models[0], config=ds_config(3, 2, 1), tensor_parallel_size=2)
    engine, *_ = initialize(model=models[1], config=ds_config(3, 2, 1))
    write_own_base(tiny_model("llama", seed=1), folder / "other")
    with pytest.raises(UserError, match=f"is not.*{folder / 'other'}"):
        mora_ds.Run(engine, config, folder / "other", folder / "out")


def test_split_layers_and_another_base_are_refused(tmp_path: Path) -> None:
    run_ranks(1, refused_by_the_plugin, tmp_path)
