"""Atomic writes, links, folders and manifests: what a full disk, a kill or damage leaves behind."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

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
