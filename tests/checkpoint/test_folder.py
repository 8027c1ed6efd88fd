"""The folder of all checkpoints on a disk: what is not a run's stays, and what cannot be deleted does
not end a run.
"""

import errno
import os
import shutil

import pytest

from mora_ds.checkpoint.layout import step_of
from mora_ds.checkpoint.manager import (
    complete_checkpoints,
    resume_checkpoint,
)
from mora_ds.checkpoint.state import TrainerState
from mora_ds.checkpoint.storage import LocalStorage
from mora_ds.checkpoint.verify import verify
from mora_ds.common import files
from mora_ds.common.files import replace_symlink
from mora_ds.train.pretrain import _begin_checkpoints
from tests.helpers.damage import checkpoint_at, manager_of

UNKNOWN_FOLDERS = (
    "step-000002.bak",
    "step-",
    "step-2",
    "step-0000002",
    "step--00002",
    "step-00000\uff12",
    "notes",
)
HIDDEN_FOLDERS = (
    ".step-000002.bak.writing",
    ".step-x.old.writing",
    ".step-9.gone.writing",
    ".mine",
)


@pytest.fixture
def root(tmp_path):
    """Three checkpoints, the user's own folders and files next to them, and a link to a
    checkpoint elsewhere.
    """
    root = tmp_path / "checkpoints"
    for step in (2, 4, 6):
        checkpoint_at(root, step)
    for name in (*UNKNOWN_FOLDERS, *HIDDEN_FOLDERS):
        shutil.copytree(root / "step-000002", root / name)
    (root / "step-000007").write_text("a file")
    (root / "step-000008.log").write_text("a file")
    checkpoint_at(tmp_path / "elsewhere", 1)
    (root / "step-000001").symlink_to(tmp_path / "elsewhere/step-000001")
    replace_symlink(root / "latest", "step-000006")
    return root


def contents(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}


def names(root):
    return [folder.name for folder in complete_checkpoints(root)]


def test_steps_and_their_folders_are_in_order(tmp_path):
    steps = [0, 9, 40, 999_999, 1_000_000, 123_456_789]
    for step in steps:
        checkpoint_at(tmp_path, step)
    assert [step_of(folder) for folder in complete_checkpoints(tmp_path)] == steps


def test_what_is_not_a_checkpoint_by_its_name_is_neither_read_nor_deleted(root):
    before = contents(root)
    LocalStorage(root).repair()
    assert names(root) == ["step-000001", "step-000002", "step-000004", "step-000006"]
    assert resume_checkpoint("auto", root) == root / "step-000006"
    manager_of(root).retain(6, keep=1)
    gone = {
        name for name in before if name.split("/")[0] in ("step-000002", "step-000004")
    }
    assert contents(root) == before - gone
    assert (root / "step-000001/file").read_text() == "1", (
        "a link and what it leads to are the user's"
    )


def test_a_copy_can_be_resumed_from_and_verified(root):
    copy = root / "step-000002.bak"
    assert resume_checkpoint(str(copy), root) == copy
    assert [verdict.folder.name for verdict in verify(root)] == names(root)
    assert not any(
        "not the name of a checkpoint" in problem
        for problem in verify(copy)[0].problems
    )


def test_a_resume_makes_the_links_that_a_killed_run_has_not_made(root):
    storage = LocalStorage(root)
    (root / "latest").unlink()
    for checkpoint, best in (("step-000004", 2), ("step-000006", 9)):
        _begin_checkpoints(root, root / checkpoint, TrainerState(best_step=best))
        assert storage.linked("latest") == "step-000004"
        assert storage.linked("best") == "step-000002"


def test_a_file_that_a_shared_disk_shows_late_or_short_is_waited_for(root, monkeypatch):
    waited = []
    monkeypatch.setattr(files, "await_file", lambda *facts: waited.append(facts))
    for name, size in (("file", 1), ("file", 2), ("gone", 3)):
        manager_of(root)._require_written("step-000002", {name: {"size": size}})
    folder = root / "step-000002"
    assert waited == [(folder / "file", 2), (folder / "gone", 3)]


def busy(*_, **options):
    if not options.get("ignore_errors"):
        raise OSError(errno.EBUSY, "Device or resource busy")


@pytest.mark.parametrize("module, call", [(shutil, "rmtree"), (os, "rename")])
def test_a_checkpoint_that_cannot_be_deleted_is_a_warning_and_tried_again(
    root, monkeypatch, caplog, module, call
):
    with monkeypatch.context() as patched:
        patched.setattr(module, call, busy)
        manager_of(root).retain(6, keep=1)
        LocalStorage(root).repair()
    assert (
        "cannot be deleted and takes up space: [Errno 16] Device or resource busy"
        in caplog.text
    )
    assert resume_checkpoint("auto", root) == root / "step-000006"
    caplog.clear()
    LocalStorage(root).repair()
    manager_of(root).retain(6, keep=1)
    assert names(root) == ["step-000001", "step-000006"]
    assert {path.name for path in root.glob(".*")} == set(HIDDEN_FOLDERS)
    assert not caplog.text
