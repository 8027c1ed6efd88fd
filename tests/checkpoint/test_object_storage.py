"""Checkpoints in an object store, here on a disk: what is put where, and what a killed
process leaves.
"""

from contextlib import suppress

import pytest

from mora_ds.checkpoint.manager import CheckpointManager, complete_checkpoints
from mora_ds.checkpoint.storage import storage_of
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.fetched import bind, with_urls
from mora_ds.common.files import MANIFEST, write_manifest
from mora_ds.common.object_store import Lease, ObjectStore
from tests.helpers.damage import checkpoint_at
from tests.helpers.outcome import tree

WRITTEN = ".step-000002.writing"


@pytest.fixture
def storage(tmp_path):
    root = tmp_path / "work/checkpoints"
    root.parent.mkdir()
    bind(root.parent, f"file://{tmp_path}/store")
    return storage_of(root)


@pytest.fixture
def store(tmp_path):
    """What lies in the store."""
    return tmp_path / "store/checkpoints"


def put(storage, folder, source):
    for file in sorted(source.iterdir()):
        storage.put(f"{folder}/{file.name}", file)


def checkpoint(folder, text):
    """Of one file with this text, and its manifest."""
    made = checkpoint_at(folder, 2)
    (made / "file").write_text(text)
    write_manifest(made)
    return made


def test_a_manifest_commits_what_lies_under_the_final_name_already(
    storage, store, tmp_path
):
    source = checkpoint(tmp_path / "one", "first")
    with storage.write(f"{WRITTEN}/file") as path:
        path.write_text("first")
    assert storage.sizes(WRITTEN) == {"file": 5}
    assert list(tree(store)) == ["step-000002/file"]
    assert complete_checkpoints(storage.root) == []
    storage.put(f"{WRITTEN}/manifest.json", source / "manifest.json")
    storage.commit(WRITTEN, "step-000002")
    (found,) = complete_checkpoints(storage.root)
    assert CheckpointManager.verify(found) == []
    assert with_urls(found) == f"file://{store}/step-000002"


@pytest.fixture
def replaced(storage, store, tmp_path):
    """A storage with a checkpoint, and another one of the same step, which is complete."""
    put(storage, WRITTEN, checkpoint(tmp_path / "one", "first"))
    storage.commit(WRITTEN, "step-000002")
    assert storage.open_read("step-000002/file").read_text() == "first"
    put(storage, WRITTEN, checkpoint(tmp_path / "two", "second"))
    (found,) = complete_checkpoints(storage.root)
    assert CheckpointManager.verify(found) == []
    assert (store / "step-000002/file").read_text() == "first"
    return storage


@pytest.mark.parametrize("copies", [0, 1, 2])
def test_a_replaced_checkpoint_is_complete_whenever_the_copy_is_killed(
    replaced, store, monkeypatch, copies
):
    """It has two files."""
    left = [None] * copies
    copy = ObjectStore.copy

    def killed(own, source, target):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        copy(own, source, target)

    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "copy", killed)
        with suppress(KeyboardInterrupt):
            replaced.commit(WRITTEN, "step-000002")
    replaced.repair()
    assert {name.split("/")[0] for name in tree(store)} == {"step-000002"}
    (found,) = complete_checkpoints(replaced.root)
    assert CheckpointManager.verify(found) == []
    assert replaced.open_read("step-000002/file").read_text() == "second"


def test_what_was_never_committed_is_deleted_and_nothing_else(storage, store, tmp_path):
    put(storage, WRITTEN, checkpoint(tmp_path / "one", "first"))
    for name in ("step-000003/file", ".step-000002.writing/file", "notes/file"):
        (store / name).parent.mkdir(exist_ok=True)
        (store / name).write_text("x")
    storage.repair()
    kept = {"step-000002/file", "step-000002/manifest.json", "notes/file"}
    assert set(tree(store)) == kept
    storage.delete("step-000002")
    assert set(tree(store)) == {"notes/file"}


def test_the_manifest_of_a_deleted_checkpoint_goes_first(storage, monkeypatch):
    """So that a killed deletion leaves no checkpoint."""
    deleted = []
    monkeypatch.setattr(ObjectStore, "delete", lambda own, name: deleted.append(name))
    storage.delete("step-000002")
    assert deleted == ["step-000002/manifest.json", "step-000002"]


def test_a_link_names_a_checkpoint_that_is_there(storage, store, tmp_path):
    assert storage.linked("latest") is None
    storage.link("latest", "step-000002")
    assert storage.linked("latest") is None
    put(storage, WRITTEN, checkpoint(tmp_path / "one", "first"))
    assert storage.linked("latest") == "step-000002"
    (store / "latest").write_text("../elsewhere")
    assert storage.linked("latest") is None


def test_a_file_that_an_earlier_checkpoint_has_is_copied_in_the_store(
    storage, store, tmp_path, monkeypatch
):
    cycle = tmp_path / "cycle"
    cycle.write_text("matrices")
    storage.put("step-000002/ledger/cycle", cycle)
    uploads = []
    monkeypatch.setattr(ObjectStore, "put", lambda *names: uploads.append(names))
    storage.put("step-000004/ledger/cycle", cycle)
    assert not uploads
    assert (store / "step-000004/ledger/cycle").read_text() == "matrices"
    storage.delete("step-000004")
    storage.put("step-000006/ledger/cycle", cycle)
    assert len(uploads) == 1, "what it was copied from is gone"


def test_a_name_that_leads_out_of_the_copies_is_an_error(storage, monkeypatch):
    monkeypatch.setattr(ObjectStore, "facts", lambda *_: None)
    monkeypatch.setattr(ObjectStore, "find", lambda *_: {"../../../x": (1, "")})
    with pytest.raises(UserError, match=r"'\.\.' cannot be the name of a file"):
        storage.open_read("step-000002")


def test_no_manifest_is_put_after_a_hang_in_which_another_run_took_the_url(
    storage, store
):
    lease = Lease(ObjectStore(f"file://{store.parent}"), ".lock")
    lease.take()
    with (
        pytest.raises(RunError, match="another one writes there now"),
        storage.write(f"{WRITTEN}/{MANIFEST}") as path,
    ):
        path.write_text("{}")
        (store.parent / ".lock").write_text("another process")
    lease.release()
    assert not list(store.rglob(MANIFEST))
    assert (store.parent / ".lock").read_text() == "another process"
