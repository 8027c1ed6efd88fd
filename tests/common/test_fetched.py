"""What a URL names becomes a folder of this machine: once, complete, and anew where it has
changed.
"""

import errno
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from mora_ds.common import fetched
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.fetched import fetch_into, local, with_urls
from mora_ds.common.object_store import ObjectStore, StoreError


@pytest.fixture
def url(tmp_path, monkeypatch):
    """That of a run with two checkpoints."""
    monkeypatch.setattr(fetched, "_cache", None)
    fetch_into(tmp_path / "cache")
    fetched.fetched_once.cache_clear()
    for step in (1, 2):
        folder = tmp_path / f"run/checkpoints/step-00000{step}"
        folder.mkdir(parents=True)
        (folder / "file").write_text(f"step {step}")
    (tmp_path / "run/checkpoints/latest").write_text("step-000001")
    return f"file://{tmp_path}/run"


@pytest.mark.parametrize(
    "place, content",
    [
        ("", "step 1"),
        ("/checkpoints/latest", "step 1"),
        ("/checkpoints/step-000002", "step 2"),
        ("/checkpoints/", "step 1"),
    ],
)
def test_a_url_means_what_the_same_path_means(url, place, content):
    folder = local(url + place)
    assert (folder / "file").read_text() == content
    assert folder.name == f"step-00000{content[-1]}"
    named = with_urls(f"{folder / 'file'} is damaged")
    assert named == f"{url}/checkpoints/{folder.name}/file is damaged"


def test_all_checkpoints_of_a_run_come_with_links(url):
    for place in ("", "/checkpoints"):
        folder = local(url + place, all_checkpoints=True)
        assert folder.name == "checkpoints"
        assert (folder / "latest").readlink() == Path("step-000001")
        assert (folder / "step-000002/file").read_text() == "step 2"
    one = local(f"{url}/checkpoints/latest", all_checkpoints=True)
    assert one.name == "step-000001"


def test_a_link_leads_to_a_folder_next_to_it_alone(url, tmp_path):
    (tmp_path / "run/checkpoints/latest").write_text("step-000001/../../../private")
    (tmp_path / "private").mkdir()
    (tmp_path / "private/file").touch()
    assert local(url).name == "run"


def test_what_has_changed_is_fetched_anew_and_nothing_else(url, tmp_path, monkeypatch):
    first = local(url)
    gets = []
    fetch = ObjectStore.fetch

    def counted(store, names, folder):
        gets.extend(names)
        fetch(store, names, folder)

    monkeypatch.setattr(ObjectStore, "fetch", counted)
    fetched.fetched_once.cache_clear()
    assert local(url) == first
    assert not gets
    (tmp_path / "run/checkpoints/step-000001/file").write_text("another")
    fetched.fetched_once.cache_clear()
    assert (local(url) / "file").read_text() == "another"
    assert (first / "file").read_text() == "step 1"


def test_a_half_fetched_folder_is_never_used(url, tmp_path, monkeypatch):
    def breaks(_, names, folder):
        (folder / names[0]).write_text("ste")
        raise StoreError("no answer")

    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "fetch", breaks)
        with pytest.raises(StoreError, match="no answer"):
            local(url)
    assert not list((tmp_path / "cache").rglob("file"))
    assert (local(url) / "file").read_text() == "step 1"


def test_what_changes_meanwhile_is_no_version(url, tmp_path, monkeypatch):
    fetch = ObjectStore.fetch

    def slow(store, names, folder):
        fetch(store, names, folder)
        (tmp_path / "run/checkpoints/step-000001/file").write_text("another")

    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "fetch", slow)
        with pytest.raises(StoreError, match="has changed while it was fetched"):
            local(url)
    assert (local(url) / "file").read_text() == "another"


def test_two_nodes_without_common_locks_leave_one_folder(url, monkeypatch):
    monkeypatch.setattr(fetched.fcntl, "flock", lambda *_: None)
    nodes = ["second", "first"]
    monkeypatch.setattr(fetched.platform, "node", lambda: nodes.pop())
    fetch = ObjectStore.fetch

    def slow(store, names, folder):
        fetch(store, names, folder)
        if nodes:
            assert (local(url) / "file").read_text() == "step 1"

    monkeypatch.setattr(ObjectStore, "fetch", slow)
    folder = local(url)
    assert (folder / "file").read_text() == "step 1"
    assert {path.name for path in folder.parent.iterdir()} == {".lock", folder.name}


def test_a_copy_that_cannot_take_its_name_is_an_error(url, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fetched, "atomic_folder", made_at_once)
    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises((RunError, OSError), match="Input/output error"):
        local(url)
    assert not list((tmp_path / "cache").rglob("file"))


@contextmanager
def made_at_once(folder):
    """As `atomic_folder`, without renames."""
    folder.mkdir(parents=True)
    yield folder


def test_a_full_disk_is_named_at_once(url, tmp_path, monkeypatch):
    calls = []

    def full(_, names, targets):
        calls.append(targets)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LocalFileSystem, "get", full)
    with pytest.raises(StoreError, match=f"No space left .*{tmp_path}/cache"):
        local(url)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "place, words",
    [
        ("/nothing", "--base file://.*: there is no such folder"),
        ("/checkpoints/step-000002/file", "there is no such folder"),
        ("/x?X-Amz-Signature=secret", "leave credentials out"),
    ],
)
def test_a_url_of_nothing_is_an_error(url, place, words):
    with pytest.raises(UserError, match=words) as caught:
        local(url + place, "--base")
    assert "secret" not in str(caught.value)
