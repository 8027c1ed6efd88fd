"""Folding cycles of a merge ledger into a new base."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mora_ds.adapters.ops.delta import live_weight
from mora_ds.checkpoint import compact as compact_room
from mora_ds.checkpoint.adapter_files import BaseReference, read_adapter
from mora_ds.checkpoint.compact import compact
from mora_ds.checkpoint.ledger_tools import verify
from mora_ds.common.errors import UserError
from mora_ds.common.files import write_manifest
from mora_ds.deploy.export import export_merged
from mora_ds.models.base import BaseCheckpoint
from mora_ds.remora.ledger import Ledger
from tests.helpers.exports import FakeRun, Killed, contents, fake_run, step_of


@pytest.mark.parametrize(
    "family, stored, dtype, first, shard",
    [
        ("llama", torch.float32, "float32", 1, 5.0),
        ("llama", torch.bfloat16, "bfloat16", 2, 3e-5),
        ("gpt2", torch.float16, "float16", None, 5.0),
    ],
)
def test_compacted_and_original_give_the_same_model(
    family: str, stored: torch.dtype, dtype: str, first: int | None, shard: float, tmp_path: Path
) -> None:
    """Bit for bit, through export, and with the logits that the live model had."""
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    run = fake_run(tmp_path, family, stored=stored, dtype=dtype, cycles=3, **{layers: 1})
    lines = compact(run.checkpoint, tmp_path / "new", first, max_shard_gib=shard)
    assert "bit for bit" in lines[2]
    old = export_merged(run.checkpoint, tmp_path / "old-merged", max_shard_gib=5.0)
    new = export_merged(tmp_path / "new", tmp_path / "new-merged", verify=True)
    assert new.cycles == 3 - (first or 3) and old.cycles == 3 and old.dtype == new.dtype == dtype
    expected, found = (load_file(folder / "model.safetensors") for folder in (old.output, new.output))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert len(list((tmp_path / "new" / "base").glob("*.safetensors"))) == (1 if shard == 5.0 else 3)
    assert json.loads((tmp_path / "new" / "base" / "config.json").read_text())["dtype"] == "float32"
    assert len(verify(tmp_path / "new", tmp_path / "new" / "base")) == 3
    assert read_adapter(tmp_path / "new").facts["compacted_cycles_of_steps"] == [1, 2, 3][:first]


def test_what_a_checkpoint_has_beside_its_adapter_goes_along(copied: Path, tmp_path: Path) -> None:
    """The tokenizer into the new base; the state as long as the live model is the same to the bit. A second step adds
    to the record of the first."""
    (step_of(copied) / "tokenizer").mkdir()
    (step_of(copied) / "tokenizer" / "tokenizer_config.json").write_text('{"from": "run"}')
    write_manifest(step_of(copied))
    compact(step_of(copied), tmp_path / "one", 1)
    for name in ("base", "tokenizer"):
        assert "run" in (tmp_path / "one" / name / "tokenizer_config.json").read_text()
    state = (step_of(copied) / "trainer_state.json").read_bytes()
    assert (tmp_path / "one" / "trainer_state.json").read_bytes() == state
    compact(tmp_path / "one", tmp_path / "two", 1)
    assert read_adapter(tmp_path / "two").facts["compacted_cycles_of_steps"] == [1, 2]
    compact(step_of(copied), tmp_path / "rounded", dtype="bfloat16")
    assert not (tmp_path / "rounded" / "trainer_state.json").exists()


def test_a_layer_that_a_cycle_left_out(original: FakeRun, tmp_path: Path) -> None:
    source, base = Ledger.open(original.output / "ledger"), BaseCheckpoint.open(original.base)
    ledger = Ledger.create(tmp_path / "ledger", base.fingerprint())
    first, second = list(source.layers(0))[:2]
    for cycle, names in enumerate(((first,), (second,), (first, second))):
        entries = {name: source.layers(cycle)[name] for name in names}
        ledger.append(cycle, entries, [(name, source.square(cycle, name)) for name in names])
    compact(tmp_path / "ledger", tmp_path / "new", 2, base_folder=original.base)
    new = BaseCheckpoint.open(tmp_path / "new" / "base")
    for name, cycle in ((first, 0), (second, 1)):
        entry = source.layers(cycle)[name]
        updates = [(entry.operator, source.square(cycle, name))]
        expected = live_weight(base.read(entry.weight), updates, False, torch.float32)
        assert torch.equal(new.read(entry.weight), expected)


def test_new_base_stands_alone_and_can_move(original: FakeRun, tmp_path: Path) -> None:
    """From a run's own ledger: base and ledger, no checkpoint; folded again, it is what was folded at once."""
    before = contents(original.output)
    compact(original.output, tmp_path / "one", 1)
    assert not (tmp_path / "one" / "adapter.json").exists() and contents(original.output) == before
    (tmp_path / "one").rename(tmp_path / "moved")
    compact(tmp_path / "moved", tmp_path / "two")
    lines = compact(original.output, tmp_path / "at_once")
    assert "another --seed" in lines[-1]
    twice, once = (BaseCheckpoint.open(tmp_path / name / "base") for name in ("two", "at_once"))
    assert twice.fingerprint() == once.fingerprint() == Ledger.open(tmp_path / "two" / "ledger").base_fingerprint
    ledger, base = Ledger.open(original.output / "ledger"), BaseCheckpoint.open(original.base)
    for name, entry in ledger.layers(0).items():
        expected = live_weight(base.read(entry.weight), ledger.squares_of(name), False, torch.float32)
        assert torch.equal(once.read(entry.weight), expected)
    assert torch.equal(once.read("model.norm.weight"), base.read("model.norm.weight"))  # trained ones are no cycle's


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bare_ledger_needs_to_be_told_its_base(family: str, tmp_path: Path) -> None:
    run = fake_run(tmp_path, family, probe=False, cycles=1)
    bare = Ledger.open(run.checkpoint / "ledger").copy_to(tmp_path / "elsewhere" / "ledger").folder
    with pytest.raises(UserError, match="--base: name the folder"):
        compact(bare, tmp_path / "new")
    compact(bare, tmp_path / "new", base_folder=run.base)
    compact(run.checkpoint, tmp_path / "same")
    new, same = (BaseCheckpoint.open(tmp_path / name / "base").fingerprint() for name in ("new", "same"))
    assert new == same and not (tmp_path / "new" / "base.json").exists()


def test_rounding_is_told(original: FakeRun, tmp_path: Path) -> None:
    lines = compact(original.checkpoint, tmp_path / "new", dtype="bfloat16")
    told = re.search(r"relative (\S+) of the folded update is lost", lines[-2])
    assert told is not None
    new, old = BaseCheckpoint.open(tmp_path / "new" / "base"), BaseCheckpoint.open(original.base)
    ledger, lost, update = Ledger.open(original.checkpoint / "ledger"), 0.0, 0.0
    for name, entry in ledger.layers(0).items():
        exact = live_weight(old.read(entry.weight), ledger.squares_of(name), False, torch.float32).double()
        lost += (new.read(entry.weight).double() - exact).square().sum().item()
        update += (exact - old.read(entry.weight).double()).square().sum().item()
    assert float(told[1]) == pytest.approx((lost / update) ** 0.5, rel=0.01) and lost > 0
    assert not (tmp_path / "new" / "probe.safetensors").exists()  # another live model: its logits are not these


@pytest.mark.parametrize(
    "change, words",
    [
        ({"first": 4}, "--first 4: .* has 3"),
        ({"first": 0}, "--first 0"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"max_shard_gib": 0.0}, "--max_shard_gib"),
        ({"base_folder": Path("/nowhere")}, "--base: no such folder"),
    ],
)
def test_compact_refuses(original: FakeRun, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        compact(original.output, tmp_path / "new", **change)
    assert not any(tmp_path.iterdir())


def test_compact_refuses_a_weight_that_others_share(copied: Path) -> None:
    reference = BaseReference.read(step_of(copied))
    shared = {**reference.keys, "twin.weight": reference.keys["model.layers.0.mlp.up_proj.weight"]}
    BaseReference(reference.folder, reference.fingerprint, shared, "float32").write(step_of(copied))
    with pytest.raises(UserError, match=r"up_proj.weight is tied to twin\.weight"):
        compact(copied, copied / "new")


def test_killed_compact_leaves_nothing(original: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(compact_room, "copy_cycles", kill)
    with pytest.raises(Killed):
        compact(original.output, tmp_path / "new")
    assert not any(tmp_path.iterdir())
