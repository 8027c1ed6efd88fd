"""Spectra: algebra against the decomposition of the formed matrices, rank growth, and what
is written.
"""

import json
from dataclasses import asdict, replace

import pytest
import torch

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.ops.lora import LoRASpec
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from mora_ds.checkpoint.adapter_files import AdapterFile, BaseReference, write_adapter
from mora_ds.checkpoint.layout import find_ledger
from mora_ds.remora.ledger import LayerEntry, Ledger
from mora_ds.research.spectrum import layer_spectra, spectra, spectrum_lines
from tests.helpers.errors import user_error
from tests.helpers.mistakes import command
from tests.helpers.operators import random
from tests.helpers.tables import rows


def mora_matrix(side, seed=0):
    return random(side, side, seed=seed).float()


# -- a layer's history -----------------------------------------------------------------


OPERATORS = """
truncate | plain
share | strided
decouple | permuted
rotate | permuted
"""


@pytest.mark.parametrize("kind, grouping", rows(OPERATORS))
def test_history_equals_that_of_the_summed_deltas(kind, grouping):
    spec = OperatorSpec(kind, 18, 23, 6, grouping)
    updates = [
        (replace(spec, seed=seed), mora_matrix(6, seed) / (seed + 1))
        for seed in range(3)
    ]
    total = torch.zeros(23, 18, dtype=torch.float64)
    for cycle, spectrum in enumerate(layer_spectra(updates)):
        operator, value = updates[cycle]
        newest = operator.delta_weight(value.double())
        new_span = expected_span(newest, total) if cycle else 1.0
        assert spectrum.new_span == pytest.approx(new_span, abs=1e-6)
        total += newest
        values = torch.linalg.svdvals(total)
        assert spectrum.rank == int((values > values[0] * 1e-5).sum())
        energy = values.square().sum() / values[0] ** 2
        assert spectrum.stable_rank == pytest.approx(energy.item())


def test_zeros_have_no_rank():
    spec = OperatorSpec(OperatorKind.TRUNCATE, 18, 23, 6)
    first, second = layer_spectra([(spec, torch.zeros(6, 6)), (spec, mora_matrix(6))])
    assert set(vars(first).values()) == {0}
    assert (second.rank, second.new_span) == (6, 1.0)


def expected_span(newest, earlier):
    left, values, right = torch.linalg.svd(earlier)
    rank = int((values > values[0] * 1e-5).sum())
    inside = left[:, :rank] @ left[:, :rank].T @ newest @ right[:rank].T @ right[:rank]
    return 1 - (inside.norm() / newest.norm()).square().item()


def test_factors_of_lora_have_spectra_too():
    spec = LoRASpec(12, 10, 3, 6.0)
    updates = [(spec, random(*spec.adapter_weight_shape, seed=seed)) for seed in (0, 1)]
    first, second = layer_spectra(updates)
    assert [first.rank, second.rank] == [3, 6]


# -- a ledger --------------------------------------------------------------------------


def entries(cycle, names):
    spec = OperatorSpec(OperatorKind.SHARE, 32, 24, 6, Grouping.PERMUTED, cycle)
    return {name: LayerEntry(name, False, spec) for name in names}


@pytest.fixture
def checkpoint(tmp_path):
    """Two merged cycles, the second with a layer more, and live MoRA matrices."""
    folder = tmp_path / "step"
    ledger = Ledger.create(folder / "ledger", "f" * 64)
    for cycle, names in enumerate((("a.q",), ("a.q", "a.v"))):
        mora_matrices = [(name, mora_matrix(6, cycle)) for name in names]
        ledger.append(10 * cycle + 10, entries(cycle, names), mora_matrices)
    live = entries(2, ("a.q", "a.v"))
    adapter = AdapterFile(live, MoRAConfig(), "float32", 2, 25)
    write_adapter(folder, adapter, {name: mora_matrix(6, 2) for name in live}, {})
    BaseReference("base", "f" * 64, {}, "float32").write(folder)
    return folder


def test_last_rows_of_a_checkpoint_are_its_current_mora_matrices(checkpoint):
    table = list(spectra(find_ledger(checkpoint)))
    cycles = [(row.layer, row.cycle) for row in table]
    assert cycles == [("a.q", 0), ("a.q", 1), ("a.q", 2), ("a.v", 1), ("a.v", 2)]
    assert [row.step for row in table] == [10, 20, 25, 20, 25]
    assert [row.is_live for row in table] == [row.cycle == 2 for row in table]
    updates = [
        (entries(n, ("a.q",))["a.q"].operator, mora_matrix(6, n)) for n in range(3)
    ]
    assert [row.spectrum for row in table[:3]] == list(layer_spectra(updates))
    assert not any(row.is_live for row in spectra(find_ledger(checkpoint / "ledger")))


def test_layers_are_chosen_by_pattern(checkpoint, tmp_path):
    assert {row.layer for row in spectra(find_ledger(checkpoint), "*.v")} == {"a.v"}
    with user_error(
        r"--layers 'a\.k' matches none of the 2 layers\. Did you mean 'a\.[qv]'"
    ):
        next(spectra(find_ledger(checkpoint), "a.k"))
    with user_error("nothing was merged yet"):
        next(spectra(find_ledger(Ledger.create(tmp_path / "empty", "f").folder)))


def test_the_table_has_a_line_for_each_layer_and_cycle(checkpoint):
    table = list(spectra(find_ledger(checkpoint)))
    _, *cells = (line.split() for line in spectrum_lines(table))
    assert [" ".join(line[:3]) for line in cells[:3]] == [
        "a.q 0 10",
        "a.q 1 20",
        "a.q 2* 25",
    ]
    assert cells[2][3:5] == [str(table[2].spectrum.rank), "24"]


def test_command_prints_spectra(checkpoint, tmp_path, capsys):
    flags = f"{checkpoint} --json {tmp_path}/out.json --layers a.*"
    assert command("spectrum", flags.split()) == (0, "")
    assert "a.v" in capsys.readouterr().out
    content = json.loads((tmp_path / "out.json").read_text())
    assert content == [asdict(row) for row in spectra(find_ledger(checkpoint))]


def test_a_file_that_cannot_be_written_is_named(checkpoint):
    code, message = command(
        "spectrum", [str(checkpoint), "--json", "/nowhere/new.json"]
    )
    assert code == 2
    assert "folder that you can write to" in message
