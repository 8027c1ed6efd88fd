"""Spectra: algebra against the decomposition of the formed matrices, rank growth, and what is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.ops.lora import LoRASpec
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import Grouping, OperatorKind, UpdateSpec
from mora_ds.checkpoint.adapter_files import AdapterFile, BaseReference, write_adapter
from mora_ds.checkpoint.layout import find_ledger
from mora_ds.common.errors import UserError
from mora_ds.eval.ledger_summary import Update
from mora_ds.remora.ledger import LayerEntry, Ledger
from mora_ds.research.spectrum import (
    LayerSpectrum,
    Row,
    Spectra,
    layer_spectra,
    measure,
    spectrum_lines,
)
from tests.helpers.mistakes import command

SHARE_ONLY = [each for each in Grouping if each not in (Grouping.PLAIN, Grouping.PERMUTED)]
FAMILIES = [(kind, each) for kind in OperatorKind for each in (Grouping.PLAIN, Grouping.PERMUTED)]
FAMILIES += [(OperatorKind.SHARE, each) for each in SHARE_ONLY]


def square(side: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(side, side, generator=torch.Generator().manual_seed(seed))


def formed(update: Update) -> torch.Tensor:
    return update[0].delta_weight(update[1].double())


# -- measures ---------------------------------------------------------------------------------------------------------


def test_measures() -> None:
    values = torch.tensor([3.0, 1.0, 1.0, 0.05] + [0.0] * 16, dtype=torch.float64)
    found = measure(values, 20, threshold=0.1)
    energy, total = 9 + 1 + 1 + 0.05**2, 5.05
    shares = [value / total for value in (3.0, 1.0, 1.0, 0.05)]
    assert found.norm == pytest.approx(math.sqrt(energy)) and found.largest == 3.0
    assert (found.above, found.rank) == (3, 4)
    assert found.stable_rank == pytest.approx(energy / 9)
    assert found.effective_rank == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)))
    assert measure(torch.ones(7), 7).effective_rank == pytest.approx(7)
    assert set(vars(measure(torch.zeros(5), 5)).values()) == {0}


# -- a layer's history -----------------------------------------------------------------------------------------------


def history(kind: OperatorKind, grouping: Grouping, d_in: int, d_out: int, r_hat: int, cycles: int) -> list[Update]:
    return [
        (OperatorSpec(kind, d_in, d_out, r_hat, grouping, seed), square(r_hat, seed) / (seed + 1))
        for seed in range(cycles)
    ]


def expected_span(newest: torch.Tensor, earlier: torch.Tensor) -> float:
    left, values, right = torch.linalg.svd(earlier)
    rank = int((values > values[0] * 1e-5).sum())
    inside = left[:, :rank] @ left[:, :rank].T @ newest @ right[:rank].T @ right[:rank]
    return 1 - (inside.norm() / newest.norm()).square().item()


def expected_reach(newest: torch.Tensor, specs: list[UpdateSpec]) -> float:
    """Every delta that the operators can make, as columns; then plain least squares."""
    basis = []
    for spec in specs:
        side = spec.value_shape[0]
        units = torch.eye(side**2, dtype=torch.float64).view(-1, side, side)
        basis += [spec.delta_weight(unit).flatten() for unit in units]
    columns, target = torch.stack(basis, dim=1), newest.flatten().unsqueeze(1)
    fit = torch.linalg.lstsq(columns, target, driver="gelsd").solution
    return ((target - columns @ fit).norm() / target.norm()).square().item()


@pytest.mark.parametrize("kind, grouping", FAMILIES)
def test_history_is_that_of_the_formed_matrices(kind: OperatorKind, grouping: Grouping) -> None:
    sides = (18, 23, 6)
    updates = history(kind, grouping, *sides, cycles=3)
    total = torch.zeros(sides[1], sides[0], dtype=torch.float64)
    for cycle, found in enumerate(layer_spectra(updates, threshold=0.5)):
        newest = formed(updates[cycle])
        if cycle:
            assert found.outside_span == pytest.approx(expected_span(newest, total), abs=1e-6)
            reach = expected_reach(newest, [spec for spec, _ in updates[:cycle]])
            assert found.outside_reach == pytest.approx(reach, abs=1e-6)
        total += newest
        values = torch.linalg.svdvals(total)
        expected = measure(values, max(sides), 0.5)
        assert vars(found.cumulative) == pytest.approx(vars(expected), rel=1e-6)
        alone = measure(torch.linalg.svdvals(newest), max(sides), 0.5)
        assert vars(found.newest) == pytest.approx(vars(alone), rel=1e-6)


def test_factors_of_lora_reach_everything() -> None:
    spec = LoRASpec(12, 10, 3, 6.0)
    factors = [torch.randn(spec.value_shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    first, second = layer_spectra([(spec, each) for each in factors])
    assert [first.newest.rank, first.cumulative.rank, second.cumulative.rank] == [3, 3, 6]
    assert second.outside_reach == 0.0 and 0.0 < second.outside_span <= 1.0


def spectra(kind: OperatorKind, cycles: int, plan: Callable[[int], tuple[Grouping, int]]) -> list[LayerSpectrum]:
    """d = 64, r_hat = 16; `plan`: cycle -> (grouping, seed)."""
    specs = [OperatorSpec(kind, 64, 64, 16, *plan(cycle)) for cycle in range(cycles)]
    return list(layer_spectra([(spec, square(16, cycle)) for cycle, spec in enumerate(specs)]))


def ranks(found: list[LayerSpectrum]) -> list[int]:
    return [each.cumulative.rank for each in found]


def test_rank_grows_with_fresh_permutations_and_no_longer_with_repeated_groupings() -> None:
    """By a matrix a cycle, less one from the second on: the sum of all inputs (outputs) is in every grouping's span."""
    fresh = spectra(OperatorKind.SHARE, 6, lambda cycle: (Grouping.PERMUTED, cycle))
    assert ranks(fresh) == [16, 31, 46, 61, 64, 64] and [each.newest.rank for each in fresh] == [16] * 6
    assert fresh[1].outside_span > 0.8 and fresh[5].outside_span < 1e-9 < 0.4 < fresh[5].outside_reach
    groupings = (Grouping.STRIDED, Grouping.CONTIGUOUS)  # the paper's alternation
    alternating = spectra(OperatorKind.SHARE, 6, lambda cycle: (groupings[cycle % 2], 0))
    assert ranks(alternating) == [16, 28, 28, 28, 28, 28]
    assert [each.outside_reach for each in alternating[2:]] == [0.0] * 4
    same = spectra(OperatorKind.SHARE, 6, lambda _: (Grouping.PERMUTED, 7))
    assert ranks(same) == [16] * 6
    assert max(each.outside_span for each in (*alternating[2:], *same[1:])) < 1e-9


# -- a ledger --------------------------------------------------------------------------------------------------------


def entries(cycle: int, names: tuple[str, ...]) -> dict[str, LayerEntry]:
    spec = OperatorSpec(OperatorKind.SHARE, 32, 24, 6, Grouping.PERMUTED, cycle)
    return {name: LayerEntry(name, f"{name}.weight", False, spec) for name in names}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two merged cycles, the second with a layer more, and live MoRA matrices."""
    folder = tmp_path / "step"
    ledger = Ledger.create(folder / "ledger", "f" * 64)
    for cycle, names in enumerate((("a.q",), ("a.q", "a.v"))):
        ledger.append(10 * cycle + 10, entries(cycle, names), [(name, square(6, cycle)) for name in names])
    live = entries(2, ("a.q", "a.v"))
    write_adapter(folder, AdapterFile(live, MoRAConfig(), "float32", 2, 25), {name: square(6, 2) for name in live}, {})
    BaseReference("base", "f" * 64, {}, "float32").write(folder)
    return folder


def all_rows(folder: Path, pattern: str = "*", threshold: float = 0.1) -> list[Row]:
    found = Spectra(find_ledger(folder), pattern)
    return [row for module in found.modules for row in found.rows(module, threshold)]


def test_rows_of_a_checkpoint_end_with_its_live_squares(checkpoint: Path) -> None:
    rows = all_rows(checkpoint)
    places = [(row.module, row.cycle, row.step, row.is_live) for row in rows]
    of_v = [("a.v", 1, 20, False), ("a.v", 2, 25, True)]
    assert places == [("a.q", 0, 10, False), ("a.q", 1, 20, False), ("a.q", 2, 25, True), *of_v]
    updates = [(entries(cycle, ("a.q",))["a.q"].operator, square(6, cycle)) for cycle in range(3)]
    assert [row.spectrum for row in rows[:3]] == list(layer_spectra(updates))
    assert [row.is_live for row in all_rows(checkpoint / "ledger")] == [False] * 3


def test_layers_are_chosen_by_pattern(checkpoint: Path, tmp_path: Path) -> None:
    assert {row.module for row in all_rows(checkpoint, "*.v")} == {"a.v"}
    with pytest.raises(UserError, match=r"--layers 'a\.k' matches none of the 2 layers\. Did you mean 'a\.[qv]'"):
        Spectra(find_ledger(checkpoint), "a.k")
    with pytest.raises(UserError, match="nothing was merged yet"):
        Spectra(find_ledger(Ledger.create(tmp_path / "empty", "f").folder))


def test_tables_show_the_last_cycle_of_layers_and_means_of_cycles(checkpoint: Path) -> None:
    rows = all_rows(checkpoint)
    lines = spectrum_lines(rows, 0.1)
    cells = [line.split() for line in lines]
    assert cells[1][:4] == ["a.q", "2*", f"{rows[2].spectrum.cumulative.rank}.0", "24.0"]
    both = [rows[1].spectrum.cumulative, rows[3].spectrum.cumulative]
    assert cells[6][:4] == ["1", "20", "2", f"{sum(each.rank for each in both) / 2:.1f}"]
    assert "not merged yet" in lines[-1]


def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [str(checkpoint), "--json", str(tmp_path / "out.json"), "--layers", "a.*", "--threshold", "2"]
    assert command("spectrum", flags) == (0, "")
    content = json.loads((tmp_path / "out.json").read_text())
    printed = capsys.readouterr().out
    assert "a.v" in printed and " >2 " in printed
    assert (content["format"], content["threshold"], len(content["rows"])) == (1, 2, 5)
    wanted = [row.to_dict() for row in all_rows(checkpoint, threshold=2)]
    assert [row["spectrum"] for row in content["rows"]] == [row["spectrum"] for row in wanted]
    last = content["rows"][4]
    assert (last["d_in"], last["d_out"], last["r_hat"], last["operator"]) == (32, 24, 6, "share/permuted")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--layers", "nothing"], "--layers"),
        (["--device", "warp"], "--device warp"),
        (["--threshold", "nan"], "--threshold"),
        (["--json", "/nowhere/new.json"], "folder that exists"),
        (["--json", "/"], "folder that exists"),
    ],
    ids=str,
)
def test_mistakes_in_flags_are_named(checkpoint: Path, flags: list[str], named: str) -> None:
    code, message = command("spectrum", [str(checkpoint), *flags])
    assert code == 2 and named in message
