"""Object stores and leases: retries, wrong URLs, and who may write."""

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mora_ds.common import object_store
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.object_store import (
    Lease,
    ObjectStore,
    StoreError,
    object_facts,
)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(object_store, "PAUSES_S", (0.0, 0.0))
    return ObjectStore(f"file://{tmp_path}/store")


@pytest.mark.parametrize(
    "url, words",
    [
        ("nowhere://bucket/run", "nowhere"),
        ("memory://run", "outlives the process"),
        ("file:///", "a name in it"),
        ("file:///tmp/run[1]", "a pattern"),
    ],
)
def test_a_url_that_cannot_be_used_is_an_error(url, words):
    with pytest.raises(UserError, match=words) as caught:
        ObjectStore(url)
    assert f"--output_dir {url}" in str(caught.value)


def failing(store, monkeypatch, times, error):
    """`write` fails so often."""
    write = store.filesystem.pipe_file
    left = [error] * times

    def fails(*arguments, **options):
        if left:
            raise left.pop()
        write(*arguments, **options)

    monkeypatch.setattr(store.filesystem, "pipe_file", fails)
    return left


def test_what_fails_is_tried_again(store, monkeypatch):
    failing(store, monkeypatch, 2, TimeoutError("slow"))
    store.write("a/b", b"content")
    assert store.read("a/b") == b"content"


@pytest.mark.parametrize(
    "error, tried", [(TimeoutError, 3), (PermissionError, 1), (FileNotFoundError, 1)]
)
def test_what_fails_for_good_is_an_error_without_secrets(
    store, monkeypatch, error, tried
):
    words = "no way to s3://key:secret@host/x?signature=secret"
    left = failing(store, monkeypatch, 9, error(words))
    with pytest.raises(StoreError, match=r"^file://.*/store: ") as caught:
        store.write("a", b"")
    what = "" if error is FileNotFoundError else "pipe_file failed: "
    assert f"store: {what}no way to s3://...@host/x?..." in str(caught.value)
    assert len(left) == 9 - tried


def test_a_version_is_the_same_with_and_without_quotes():
    """Azure quotes it in one of two answers."""
    for version in ('"0x8D"', "0x8D"):
        assert object_facts({"size": 3, "etag": version}) == (3, "0x8D")


def test_of_an_object_as_large_as_the_store_a_name_is_read(store, tmp_path):
    store.write("latest", b"step-000001")
    assert store.read("latest") == b"step-000001"
    os.truncate(tmp_path / "store/latest", 2**40)
    assert len(store.read("latest")) < 10_000


def test_a_part_of_a_file_does_not_stay(store, monkeypatch, tmp_path):
    def breaks(_, targets):
        Path(targets[0]).write_bytes(b"con")
        raise TimeoutError

    monkeypatch.setattr(store.filesystem, "get", breaks)
    with pytest.raises(StoreError):
        store.fetch(["a"], tmp_path)
    assert not (tmp_path / "a").exists()


# -- leases ----------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Nobody waits for time to pass, but for what others do meanwhile."""
    monkeypatch.setattr(object_store, "RENEWED_S", 0.05)

    def pass_time(meanwhile):
        clock = SimpleNamespace(time=time.time, sleep=lambda _: meanwhile())
        monkeypatch.setattr(object_store, "time", clock)

    return pass_time


def test_a_lease_that_is_just_renewed_is_not_lost(store, quick, monkeypatch):
    """Where the store shows a part of the object meanwhile, as a disk does."""
    lease = Lease(store, ".lock")
    write = store.write
    begun = threading.Event()

    def write_slowly(name, data):
        write(name, b"")
        begun.set()
        time.sleep(0.1)
        write(name, data)

    monkeypatch.setattr(store, "write", write_slowly)
    lease.take()
    assert begun.wait(60)
    lease.confirm()
    lease.release()
    assert store.read(".lock") == b""


def test_a_lease_is_one_holders_until_it_is_released(store, quick, monkeypatch):
    monkeypatch.setattr(object_store, "RENEWED_S", 3600)
    first = Lease(store, ".lock")
    first.take()
    quick(lambda: store.write(".lock", first._content()))
    with pytest.raises(UserError, match=r"another run writes there \(process"):
        Lease(store, ".lock").take()
    first.check()
    first.release()
    second = Lease(store, ".lock")
    second.take()
    second.release()


def test_a_lease_that_is_renewed_while_another_waits_is_not_expired(
    store, quick, monkeypatch
):
    """A store on a disk shows its object as empty then."""
    monkeypatch.setattr(object_store, "RENEWED_S", 3600)
    first = Lease(store, ".lock")
    first.take()
    quick(lambda: store.write(".lock", b""))
    with pytest.raises(UserError, match="another run writes there"):
        Lease(store, ".lock").take()
    # Its holder was killed then, and has not come back
    second = Lease(store, ".lock")
    second.take()
    second.release()
    first.release()


def test_a_store_that_always_overwrites_is_refused(store, monkeypatch):
    """Two runs would both hold its lease."""
    monkeypatch.setattr(
        ObjectStore, "create", lambda own, *object: own.write(*object) or True
    )
    with pytest.raises(UserError, match="this store has no conditional writes"):
        Lease(store, ".lock").take()
    assert not store.find()


def test_a_holder_renews_its_lease(store, quick):
    lease = Lease(store, ".lock")
    lease.take()
    content = store.read(".lock")
    deadline = time.monotonic() + 60
    while store.read(".lock") in (content, b""):
        assert time.monotonic() < deadline
    lease.release()
    assert store.read(".lock") == b""


def out_of_touch(*_):
    raise StoreError("no answer")


def test_a_lease_that_is_not_renewed_is_taken_and_its_holder_stops(
    store, quick, monkeypatch
):
    first = Lease(store, ".lock")
    second = Lease(store, ".lock")
    quick(lambda: None)
    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "write", out_of_touch)
        first.take()
        second.take()
        first._thread.join(60)
    with pytest.raises(RunError, match="another one writes there now"):
        first.check()
    first.release()
    second.check()
    second.release()
    assert store.read(".lock") == b""
