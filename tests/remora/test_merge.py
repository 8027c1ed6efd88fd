"""Merging, many times over: the live base is the replayed ledger bit for bit, and every reset does what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.common.errors import RunError
from mora_ds.engine.initialize import initialize
from mora_ds.models.base import BaseCheckpoint, write_own_base
from mora_ds.remora import optimizer_reset
from mora_ds.remora.ledger import Ledger
from mora_ds.remora.merge import ReMoRA
from mora_ds.remora.optimizer_reset import OptimizerReset
from tests.helpers.adapters import summed
from tests.helpers.engines import ds_config, merging_run
from tests.helpers.gloo import run_ranks
from tests.helpers.models import causal_loss, tiny_model, tokens

HEAVY = ((3, "float32"), (3, "bfloat16"), (2, "bfloat16"))


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("world", "dtype"),
    [(2, "float32"), *(pytest.param(*case, marks=pytest.mark.heavy) for case in HEAVY)],
)
def test_after_50_merges_every_rank_holds_the_replayed_ledger(tmp_path: Path, world: int, dtype: str) -> None:
    ranks = run_ranks(world, merging_run, str(tmp_path), dtype, 50)
    ledger = Ledger.open(tmp_path / "ledger")
    base = BaseCheckpoint.open(tmp_path / "base")
    assert ledger.cycles == 50
    for name, weight in ranks[0]["weights"].items():
        replayed = summed(base.read(f"{name}.weight"), ledger.squares_of(name), False, getattr(torch, dtype))
        assert not torch.equal(replayed, base.read(f"{name}.weight"))
        for result in ranks:
            assert torch.equal(result["weights"][name], replayed), name
        assert torch.equal(weight, replayed)
    for report in ranks[0]["reports"]:
        tolerance = 1e-6 if dtype == "float32" else 2e-2
        assert report["loss_after"] == pytest.approx(report["loss_before"], abs=tolerance)
        assert (report["rounding_loss"] == 0.0) == (dtype == "float32")
        assert report["states_zeroed"] == 1.0


def all_resets(folder: str) -> dict[str, dict[str, Any]]:
    found = {}
    for reset in OptimizerReset:
        found[reset.value] = merging_run(f"{folder}/{reset.value}", "float32", 1, reset=reset)
    return found


@pytest.mark.gloo
def test_each_reset_keeps_what_it_says(tmp_path: Path) -> None:
    for found in run_ranks(2, all_resets, str(tmp_path)):
        moments = {name: result["moments"] for name, result in found.items()}
        assert moments["zero"]["step"] == 0
        for name in ("keep", "magnitude", "random"):
            assert moments[name]["step"] == 1
        for key in ("exp_avg", "exp_avg_sq"):
            kept = moments["keep"][key]
            assert not moments["zero"][key].any()
            shares = {name: float((moments[name][key] != 0).float().mean()) for name in moments}
            assert shares["magnitude"] == pytest.approx(0.1, abs=0.01)
            assert 0.0 < shares["random"] < 0.05
            for name in ("magnitude", "random"):
                survivors = moments[name][key] != 0
                assert torch.equal(moments[name][key][survivors], kept[survivors])
            smallest_kept = moments["magnitude"][key].abs()[moments["magnitude"][key] != 0].min()
            assert smallest_kept >= kept.abs().quantile(0.85)
        assert "states zeroed 100%" in found["zero"]["text"]


def test_random_pruning_repeats_itself() -> None:
    first, second = torch.ones(10_000), torch.ones(10_000)
    for value in (first, second):
        optimizer_reset.rule(OptimizerReset.RANDOM, 7, 0, 3)("exp_avg", value)
    assert torch.equal(first, second)
    other = torch.ones(10_000)
    optimizer_reset.rule(OptimizerReset.RANDOM, 7, 0, 4)("exp_avg", other)
    assert not torch.equal(first, other)


def moved_probe(folder: str) -> str:
    """A probe that jumps as if the merge had changed the model."""
    model = tiny_model("llama")
    base = write_own_base(model, Path(folder) / "base")
    config = MoRAConfig(rank=4, operator="share")
    inject(model, config)
    engine, *_ = initialize(model=model, config=ds_config(3, 2, 1))
    ledger = Ledger.create(Path(folder) / "ledger", base.fingerprint())
    keys = {f"{name}.weight": f"{name}.weight" for name in mora_layers(model)}
    remora = ReMoRA(engine, config, ledger, base, keys)
    losses = iter((3.0, 3.5))
    remora.probe = lambda: next(losses)
    engine.backward(causal_loss(engine, tokens(2)))
    engine.step()
    try:
        remora.merge(1)
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.gloo
def test_a_moved_probe_stops_the_run(tmp_path: Path) -> None:
    (message,) = run_ranks(1, moved_probe, str(tmp_path))
    assert "step 1" in message and "3.000000 to 3.500000" in message
