"""Merging, many times over: the live base is the replayed ledger bit for bit, and every
reset does what it says.
"""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.common.errors import RunError
from mora_ds.engine.initialize import initialize
from mora_ds.models.base import BaseCheckpoint, write_own_base
from mora_ds.remora.ledger import Ledger
from mora_ds.remora.merge import MergeReport, ReMoRA
from tests.helpers.engines import assert_replayed, ds_config, merging_run
from tests.helpers.errors import run_error
from tests.helpers.gloo import run_alone
from tests.helpers.models import micro_step, tiny_model, tokens
from tests.helpers.pool import run_pooled
from tests.helpers.tables import heavy

CONFIG = MoRAConfig(rank=4, operator="share")


@pytest.mark.parametrize(
    "world, dtype, merges", [(2, "float32", 20), heavy(3, "bfloat16", 50)]
)
def test_after_many_merges_every_rank_holds_the_replayed_ledger(
    tmp_path, base_folder, world, dtype, merges
):
    ranks = run_pooled(world, merging_run, str(tmp_path), CONFIG, 3, dtype, merges)
    ledger = Ledger.open(tmp_path / "out/ledger")
    base = BaseCheckpoint.open(base_folder)
    assert ledger.cycles == merges
    assert_replayed(ranks, tmp_path)
    for cycle, report in enumerate(ranks[0]["reports"]):
        assert (report["cycle"], report["step"]) == (cycle, cycle + 1)
        assert report["layers"] == len(ranks[0]["weights"])
        tolerance = 1e-6 if dtype == "float32" else 2e-2
        assert report["loss_after"] == pytest.approx(
            report["loss_before"], abs=tolerance
        )
        assert (report["rounding_loss"] == 0.0) == (dtype == "float32")
    check_norms(ranks[0]["reports"][0], base, ledger)


def norm(tensors):
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def check_norms(report, base, ledger):
    """Checks the first merge; returns its deltas."""
    entries = ledger.layers(0)
    deltas = [
        entry.operator.delta_weight(ledger.mora_matrix(0, name))
        for name, entry in entries.items()
    ]
    norms = {
        "mora_matrix_norm": norm(ledger.mora_matrix(0, name) for name in entries),
        "delta_norm": norm(deltas),
        "weight_norm": norm(base.read(f"{name}.weight") for name in entries),
    }
    assert {name: report[name] for name in norms} == pytest.approx(norms, rel=1e-5)
    return deltas


def check_rounding(results, folder):
    """The part of a merge that is lost to rounding in bf16."""
    (report,) = results["reports"]
    base = BaseCheckpoint.open(folder / "base")
    ledger = Ledger.open(folder / "out/ledger")
    deltas = check_norms(report, base, ledger)
    lost = [
        results["weights"][name].double()
        - base.read(f"{name}.weight").double()
        - delta.double()
        for name, delta in zip(ledger.layers(0), deltas, strict=True)
    ]
    assert report["rounding_loss"] == pytest.approx(norm(lost) / norm(deltas), rel=1e-4)
    assert 0.001 < report["rounding_loss"] < 0.1


def test_a_merge_zeroes_the_optimizer_s_state(tmp_path):
    for results in run_pooled(2, merging_run, str(tmp_path), CONFIG, 3, "bfloat16", 1):
        check_rounding(results, tmp_path)
        assert set(results["moments"]) == {"step", "exp_avg", "exp_avg_sq"}
        assert not any(value.any() for value in results["moments"].values())


def test_merge_report_str():
    report = MergeReport(
        cycle=2,
        step=9,
        layers=14,
        mora_matrix_norm=4.0,
        delta_norm=2.0,
        weight_norm=8.0,
        rounding_loss=0.125,
    )
    line = "merged cycle 2 at step 9: 14 layers, |M| 4, delta/weight 0.25, lost to rounding 12.5%"
    assert str(report) == line
    probed = replace(report, loss_before=3.0, loss_after=3.5)
    assert str(probed) == f"{line}, reference loss 3.0000 -> 3.5000"


def moved_probe(folder):
    """A probe that jumps as if the merge had changed the model."""
    model = tiny_model("llama")
    base = write_own_base(model, Path(folder) / "base")
    inject(model, CONFIG)
    engine, *_ = initialize(model=model, config=ds_config(3, 2, 1))
    ledger = Ledger.create(Path(folder) / "ledger", base.fingerprint())
    keys = {f"{name}.weight": f"{name}.weight" for name in mora_layers(model)}
    remora = ReMoRA(engine, CONFIG, ledger, base, keys)
    losses = iter((3.0, 3.5))
    micro_step(engine, tokens(2))
    try:
        remora.merge(1, lambda: next(losses))
    except RunError as error:
        return str(error)
    return ""


def test_probe_tolerance():
    """A share of a loss above 1, which depends on the dtype of the weights; and never to
    what is no number.
    """
    for dtype, bits, share in (
        (torch.float32, 16, 1e-4),
        (torch.float16, 16, 1e-2),
        (torch.bfloat16, 16, 3e-2),
        (torch.float32, 8, 3e-2),
    ):
        model = tiny_model("llama", dtype=dtype)
        inject(model, MoRAConfig(rank=4, target_modules=("q_proj",), base_bits=bits))
        remora = ReMoRA.__new__(ReMoRA)
        remora.engine = SimpleNamespace(module=model)
        for before in (0.1, 5.0):
            most = share * max(before, 1.0)
            remora.check_reference_loss(1, before, before + 0.99 * most)
            for after in (before + 1.01 * most, before - 1.01 * most, math.nan):
                with run_error("moved the loss on the reference batch"):
                    remora.check_reference_loss(1, before, after)
    remora.check_reference_loss(1, None, None)


def test_a_moved_probe_stops_the_run(tmp_path):
    message = run_alone(moved_probe, str(tmp_path))
    assert "step 1" in message
    assert "3.000000 to 3.500000" in message
