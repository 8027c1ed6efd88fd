"""A run's ledger is found, and shown as a table."""

import math
from pathlib import Path
from typing import Any

import pytest

from mora_ds.adapters.ops.mora import delta_weight
from mora_ds.checkpoint.layout import find_ledger
from mora_ds.common.errors import UserError
from mora_ds.eval.ledger_summary import show_lines, summarize
from mora_ds.remora.ledger import Ledger
from tests.helpers.exports import FakeRun

# -- find and show ---------------------------------------------------------------------------------------------------


def test_every_folder_of_a_run_leads_to_its_ledger(original: FakeRun, tmp_path: Path):
    latest = original.output / "checkpoints" / "latest"
    of_run = find_ledger(original.output)
    assert (of_run.ledger, of_run.checkpoint) == (original.output / "ledger", None)
    assert find_ledger(original.output / "ledger").checkpoint is None
    for path in (original.checkpoint, latest):
        assert find_ledger(path).checkpoint == original.checkpoint.resolve()
    paths = (original.output, original.output / "ledger", latest, original.checkpoint / "ledger")
    assert {find_ledger(path).reference for path in paths} == {original.checkpoint.resolve()}
    with pytest.raises(UserError, match="holds no ledger"):
        find_ledger(tmp_path)


def test_summary_is_that_of_the_formed_deltas(original: FakeRun):
    ledger = find_ledger(original.output).open()
    summaries = summarize(ledger)
    for cycle, summary in enumerate(summaries):
        entries = ledger.layers(cycle)
        squares = {name: ledger.square(cycle, name).double() for name in entries}
        deltas = {name: delta_weight(entries[name].operator, square) for name, square in squares.items()}
        assert summary.square_energy == pytest.approx(energy_of(squares), rel=1e-6)
        assert summary.delta_energy == pytest.approx(energy_of(deltas), rel=1e-6)
        assert (summary.cycle, summary.step, summary.layers) == (cycle, ledger.records[cycle].step, len(entries))
        assert summary.nbytes == (ledger.folder / ledger.records[cycle].file).stat().st_size


def energy_of(matrices: dict[str, Any]) -> float:
    return sum(matrix.square().sum().item() for matrix in matrices.values())


def test_a_layer_counts_in_the_cycles_that_merged_it(original: FakeRun, tmp_path: Path):
    source = find_ledger(original.output).open()
    ledger = Ledger.create(tmp_path / "ledger", "f" * 64)
    first, second = list(source.layers(0))[:2]
    for cycle, names in enumerate(((first,), (second,), (first, second))):
        entries = {name: source.layers(cycle)[name] for name in names}
        ledger.append(cycle, entries, [(name, source.square(cycle, name)) for name in names])
    cycles = summarize(ledger)
    assert [cycle.layers for cycle in cycles] == [1, 1, 2]
    for cycle, name in ((0, first), (1, second)):
        assert cycles[cycle].square_energy == pytest.approx(energy_of({name: source.square(cycle, name).double()}))


def test_table(original: FakeRun, tmp_path: Path):
    ledger = find_ledger(original.output).open()
    lines = show_lines(ledger)
    second = summarize(ledger)[1]
    assert "3 cycle(s)" in lines[0]
    assert len(lines) == 6
    assert lines[3].split()[:3] == ["1", "2", "7"]
    assert f"{math.sqrt(second.delta_energy):.4e}" in lines[3]
    assert "truncate/permuted" in lines[3]
    assert len(show_lines(Ledger.create(tmp_path / "empty", "f" * 64))) == 1
