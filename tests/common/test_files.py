"""Atomic writes, links, folders and manifests: what a full disk, a kill or damage leaves behind."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from mora_ds.common import files
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.untrusted import read_text


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_full_disk_is_named_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_json_atomic(path, {"old": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=f"{tmp_path} is full"):
        files.write_json_atomic(path, {"new": 1})
    assert files.read_json(path) == {"old": 1} and [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_manifest_names_each_damage(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("whole", "flipped", "short", "gone", "deep/flipped"):
        (tmp_path / name).write_bytes(b"0123456789" * 100)
    files.write_manifest(tmp_path)
    assert files.verify_manifest(tmp_path) == []
    (tmp_path / "unknown").write_text("is no problem")
    flip_byte(tmp_path / "flipped", 500)
    flip_byte(tmp_path / "deep/flipped", 0)
    os.truncate(tmp_path / "short", 999)
    (tmp_path / "gone").unlink()
    problems = "\n".join(files.verify_manifest(tmp_path))
    assert len(problems.splitlines()) == 4
    for words in ("deep/flipped is damaged", "/flipped is damaged", "short has 999 bytes", "gone is missing"):
        assert words in problems
    (tmp_path / "manifest.json").write_text('{"files": {}}')
    assert "no seal" in files.verify_manifest(tmp_path)[0]
    (tmp_path / "manifest.json").write_text('{"seal": "a"}')
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        files.verify_manifest(tmp_path)


def test_symlink_moves_and_folder_replacement_recovers(tmp_path: Path) -> None:
    for target in ("step-1", "step-2"):
        (tmp_path / target).mkdir()
        files.replace_symlink(tmp_path / "latest", target)
        assert (tmp_path / "latest").resolve() == tmp_path / target
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "kept").write_text("")
    os.rename(folder, tmp_path / ".model.old")  # killed between the two renames
    with pytest.raises(RuntimeError), files.atomic_folder(folder):
        raise RuntimeError
    assert (folder / "kept").exists() and not (tmp_path / ".model.old").exists()


def test_half_made_link_is_never_written_through(tmp_path: Path) -> None:
    """A killed `link_or_copy` leaves a hard link where the next write begins: the linked file must not change."""
    precious = tmp_path / "precious"
    precious.write_text("keep")
    os.link(precious, tmp_path / ".a.json.partial")
    files.write_json_atomic(tmp_path / "a.json", {})
    assert precious.read_text() == "keep"


@pytest.mark.timeout(30)
def test_a_pipe_is_read_only_where_a_shell_names_it(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"{}")
    os.close(writer)
    assert read_text(Path(f"/dev/fd/{reader}")) == "{}"
    os.close(reader)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else tmp_path) as memory:
        for path in (tmp_path / "pipe", Path(memory) / "pipe"):
            os.mkfifo(path)
            with pytest.raises(UserError, match="is no file"):
                read_text(path)


# -- the disk ----------------------------------------------------------------------------------------------------------


def recorded(patch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed and renamed from now on, in order."""
    events: list[str] = []
    flush, rename, replace = os.fsync, os.rename, os.replace

    def fsync(descriptor: int) -> None:
        flush(descriptor)
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    def moved(move: Any) -> Any:
        def named(source: Path, target: Path) -> None:
            move(source, target)
            events.append(f"-> {target.name}")

        return named

    patch.setattr(os, "fsync", fsync)
    patch.setattr(os, "rename", moved(rename))
    patch.setattr(os, "replace", moved(replace))
    return events


def test_contents_are_flushed_before_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power cut leaves a name without its content, or loses what was reported as written."""
    folder, events = tmp_path / "folder", recorded(monkeypatch)
    folder.mkdir()
    files.write_json_atomic(folder / "a.json", {})
    assert events == [".a.json.partial", "-> a.json", "folder"]
    events.clear()
    files.replace_symlink(folder / "latest", "a.json")
    assert events == ["-> latest", "folder"]
    events.clear()
    with files.atomic_folder(folder / "model") as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "file").write_text("")
    assert events == ["deep", "file", ".model.partial", "-> model", "folder"]
    events.clear()
    files.record(folder, [folder / "a.json"])
    assert events == ["a.json"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        *((code, "the disk that holds .* is full") for code in (errno.ENOSPC, errno.EDQUOT)),
        *((getattr(errno, name), "writing to .* failed") for name in ("EROFS", "EACCES", "EPERM", "EIO", "ESTALE")),
    ],
)
def test_a_disk_that_cannot_be_written_to_is_named(tmp_path: Path, code: int, words: str) -> None:
    with pytest.raises(RunError, match=words) as caught, files.disk_errors(tmp_path):
        raise OSError(code, os.strerror(code))
    assert str(tmp_path) in str(caught.value)


def test_errors_that_say_nothing_of_the_disk_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.disk_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "No such file")
    with pytest.raises(RunError, match="full"), files.malformed(tmp_path / "a.json"):
        raise RunError("the disk is full")


def test_a_hash_is_of_all_bytes(tmp_path: Path) -> None:
    content = bytes(9_000_000) + b"end"
    (tmp_path / "file").write_bytes(content)
    assert files.sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_link_is_not_the_file_that_was_recorded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    facts = files.record(tmp_path, [tmp_path / "file"])["file"]
    assert files.file_problem(tmp_path / "file", facts["size"], facts["sha256"]) == ""
    (tmp_path / "link").symlink_to("file")
    assert "link is missing" in files.file_problem(tmp_path / "link", facts["size"], facts["sha256"])


def test_a_copied_folder_has_the_files_and_their_times(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("kept/engine", "engine/deep"):
        (source / name).mkdir(parents=True)
        (source / name / "file").write_text(name)
    os.utime(source / "kept" / "engine" / "file", ns=(10**18, 2 * 10**18))
    files.copy_folder(source, tmp_path / "target", without=("engine",))
    names = {path.relative_to(tmp_path / "target").as_posix() for path in (tmp_path / "target").rglob("*")}
    assert names == {"kept", "kept/engine", "kept/engine/file"}
    assert (tmp_path / "target" / "kept" / "engine" / "file").stat().st_mtime_ns == 2 * 10**18


def test_a_folder_is_made_anew_beside_what_a_killed_process_left(tmp_path: Path) -> None:
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "stale").write_text("")
    with files.atomic_folder(tmp_path / "model") as partial:
        (partial / "new").write_text("")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["model", "model/new"]


def test_a_folder_is_at_work_until_its_process_leaves_it(tmp_path: Path) -> None:
    assert not files.is_abandoned(tmp_path), "an empty one may be about to be locked"
    (tmp_path / "file").write_text("")
    with files.at_work(tmp_path):
        assert not files.is_abandoned(tmp_path)
    assert files.is_abandoned(tmp_path)
