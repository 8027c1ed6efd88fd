"""tools/bench/energy.py: shares of a gradient's energy that can be known without it."""

from pathlib import Path

import pytest

from mora_ds.common.errors import UserError
from mora_ds.common.files import read_json
from tests.helpers.jobs import Playground
from tests.helpers.tools import call

TOY = ("--documents", 2, "--tokens", 12, "--every", 1)


def mean_shares(user: Playground, folder: Path, rank: int) -> dict[str, float]:
    call(
        "bench/energy", "--base", user.model, "--new", user.train, *TOY, "--rank", rank, "--json", folder / "found.json"
    )
    rows = read_json(folder / "found.json")["tables"]["mean"][1:]
    return {span: float(cell.rstrip("%")) for span, cell in rows}


def test_a_span_as_large_as_the_weight_holds_everything(user: Playground, tmp_path: Path):
    shares = mean_shares(user, tmp_path, rank=10_000)
    assert shares["MoRA, rotate"] == shares["LoRA at its start"] == shares["best of LoRA's rank"] == 100.0


def test_a_smaller_span_holds_less_and_the_best_one_most(user: Playground, tmp_path: Path):
    shares = mean_shares(user, tmp_path, rank=2)
    assert shares["LoRA at its start"] < shares["LoRA, A turned to the gradient"] <= shares["best of LoRA's rank"] < 100


def test_a_text_that_is_too_short_is_told(user: Playground, tmp_path: Path):
    with pytest.raises(UserError, match=r"--documents: .* at least 12 tokens"):
        call("bench/energy", "--base", user.model, "--new", user.train, *TOY, "--documents", 10_000)
