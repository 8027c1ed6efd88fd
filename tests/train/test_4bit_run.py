"""Runs on a base in 4 bits: ranks, merges, kills, export, plans, and what is refused."""

from __future__ import annotations

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
from mora_ds.adapters import nf4
from mora_ds.adapters.config import AdapterConfig, LoRAConfig, MoRAConfig
from mora_ds.adapters.inject import frozen_buffers, inject, mora_layers
from mora_ds.adapters.ops.delta import live_weight
from mora_ds.adapters.ops.terms import join
from mora_ds.common.errors import UserError
from mora_ds.config.arguments import parse
from mora_ds.config.validate import validate
from mora_ds.deploy.adapter_io import load_adapter
from mora_ds.deploy.export import export_merged
from mora_ds.engine import zero
from mora_ds.engine.ds_config import complete_ds_config
from mora_ds.engine.initialize import initialize
from mora_ds.engine.traffic import CollectiveCounter
from mora_ds.models.base import BaseCheckpoint, write_own_base
from mora_ds.planning.plan import Cluster, Plan, Planner, _group_sizes
from mora_ds.planning.report import as_json, report
from mora_ds.planning.step import Work, planned_model
from mora_ds.remora.ledger import Ledger
from mora_ds.train.dry_run import planned
from tests.helpers.engines import ds_config
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, refusal, run
from tests.helpers.models import FAMILIES, causal_loss, tiny_model, tokens
from tests.helpers.resume import MERGING, assert_same_run, interrupted_job, stop_and_resume

pytest.importorskip("bitsandbytes", reason="needs the extra bits4")
pytestmark = pytest.mark.gloo
BITS = ("--base_bits", "4")
ROWS = 6

# -- loops of a user's own ------------------------------------------------------------------------------------------


def own_loop(folder: str, config: AdapterConfig, stage: int, merges: int) -> dict[str, Any]:
    """Steps with merges, in fp32, of this rank of several; the base's files are in fp32 too."""
    world, rank = dist.get_world_size(), dist.get_rank()
    os.chdir(folder)
    model = tiny_model("llama")
    inject(model, config)
    engine, *_ = initialize(model=model, config=ds_config(stage, ROWS // world, 1))
    work = mora_ds.Run(engine, config, base="base", folder=f"out-{world}")
    counter, losses = CollectiveCounter(frozen_buffers(model).values()), []
    with counter.counting():
        for step in range(1, merges + 2):
            loss = causal_loss(engine, tokens(ROWS, seed=step).view(world, ROWS // world, -1)[rank])
            engine.backward(loss)
            engine.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            losses.append(mean.item() / world)
            if step <= merges:
                report = work.merge(step)
    work.save(merges)
    layers = mora_layers(model)
    return {
        "losses": losses,
        "values": {name: zero.full_fp32(engine, layer.value) for name, layer in layers.items()},
        "bits": {
            name: (layer.weight.clone(), layer.get_buffer("weight_scales").clone()) for name, layer in layers.items()
        },
        "merged": {name: layer.merged for name, layer in layers.items()},
        "base_bytes": counter.base_bytes,
        "lost": report.rounding_loss,
    }


SHARE = MoRAConfig(rank=4, operator="share", base_bits=4)
MORE: list[tuple[AdapterConfig, int]] = [
    (replace(SHARE, grouping="alternate"), 3),
    (replace(SHARE, compute="weight"), 2),
    (MoRAConfig(rank=4, operator="rotate", compute="activation", base_bits=4), 1),
    (MoRAConfig(rank=4, operator="decouple", dropout=0.1, base_bits=4), 0),
    (LoRAConfig(rank=4, base_bits=4), 3),
]


@pytest.mark.parametrize(
    ("config", "stage"), [(SHARE, 3), *(pytest.param(*case, marks=pytest.mark.heavy) for case in MORE)]
)
def test_ranks_hold_the_originals_bits_and_the_ledgers_matrices(
    tmp_path: Path, config: AdapterConfig, stage: int
) -> None:
    """Two ranks are one, no byte of the base is sent, and what a checkpoint loads is what the run had."""
    write_own_base(tiny_model("llama"), tmp_path / "base")
    one = run_ranks(1, own_loop, str(tmp_path), config, stage, 3)[0]
    two = run_ranks(2, own_loop, str(tmp_path), config, stage, 3)
    base, ledger = BaseCheckpoint.open(tmp_path / "base"), Ledger.open(tmp_path / "out-2" / "ledger")
    loaded = mora_layers(load_adapter(tmp_path / "base", tmp_path / "out-2"))
    for found in two:
        if not config.dropout:
            assert found["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert found["base_bytes"] == 0 and found["lost"] < 1e-5
        for name, bits in found["bits"].items():
            exact = nf4.quantize(base.read(f"{name}.weight"))
            terms = join(ledger.squares_of(name))
            assert len(terms) == {"alternate": 2, "permuted": 3}.get(getattr(config, "grouping", ""), 1)
            layer = loaded[name]
            for weight, scales in (bits, (layer.weight, layer.get_buffer("weight_scales"))):
                assert torch.equal(weight, exact[0]) and torch.equal(scales, exact[1])
            for have in (found["merged"][name], layer.merged):
                assert [spec for spec, _ in have] == [spec for spec, _ in terms]
                assert all(torch.equal(mine, right) for (_, mine), (_, right) in zip(have, terms, strict=True))


def other_base(folder: Path) -> None:
    """For `run_ranks`."""
    model = tiny_model("llama")
    inject(model, SHARE)
    engine, *_ = initialize(model=model, config=ds_config(3, 2, 1))
    other = tiny_model("llama")
    other.model.layers[1].mlp.down_proj.weight.data.neg_()
    write_own_base(other, folder / "other")
    with pytest.raises(UserError, match=f"down_proj.weight of the model is not, in 4 bits.*{folder / 'other'}"):
        mora_ds.Run(engine, SHARE, folder / "other", folder / "out")


@pytest.mark.heavy
def test_another_base_is_refused(tmp_path: Path) -> None:
    run_ranks(1, other_base, tmp_path)


# -- runs -------------------------------------------------------------------------------------------------------------


def exact_export(out: Path, model: Path) -> dict[str, Tensor]:
    """The original plus all deltas and the live matrices, by the checkpoint's own files."""
    latest = out / "checkpoints" / "latest"
    adapter, base, ledger = (
        load_file(latest / "adapter.safetensors"),
        BaseCheckpoint.open(model),
        Ledger.open(latest / "ledger"),
    )
    return {
        f"{name}.weight": live_weight(
            base.read(f"{name}.weight"),
            [*ledger.squares_of(name), (layer.spec, adapter[f"{name}.square"])],
            False,
            torch.float32,
        )
        for name, layer in mora_layers(load_adapter(model, out)).items()
    }


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.heavy)])
def test_killed_and_resumed_is_uninterrupted_and_the_export_is_exact(
    user: Playground, tmp_path: Path, ranks: int
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    flags = (*MERGING, *BITS, "--per_device_train_batch_size", 2)
    summary = run(ranks, user.flags(whole, *flags))
    assert summary["base_bytes_gathered"] == 0 and summary["merges"] == 2
    stop_and_resume(ranks, user.flags(out, *flags), 5)
    assert_same_run(out, whole)
    comparison = export_merged(out, tmp_path / "merged", verify=True).comparison
    assert comparison is not None and comparison.error < 0.6 * comparison.tolerance
    exported, expected = load_file(tmp_path / "merged" / "model.safetensors"), exact_export(out, user.model)
    assert expected and all(torch.equal(exported[name], weight) for name, weight in expected.items())
    message = refusal(user.flags(out, *MERGING, "--resume_from_checkpoint", "auto"))
    assert "--base_bits: 4 there, 16 here" in message


@pytest.mark.heavy
def test_a_run_goes_on_with_other_numbers_of_ranks(user: Playground, tmp_path: Path) -> None:
    """What it stands on is the same to the bit: 4 bits of the originals and the ledger's matrices."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    flags = (*MERGING, *BITS)
    one, two = (("--per_device_train_batch_size", rows) for rows in (4, 2))
    run(1, user.flags(whole, *flags, *one))
    run_ranks(1, interrupted_job, user.flags(out, *flags, *one), 6)  # between the second merge and the end
    run(2, user.flags(out, *flags, *two, "--resume_from_checkpoint", "auto"))
    resumed = exact_export(out, user.model)
    for name, weight in exact_export(whole, user.model).items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-4, atol=1e-5)


# -- plans ------------------------------------------------------------------------------------------------------------

SHAPE = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4}
ADAPTER = MoRAConfig(rank=8, operator="share", compute="activation", base_bits=4)
"""Over activations, where nothing but index tables outlives a layer's call."""


def plan_of(bits: int) -> Plan:
    config = AutoConfig.for_model("llama", **{**FAMILIES["llama"], **SHAPE})
    work = Work(config, replace(ADAPTER, base_bits=bits), 64, 2, torch.bfloat16)
    numels = [parameter.numel() for parameter in planned_model(work).parameters()]
    zero3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}}
    planner = Planner(work, Cluster(2), complete_ds_config(zero3, numels), on_cpu=False)
    assert {t for t, _ in _group_sizes(work, planner.cluster)} == ({1, 2} if bits == 16 else {1})
    return planner.plan()


def test_a_plan_counts_packed_numbers_and_what_a_merge_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16, **SHAPE)
    inject(model, ADAPTER)
    frozen, layers = frozen_buffers(model).values(), mora_layers(model).values()
    monkeypatch.setattr(nf4, "find_spec", lambda name: None)  # a plan needs no package
    small, whole = plan_of(4), plan_of(16)
    own = small.memory.base - sum(tensor.nbytes for tensor in frozen)
    assert 0 <= own < 1000  # rotary frequencies
    packed = sum(layer.weight.nbytes + layer.get_buffer("weight_scales").nbytes for layer in layers)
    assert small.quantized == packed and whole.quantized == 0
    assert small.base_elements == whole.base_elements
    assert small.memory.activations == whole.memory.activations
    tables = sum(16 * (layer.in_features + layer.out_features) for layer in layers)
    assert small.a_merge_adds - tables == sum(2 * layer.square.numel() for layer in layers)  # type: ignore[union-attr]
    assert tables == pytest.approx(small.memory.tables, rel=0.3) and whole.a_merge_adds == 0
    assert "of it in 4 bits" in report(small) and "each merge adds" in report(small)
    assert "each merge adds" not in report(whole)
    told = as_json(small)
    assert (told["settings"]["base_bits"], told["base_bytes_in_4_bits"], told["base_bytes_in_8_bits"]) == (4, packed, 0)
    assert told["bytes_a_merge_adds"] == small.a_merge_adds


def test_a_dry_run_says_it(user: Playground) -> None:
    flags = ["--model_name_or_path", str(user.model), "--dry_run", "--mora_rank", "4", *BITS]
    validate(parse(flags))
    plan, told = planned(parse(flags), world=2)
    assert plan.quantized > 0 and "frozen weights of these layers in 4 bits" in told[0]
    assert "each merge adds 0.0 MB on every rank" in told[0] and "on a base in 8 bits" in told[0]
