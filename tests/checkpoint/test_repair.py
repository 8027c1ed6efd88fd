"""tools/verify_checkpoint.py --repair: a damaged cycle is replaced by any copy whose hash is on record."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from mora_ds.checkpoint.adapter_files import open_adapter
from mora_ds.checkpoint.folder import ledger_problems
from mora_ds.checkpoint.layout import complete_checkpoints
from mora_ds.checkpoint.ledger_tools import verify
from mora_ds.checkpoint.repair import repair
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.files import verify_manifest, write_manifest
from mora_ds.remora.ledger import VECTORS_FILE, Ledger
from tests.helpers.damage import HARMS, change_json, flip

CYCLE = "cycle-00001.safetensors"


def ledgers(out: Path) -> list[Path]:
    """Those of the only checkpoint and of the run."""
    (checkpoint,) = complete_checkpoints(out / "checkpoints")
    return [checkpoint / "ledger", out / "ledger"]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_ino) for path in files}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("asked", ["", "checkpoints", "checkpoints/latest"])
def test_a_damaged_cycle_is_taken_from_another_ledger_of_the_run(copied: Path, harm: str, asked: str) -> None:
    damaged, intact = ledgers(copied)
    assert not (damaged / CYCLE).samefile(intact / CYCLE), "a copied run shares nothing"
    assert repair(copied) == []
    HARMS[harm](damaged / CYCLE)
    (line,) = repair(copied / asked)
    assert line == f"{(damaged / CYCLE).resolve()}: replaced by an intact copy"
    assert verify_manifest(damaged.parent) == [] and Ledger.open(damaged).cycles == 3
    assert not (damaged / CYCLE).samefile(intact / CYCLE)


def test_a_cycle_that_all_ledgers_share_is_taken_from_a_backup(copied: Path, tmp_path: Path) -> None:
    backup = Path(shutil.copytree(copied, tmp_path / "backup", symlinks=True))
    one, other = ledgers(copied)
    (other / CYCLE).unlink()
    os.link(one / CYCLE, other / CYCLE)
    flip(one / CYCLE)
    before = contents(copied)
    with pytest.raises(RunError, match=f"name a backup with --repair FOLDER:\n.*{CYCLE} is damaged"):
        repair(copied)
    assert contents(copied) == before
    kept = contents(backup)
    assert len(repair(copied, [backup])) == 2
    assert Ledger.open(one).cycles == Ledger.open(other).cycles == 3 and verify_manifest(one.parent) == []
    assert (one / CYCLE).samefile(other / CYCLE), "one file again, and not the backup's"
    assert contents(backup) == kept
    assert repair(copied) == []


def test_singular_vectors_are_a_file_like_the_cycles(copied: Path, tmp_path: Path) -> None:
    """Damage in them is seen by what reads no cycle, by what reads each, and mended from another ledger of the run."""
    record = {"sha256": hashlib.sha256(b"vectors").hexdigest(), "size": 7}
    for ledger in ledgers(copied):
        (ledger / VECTORS_FILE).write_bytes(b"vectors")
        change_json(ledger / "ledger.json", lambda content: content.update(vectors=record))
    checkpoint = ledgers(copied)[0].parent
    write_manifest(checkpoint)
    assert repair(copied) == [] and ledger_problems(checkpoint) == [] and len(verify(checkpoint)) == 2
    (checkpoint / "ledger" / VECTORS_FILE).write_bytes(b"Vectors")
    write_manifest(checkpoint)  # as if they had been damaged before they were listed
    (problem,) = ledger_problems(checkpoint)
    assert f"{VECTORS_FILE} is not the file of singular vectors that ledger.json has on record" in problem
    with pytest.raises(RunError, match=f"{VECTORS_FILE} is damaged"):
        verify(checkpoint)
    with pytest.raises(UserError, match=f"{VECTORS_FILE} is not the file that was recorded"):
        open_adapter(checkpoint)
    (line,) = repair(copied)
    assert line == f"{checkpoint.resolve() / 'ledger' / VECTORS_FILE}: replaced by an intact copy"
    assert (checkpoint / "ledger" / VECTORS_FILE).read_bytes() == b"vectors"


def test_a_folder_in_the_place_of_a_cycle_stays(copied: Path) -> None:
    damaged = ledgers(copied)[0]
    (damaged / CYCLE).unlink()
    (damaged / CYCLE).mkdir()
    (damaged / CYCLE / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=f"{CYCLE} is a folder, which stays"):
        repair(copied)
    assert (damaged / CYCLE / "notes.txt").read_text() == "mine"


def test_what_has_no_ledger_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no ledger"):
        repair(tmp_path)
