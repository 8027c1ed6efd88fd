"""The ledger: what it holds, which files it refuses, what a kill leaves, and the one
function that computes merged weights.
"""

import errno
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
from safetensors import safe_open

from mora_ds.adapters.ops.mora import OperatorSpec, delta_weight
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from mora_ds.adapters.ops.updates import merged_weight
from mora_ds.checkpoint.sections import LedgerSection
from mora_ds.common import files
from mora_ds.common.files import read_json
from mora_ds.remora import ledger as ledger_room
from mora_ds.remora.ledger import LayerEntry, Ledger
from tests.helpers.damage import change_json, cut, flip, gone, set_value
from tests.helpers.errors import run_error, user_error
from tests.helpers.ledgers import entry, layers_of, mora_matrices_for, shortened
from tests.helpers.operators import assert_same_bits_for_every_number_of_threads
from tests.helpers.tables import each_row

BASE = "f" * 64
original = ledger_room.layers_to_dict


def append(ledger, modules=("a.q", "a.v")):
    layers = layers_of(ledger.cycles, modules)
    ledger.append(
        100 * (ledger.cycles + 1),
        layers,
        mora_matrices_for(layers, ledger.cycles).items(),
    )


@pytest.fixture
def folder(tmp_path):
    ledger = Ledger.create(tmp_path / "ledger", BASE)
    for _ in range(3):
        append(ledger)
    return ledger.folder


def state(ledger):
    pairs = [
        pair for module in ("a.q", "a.v") for pair in ledger.mora_matrices_of(module)
    ]
    return [(spec, mora_matrix.flatten().tolist()) for spec, mora_matrix in pairs]


# -- contents --------------------------------------------------------------------------


def test_mora_matrices_are_read_in_the_order_of_cycles(folder):
    ledger = Ledger.open(folder, BASE)
    assert ledger.cycles == 3
    for cycle, (spec, mora_matrix) in enumerate(ledger.mora_matrices_of("a.v")):
        assert spec == layers_of(cycle)["a.v"].operator
        assert torch.equal(
            mora_matrix, mora_matrices_for(layers_of(cycle), cycle)["a.v"]
        )
    assert ledger.layers(1) == layers_of(1)
    assert [record.step for record in ledger.records] == [100, 200, 300]


def test_file_format(folder):
    """The keys of ledger.json."""
    content = read_json(folder / "ledger.json")
    assert (content["format"], content["base_fingerprint"]) == (files.FORMAT, BASE)
    assert set(content["cycles"][0]) == {
        "cycle",
        "step",
        "file",
        "sha256",
        "size",
        "chain",
    }
    chain = BASE
    for record in content["cycles"]:
        chain = hashlib.sha256((chain + record["sha256"]).encode()).hexdigest()
        assert record["chain"] == chain
    with safe_open(str(folder / "cycle-00002.safetensors"), "pt") as handle:
        assert set(handle.keys()) == {"a.q.mora_matrix", "a.v.mora_matrix"}
        metadata = handle.metadata()
    assert (metadata["cycle"], metadata["step"]) == ("2", "300")
    assert json.loads(metadata["layers"])["a.q"]["weight"] == "a.q.weight"


def test_a_layer_may_start_at_a_later_cycle(tmp_path):
    ledger = Ledger.create(tmp_path / "ledger", BASE)
    append(ledger)
    append(ledger, ("a.q", "b.q"))
    for module, cycles in {"a.q": 2, "a.v": 1, "b.q": 1, "none": 0}.items():
        assert len(list(ledger.mora_matrices_of(module))) == cycles


def test_a_layer_keeps_its_shape(folder):
    ledger = Ledger.open(folder)
    layers = layers_of(3)
    operator = replace(layers["a.q"].operator, d_in=64)
    layers["a.q"] = LayerEntry("a.q", False, operator)
    ledger.append(400, layers, mora_matrices_for(layers, 3).items())
    assert len(list(ledger.mora_matrices_of("a.v"))) == 4
    with user_error("cycle-00003.*a.q is another layer than in earlier cycles"):
        list(ledger.mora_matrices_of("a.q"))


def test_a_snapshot_stays_as_it_is(folder):
    ledger = Ledger.open(folder)
    snapshot = ledger.snapshot()
    append(ledger)
    assert (snapshot.cycles, ledger.cycles) == (3, 4)


def test_a_checkpoint_holds_the_cycles_of_its_own_step(folder):
    """Although a merge comes before its ledger is written in the background."""
    ledger = Ledger.open(folder)
    remora = SimpleNamespace(ledger=ledger, sums=SimpleNamespace(keep=""))
    gathered = LedgerSection(cast(Any, remora)).gather(300)
    append(ledger)
    written = mock.Mock()
    gathered.write(written)
    assert [call.args[0] for call in written.put.call_args_list] == [
        f"ledger/cycle-{cycle:05}.safetensors" for cycle in range(3)
    ]
    assert len(written.json.call_args.args[1]["cycles"]) == 3


# -- what it refuses -------------------------------------------------------------------


def exchange(first):
    """Exchanges the file with that of the last cycle."""
    last = first.with_name("cycle-00002.safetensors")
    content = first.read_bytes()
    first.write_bytes(last.read_bytes())
    last.write_bytes(content)


@pytest.mark.parametrize(
    "damage, file, words",
    [
        (flip, "cycle-00001.safetensors", " is damaged: its sha256"),
        (exchange, "cycle-00000.safetensors", ""),
        (cut, "cycle-00001.safetensors", r" has \d+ bytes"),
        (gone, "cycle-00002.safetensors", " is missing"),
        (gone, "ledger.json", " is missing"),
        (cut, "ledger.json", " is damaged"),
    ],
)
def test_damage_is_found_and_named(folder, damage, file, words):
    damage(folder / file)
    with user_error(f"{folder / file}{words}"):
        Ledger.open(folder)


HOLES = f"""
cycles.1 | hole: cycle 1 is missing
cycles.0 | hole: cycle 0 is missing
cycles.1.cycle = 2 | hole: cycle 1 is missing
cycles.1.file = cycle-00000.safetensors | hole: cycle 1 is missing
cycles.1.size | ledger.json is damaged
format = 2 | format 2
base_fingerprint = {"e" * 64} | chain of hashes is broken at cycle 0
cycles.1.sha256 = "{"0" * 64}" | broken at cycle 1
"""


@each_row("change, words", HOLES)
def test_a_ledger_file_with_a_wrong_value_is_named(folder, change, words):
    change_json(folder / "ledger.json", lambda content: set_value(content, change))
    with user_error(words) as caught:
        Ledger.open(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("hashes", [True, False])
@pytest.mark.parametrize(
    "recorded, words",
    [
        (layers_of(0, ("a.q",)), " does not hold the matrices that its header lists"),
        (
            {name: entry(name, 0, r_hat=8) for name in ("a.q", "a.v")},
            r": a\.q\.mora_matrix is not fp32 \(8, 8\)",
        ),
    ],
)
def test_matrices_that_are_not_those_of_the_header_are_named(
    tmp_path, monkeypatch, hashes, recorded, words
):
    """At the latest when the cycle is read."""
    monkeypatch.setattr(ledger_room, "layers_to_dict", lambda _: original(recorded))
    ledger = Ledger.create(tmp_path / "ledger", BASE)
    append(ledger)
    with user_error(rf"cycle-00000\.safetensors{words}"):
        list(Ledger.open(ledger.folder, hashes=hashes).mora_matrices_of("a.q"))


def test_another_base_is_refused(folder):
    with user_error("belongs to another base"):
        Ledger.open(folder, "e" * 64)


def test_a_new_ledger_takes_the_place_of_another_and_leaves_other_files(folder):
    (folder / "notes.txt").touch()
    with user_error("already holds the ledger of a run"):
        Ledger.create(folder, BASE)
    assert Ledger.create(folder, BASE, replace=True).cycles == 0
    assert {path.name for path in folder.iterdir()} == {"ledger.json", "notes.txt"}
    assert Ledger.open(folder, BASE).cycles == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_mora_matrix_that_is_not_finite_is_not_merged(folder, bad):
    ledger = Ledger.open(folder)
    layers = layers_of(3)
    mora_matrices = mora_matrices_for(layers, 3)
    mora_matrices["a.v"][0, 0] = bad
    with run_error(r"a\.v\.mora_matrix is not finite"):
        ledger.append(400, layers, mora_matrices.items())
    assert ledger.cycles == 3
    assert Ledger.open(folder).cycles == 3


def test_a_cycle_whose_line_is_not_written_is_none(folder, monkeypatch):
    ledger = Ledger.open(folder)
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with monkeypatch.context() as patched, run_error("is full"):
        patched.setattr(ledger_room, "write_compact_json", full)
        append(ledger)
    assert ledger.cycles == 3
    append(ledger)
    assert Ledger.open(folder).cycles == 4


def test_a_cycle_that_another_process_has_appended_is_waited_for(folder, monkeypatch):
    waited = []
    monkeypatch.setattr(ledger_room, "await_file", lambda *facts: waited.append(facts))
    ledger = Ledger.open(folder)
    ledger.follow(400, "a" * 64, 7)
    assert waited == [(folder / "cycle-00003.safetensors", 7)]
    assert ledger.cycles == 4


# -- kills -----------------------------------------------------------------------------


class Killed(BaseException):
    pass


def test_process_killed_while_writing(folder):
    """A real one: nothing is cleaned up, and the half-written file is in nobody's way. One
    that dies with a complete file which no ledger names: tests/train/test_kill.py.
    """
    child = os.fork()
    if child == 0:

        def mora_matrices():
            yield "a.q", torch.ones(6, 6)
            os._exit(9)

        Ledger.open(folder).append(400, layers_of(3), mora_matrices())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (folder / ".cycle-00003.safetensors.partial").exists()
    ledger = Ledger.open(folder)
    append(ledger)
    assert Ledger.open(folder).cycles == 4
    assert not list(folder.glob(".*partial"))


# -- copies ----------------------------------------------------------------------------


def test_copy_is_made_of_links_and_lives_on_its_own(folder, tmp_path):
    ledger = Ledger.open(folder)
    copy = ledger.copy_to(tmp_path / "copy")
    first = "cycle-00000.safetensors"
    assert (copy.folder / first).samefile(folder / first)
    append(shortened(folder, 1), ("b.q",))
    assert Ledger.open(copy.folder, BASE).cycles == 3
    assert Ledger.open(folder).cycles == 2
    assert set(Ledger.open(copy.folder).layers(1)) == {"a.q", "a.v"}


def test_copy_on_another_disk_is_hashed(folder, tmp_path, monkeypatch):
    def another_disk(source, target):
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", another_disk)
    assert state(Ledger.open(folder).copy_to(tmp_path / "copy")) == state(
        Ledger.open(folder)
    )

    def copy_wrongly(source, target):
        Path(target).write_bytes(Path(source).read_bytes())
        flip(Path(target))

    monkeypatch.setattr(shutil, "copyfile", copy_wrongly)
    with user_error("the ledger is damaged at cycle 0.*sha256"):
        Ledger.open(folder).copy_to(tmp_path / "wrong")
    assert Ledger.open(tmp_path / "wrong").cycles == 0


def test_copy_replaces_a_longer_ledger(folder, tmp_path):
    Ledger.open(folder).copy_to(tmp_path / "checkpoint")
    short = shortened(tmp_path / "checkpoint", 2)
    run = Ledger.open(folder)
    append(run, ("a.q",))
    short.copy_to(folder)
    assert state(Ledger.open(folder)) == state(short)
    assert len(list(folder.glob("cycle-*"))) == 2
    assert short.copy_to(short.folder).cycles == Ledger.open(short.folder).cycles == 2


def test_copy_killed_half_way_leaves_a_valid_ledger(folder, tmp_path, monkeypatch):
    another = Ledger.create(tmp_path / "other", BASE)
    append(another, ("c.q",))

    def kill(source, target):
        files.link_or_copy(source, target)
        raise Killed

    monkeypatch.setattr(ledger_room, "link_or_copy", kill)
    with pytest.raises(Killed):
        Ledger.open(folder).copy_to(another.folder)
    assert Ledger.open(another.folder, BASE).cycles == 0


# -- merged weights --------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored_as_fp32", [False, True])
def test_merged_weight_is_the_sum_in_order_rounded_once(
    transposed, dtype, stored_as_fp32
):
    """An original that is stored in fp32 is not rounded to the run's dtype before the
    deltas are added.
    """
    generator = torch.Generator().manual_seed(0)
    specs = [
        OperatorSpec(kind, 20, 12, 6, Grouping.PERMUTED, i)
        for i, kind in enumerate(OperatorKind)
    ]
    updates = [(spec, torch.randn(6, 6, generator=generator)) for spec in specs]
    original = torch.randn((20, 12) if transposed else (12, 20), generator=generator)
    original = original if stored_as_fp32 else original.to(dtype)
    before = original.clone()
    expected = original.float()
    for spec, mora_matrix in updates:
        delta = delta_weight(spec, mora_matrix)
        expected = expected + (delta.T if transposed else delta)
    live = merged_weight(original, iter(updates), transposed, dtype)
    assert live.dtype == dtype
    assert torch.equal(live, expected.to(dtype))
    assert torch.equal(original, before)
    assert torch.equal(
        merged_weight(original, [], transposed, dtype), original.to(dtype)
    )
    assert (
        merged_weight(original, [], transposed, dtype).data_ptr() != original.data_ptr()
    )


def test_merged_weight_has_the_same_bits_for_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    specs = [
        OperatorSpec(kind, 700, 500, 94, Grouping.PERMUTED, 7) for kind in OperatorKind
    ]
    updates = [(spec, torch.randn(94, 94, generator=generator)) for spec in specs]
    original = torch.randn(500, 700, generator=generator)
    assert_same_bits_for_every_number_of_threads(
        lambda: merged_weight(original, updates, False, torch.float32)
    )
