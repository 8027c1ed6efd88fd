"""Offline work on ledgers: tables, verification, leaving cycles out, folding them into a new base."""

from __future__ import annotations

import math
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mora_ds.adapters.ops.delta import live_weight
from mora_ds.adapters.ops.mora import delta_weight
from mora_ds.checkpoint.adapter_files import read_adapter
from mora_ds.checkpoint.folder import resume_checkpoint
from mora_ds.checkpoint.layout import find_ledger
from mora_ds.checkpoint.ledger_tools import drop, verify
from mora_ds.common.errors import RunError, UserError
from mora_ds.deploy.export import export_merged
from mora_ds.eval.ledger_summary import show_lines, summarize
from mora_ds.models.base import BaseCheckpoint
from mora_ds.remora import ledger as ledger_room
from mora_ds.remora.ledger import Ledger
from tests.helpers.damage import change_json
from tests.helpers.exports import FakeRun, Killed, contents, fake_run, step_of

TOOL = Path(__file__).resolve().parents[2] / "tools" / "ledger.py"


# -- find and show ---------------------------------------------------------------------------------------------------


def test_every_folder_of_a_run_leads_to_its_ledger(original: FakeRun, tmp_path: Path) -> None:
    latest = original.output / "checkpoints" / "latest"
    of_run = find_ledger(original.output)
    assert (of_run.ledger, of_run.checkpoint) == (original.output / "ledger", None)
    assert find_ledger(original.output / "ledger").checkpoint is None
    for path in (original.checkpoint, latest):
        assert find_ledger(path).checkpoint == original.checkpoint.resolve()
    places = (original.output, original.output / "ledger", latest, original.checkpoint / "ledger")
    assert {find_ledger(path).reference for path in places} == {original.checkpoint.resolve()}
    with pytest.raises(UserError, match="holds no ledger"):
        find_ledger(tmp_path)


def test_summary_is_that_of_the_formed_deltas(original: FakeRun) -> None:
    ledger = find_ledger(original.output).open()
    found = summarize(ledger)
    totals = dict.fromkeys(ledger.layers(0), 0.0)
    for cycle, each in enumerate(found):
        entries = ledger.layers(cycle)
        squares = {name: ledger.square(cycle, name).double() for name in entries}
        deltas = {name: delta_weight(entries[name].operator, square) for name, square in squares.items()}
        totals = {name: totals[name] + delta for name, delta in deltas.items()}
        assert each.square_energy == pytest.approx(energy_of(squares), rel=1e-6)
        assert each.delta_energy == pytest.approx(energy_of(deltas), rel=1e-6)
        assert each.sum_energy == pytest.approx(energy_of(totals), rel=1e-6)
        assert (each.cycle, each.step, each.layers) == (cycle, ledger.records[cycle].step, len(entries))
        assert each.nbytes == (ledger.folder / ledger.records[cycle].file).stat().st_size


def energy_of(matrices: dict[str, Any]) -> float:
    return sum(matrix.square().sum().item() for matrix in matrices.values())


def test_sums_count_a_layer_that_a_cycle_left_out(original: FakeRun, tmp_path: Path) -> None:
    source = find_ledger(original.output).open()
    ledger = Ledger.create(tmp_path / "ledger", "f" * 64)
    first, second = list(source.layers(0))[:2]
    for cycle, names in enumerate(((first,), (second,), (first, second))):
        entries = {name: source.layers(cycle)[name] for name in names}
        ledger.append(cycle, entries, [(name, source.square(cycle, name)) for name in names])
        if cycle == 1:
            last = summarize(ledger)[1]
    found = summarize(ledger)
    assert last.sum_energy == pytest.approx(found[1].sum_energy), "whether or not there are later cycles"
    assert found[1].sum_energy == pytest.approx(found[0].delta_energy + found[1].delta_energy)
    assert [each.layers for each in found] == [1, 1, 2]


def test_table(original: FakeRun, tmp_path: Path) -> None:
    ledger = find_ledger(original.output).open()
    lines, second = show_lines(ledger), summarize(ledger)[1]
    assert "3 cycle(s)" in lines[0] and len(lines) == 6
    assert lines[3].split()[:3] == ["1", "2", "7"] and f"{math.sqrt(second.delta_energy):.4e}" in lines[3]
    assert "truncate/permuted" in lines[3]
    assert len(show_lines(Ledger.create(tmp_path / "empty", "f" * 64))) == 1


# -- verify ----------------------------------------------------------------------------------------------------------


def test_whole_ones_verify(original: FakeRun, tmp_path: Path) -> None:
    assert len(verify(original.output)) == 1
    lines = verify(original.checkpoint, original.base)
    assert len(lines) == 3 and "is the base" in lines[2]
    with pytest.raises(UserError, match=r"--base: .* is not the base of"):
        verify(original.output, fake_base(tmp_path / "other"))


def fake_base(folder: Path) -> Path:
    return fake_run(folder, num_hidden_layers=1, hidden_size=16, probe=False, cycles=0).base


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 16
    path.unlink()  # hard links: the other ledger keeps its bytes
    path.write_bytes(content)


def two_files(output: Path) -> None:
    flip(output / "ledger" / "cycle-00000.safetensors")
    (output / "ledger" / "cycle-00002.safetensors").unlink()


@pytest.mark.parametrize(
    "damage, path, words",
    [
        (two_files, "", ["cycle-00000.safetensors is damaged", "cycle-00002.safetensors is missing"]),
        (
            lambda out: change_json(out / "ledger" / "ledger.json", lambda content: content["cycles"].pop(1)),
            "ledger",
            ["hole: cycle 1 is missing"],
        ),
        (
            lambda out: change_json(
                out / "ledger" / "ledger.json", lambda content: content["cycles"][1].update(chain="0" * 64)
            ),
            "ledger",
            ["chain of hashes is broken at cycle 1"],
        ),
        (lambda out: flip(step_of(out) / "adapter.safetensors"), "checkpoints/latest", ["adapter.safetensors"]),
        (lambda out: flip(step_of(out) / "ledger" / "cycle-00001.safetensors"), "checkpoints/latest", ["cycle-00001"]),
    ],
)
def test_all_damage_is_told(copied: Path, damage: Callable[[Path], None], path: str, words: list[str]) -> None:
    damage(copied)
    with pytest.raises(RunError) as caught:
        verify(copied / path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + len(words)
    assert all(word in line for word, line in zip(words, lines[1:], strict=True))


def test_checkpoint_of_another_cycle_or_base_is_told(copied: Path) -> None:
    step = step_of(copied)
    (step / "manifest.json").unlink()
    kept = (step / "adapter.json").read_bytes()
    change_json(step / "adapter.json", lambda content: content.update(cycle=2))
    with pytest.raises(RunError, match=r"has 3 cycles, but .*adapter\.json was written in cycle 2"):
        verify(step)
    (step / "adapter.json").write_bytes(kept)
    change_json(step / "base.json", lambda content: content.update(fingerprint="e" * 64))
    with pytest.raises(RunError, match="belongs to another base"):
        verify(step)
    (step / "adapter.safetensors").unlink()
    with pytest.raises(RunError, match=r"adapter\.safetensors is missing"):
        verify(step)


def test_square_that_is_not_finite_is_told(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger.open(copied / "ledger")
    entries = ledger.layers(0)
    squares = {name: torch.full_like(ledger.square(0, name), float("nan")) for name in entries}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "isfinite", lambda tensor: torch.ones(1, dtype=torch.bool))
        ledger.append(9, entries, squares.items())
    with pytest.raises(RunError, match=r"cycle-00003\.safetensors: the MoRA matrix of .* is not finite"):
        verify(copied)


# -- drop ------------------------------------------------------------------------------------------------------------


def test_ledger_without_a_cycle(original: FakeRun, tmp_path: Path) -> None:
    before = contents(original.output)
    lines = drop(original.output, [1], tmp_path / "new" / "ledger")
    assert "kept 2 of 3 cycles: 0, 2" in lines[0] and contents(original.output) == before
    old, new = Ledger.open(original.output / "ledger"), Ledger.open(tmp_path / "new" / "ledger")
    assert [(record.cycle, record.step) for record in new.records] == [(0, 1), (1, 3)]
    assert new.base_fingerprint == old.base_fingerprint and new.records[0] == old.records[0]
    for cycle, source in enumerate((0, 2)):
        assert new.layers(cycle) == old.layers(source)  # seeds of the permutations among them
        for name in new.layers(cycle):
            assert torch.equal(new.square(cycle, name), old.square(source, name))
    assert len(verify(tmp_path / "new" / "ledger", original.base)) == 2


def test_model_without_a_cycle(original: FakeRun, tmp_path: Path) -> None:
    """From a checkpoint comes what export takes: live squares, trained tensors, and the base's place."""
    drop(original.checkpoint, [0, 2], tmp_path / "without")
    report = export_merged(tmp_path / "without", tmp_path / "merged")
    assert report.cycles == 1 and read_adapter(tmp_path / "without").facts["dropped_cycles_of_steps"] == [1, 3]
    merged, ledger = load_file(tmp_path / "merged" / "model.safetensors"), Ledger.open(original.checkpoint / "ledger")
    base = BaseCheckpoint.open(original.base)
    for name, entry in original.adapter.layers.items():
        updates = [(ledger.layers(1)[name].operator, ledger.square(1, name)), (entry.operator, original.squares[name])]
        expected = live_weight(base.read(entry.weight), updates, False, torch.float32)
        assert torch.equal(merged[entry.weight], expected)
    assert torch.equal(merged["model.norm.weight"], original.expected["model.norm.weight"])


def test_in_place_keeps_the_old_one_beside(copied: Path) -> None:
    before = contents(copied / "ledger")
    assert "backup-1" in drop(copied, [0], in_place=True)[1]
    drop(copied / "ledger", [1], in_place=True)
    assert [record.step for record in Ledger.open(copied / "ledger").records] == [2]
    assert contents(copied / "ledger.backup-1") == before
    assert [record.step for record in Ledger.open(copied / "ledger.backup-2").records] == [2, 3]
    assert not [path for path in copied.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "path, cycles, output, words",
    [
        ("", [3], "new", "--cycles 3: .* has cycles 0 to 2"),
        ("", [-1, 0], "new", "--cycles -1: "),
        ("", [0], "", "--output .* exists already"),
        ("checkpoints/latest", [0], None, "--in_place: .* belongs to a checkpoint"),
        ("checkpoints/step-000007/ledger", [0], None, "--in_place: .* belongs to a checkpoint"),
    ],
)
def test_drop_refuses(copied: Path, path: str, cycles: list[int], output: str | None, words: str) -> None:
    before = contents(copied)
    with pytest.raises(UserError, match=words):
        drop(copied / path, cycles, None if output is None else copied / output, in_place=output is None)
    assert contents(copied) == before


def test_a_second_drop_adds_to_the_record_of_the_first(original: FakeRun, tmp_path: Path) -> None:
    drop(original.checkpoint, [1], tmp_path / "one")
    drop(tmp_path / "one", [1], tmp_path / "two")
    assert read_adapter(tmp_path / "two").facts["dropped_cycles_of_steps"] == [2, 3]
    assert Ledger.open(tmp_path / "two" / "ledger").cycles == read_adapter(tmp_path / "two").cycle == 1


def test_a_link_is_no_new_folder(original: FakeRun, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--output .*link exists already"):
        drop(original.output, [0], tmp_path / "link")
    drop(original.output, [0], tmp_path / "empty")
    assert Ledger.open(tmp_path / "empty").cycles == 2


@pytest.mark.parametrize("in_place", [False, True])
def test_killed_drop_leaves_all_as_it_was(copied: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool) -> None:
    before = contents(copied / "ledger")
    real, calls = ledger_room._write_cycle, []

    def kill(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise Killed
        real(*arguments)

    monkeypatch.setattr(ledger_room, "_write_cycle", kill)
    with pytest.raises(Killed):
        drop(copied, [0], None if in_place else copied / "new", in_place)
    assert contents(copied / "ledger") == before and not (copied / "new").exists()


def test_resume_does_not_take_these_for_checkpoints(original: FakeRun, tmp_path: Path) -> None:
    """They have no engine to go on with."""
    drop(original.checkpoint, [0], tmp_path / "new")
    with pytest.raises(UserError, match="no checkpoint at"):
        resume_checkpoint(str(tmp_path / "new"), tmp_path)


# -- the tool --------------------------------------------------------------------------------------------------------


def tool(monkeypatch: pytest.MonkeyPatch, *command: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *command])
    runpy.run_path(str(TOOL))["main"]()


def test_tool(copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(copied)
    commands = {
        ("show", "."): "rotate/permuted",
        ("verify", "checkpoints/latest", "--base", "../base"): "is the base",
        ("drop", ".", "--cycles", "0", "1", "--output", "new"): "kept 1 of 3",
        ("compact", ".", "--output", "folded", "--first", "2"): "bit for bit",
        ("drop", "ledger", "--cycles", "2", "--in_place"): "kept 2 of 3",
    }
    for command, words in commands.items():
        tool(monkeypatch, *command)
        assert words in capsys.readouterr().out
    found = [Ledger.open(copied / name).cycles for name in ("new", "folded/ledger", "ledger")]
    assert found == [1, 1, 2]


def test_tool_exits_with_1_for_damage(copied: Path) -> None:
    flip(copied / "ledger" / "cycle-00001.safetensors")
    command = [sys.executable, str(TOOL), "verify", str(copied)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "cycle-00001.safetensors is damaged" in done.stderr
