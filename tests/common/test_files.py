"""Atomic writes, links, folders and manifests: what a full disk, a kill or damage leaves
behind.
"""

import errno
import hashlib
import os
import tempfile
from pathlib import Path

import pytest
from safetensors import SafetensorError

from mora_ds.common import files
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.untrusted import read_text
from tests.helpers.damage import flip
from tests.helpers.errors import run_error, user_error
from tests.helpers.tables import each_row


def test_manifest_names_each_damage(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("good", "flipped", "short", "gone", "deep/flipped"):
        (tmp_path / name).write_bytes(b"0123456789" * 100)
    for _ in range(2):  # it does not list itself
        files.write_manifest(tmp_path)
        assert files.verify_manifest(tmp_path) == []
    (tmp_path / "unknown").write_text("is no problem")
    flip(tmp_path / "flipped")
    flip(tmp_path / "deep/flipped", 0)
    os.truncate(tmp_path / "short", 999)
    (tmp_path / "gone").unlink()
    problems = "\n".join(files.verify_manifest(tmp_path))
    assert len(problems.splitlines()) == 4
    for words in (
        "deep/flipped is damaged",
        "/flipped is damaged",
        "short has 999 bytes",
        "gone is missing",
    ):
        assert words in problems
    (tmp_path / "manifest.json").write_text(
        f'{{"format": {files.FORMAT}, "files": {{}}}}'
    )
    assert (
        "it does not list what it was written with"
        in files.verify_manifest(tmp_path)[0]
    )
    (tmp_path / "manifest.json").write_text('{"format": 1, "files": {}}')
    with user_error(
        f"manifest.json has format 1; mora_ds .* reads format {files.FORMAT}"
    ):
        files.verify_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(
        f'{{"format": {files.FORMAT}, "seal": "a"}}'
    )
    with user_error(r"manifest\.json is damaged"):
        files.verify_manifest(tmp_path)


def test_symlink_moves_and_folder_replacement_recovers(tmp_path):
    (tmp_path / ".latest.partial").symlink_to("step-0")  # of a killed process
    for target in ("step-1", "step-2"):
        (tmp_path / target).mkdir()
        files.replace_symlink(tmp_path / "latest", target)
        assert (tmp_path / "latest").resolve() == tmp_path / target
        assert not list(tmp_path.glob(".*"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "kept").write_text("")
    os.rename(folder, tmp_path / ".model.old")  # killed between the two renames
    with pytest.raises(RuntimeError), files.atomic_folder(folder):
        raise RuntimeError
    assert (folder / "kept").exists()
    assert not (tmp_path / ".model.old").exists()


def test_half_made_link_is_never_written_through(tmp_path):
    """A killed `link_or_copy` leaves a hard link where the next write begins: the linked
    file must not change.
    """
    precious = tmp_path / "precious"
    precious.write_text("keep")
    os.link(precious, tmp_path / ".a.json.partial")
    files.write_json_atomic(tmp_path / "a.json", {})
    assert precious.read_text() == "keep"


@pytest.mark.timeout(30)
def test_a_pipe_is_read_only_where_a_shell_names_it(tmp_path):
    reader, writer = os.pipe()
    os.write(writer, b"{}")
    os.close(writer)
    assert read_text(Path(f"/dev/fd/{reader}")) == "{}"
    os.close(reader)
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if Path("/dev/shm").is_dir() else tmp_path
    ) as memory:
        for path in (tmp_path / "pipe", Path(memory) / "pipe"):
            os.mkfifo(path)
            with user_error("is no file"):
                read_text(path)


# -- the disk --------------------------------------------------------------------------


def recorded(patch):
    """Files that are flushed and renamed from now on, in order."""
    events = []
    flush = os.fsync
    rename = os.rename
    replace = os.replace

    def fsync(descriptor):
        flush(descriptor)
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    def moved(move):
        def named(source, target):
            move(source, target)
            events.append(f"-> {target.name}")

        return named

    patch.setattr(os, "fsync", fsync)
    patch.setattr(os, "rename", moved(rename))
    patch.setattr(os, "replace", moved(replace))
    return events


def test_contents_are_flushed_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    """Otherwise a power cut leaves a name without its content, or loses what was reported
    as written.
    """
    folder = tmp_path / "folder"
    events = recorded(monkeypatch)
    folder.mkdir()
    files.write_json_atomic(folder / "a.json", {})
    assert events == [".a.json.partial", "-> a.json", "folder"]
    events.clear()
    files.replace_symlink(folder / "latest", "a.json")
    assert events == ["-> latest", "folder"]
    events.clear()
    with files.atomic_folder(folder / "model") as partial:
        (partial / "deep").mkdir()
        (partial / "deep/file").write_text("")
    assert events == ["file", "deep", ".model.partial", "-> model", "folder"]
    events.clear()
    files.write_manifest(folder / "model")
    manifest = [".manifest.json.partial", "-> manifest.json", "model"]
    assert events == ["file", *manifest]


DISK = """
ENOSPC | the disk that holds .* is full
EDQUOT | the disk that holds .* is full
EROFS  | writing to .* failed
EACCES | writing to .* failed
EPERM  | writing to .* failed
EIO    | writing to .* failed
ESTALE | writing to .* failed
EFBIG  | writing to .* failed
"""


@each_row("name, words", DISK)
def test_a_disk_that_cannot_be_written_to_is_named(tmp_path, name, words):
    code = getattr(errno, name)
    with run_error(words) as caught, files.disk_errors(tmp_path):
        raise OSError(code, os.strerror(code))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("kind", [Exception, SafetensorError])
def test_libraries_that_name_the_full_disk_in_words(tmp_path, kind):
    """An error as tokenizers and safetensors raise it."""
    full = "the disk that holds .* is full: No space left on device$"
    with run_error(full), files.disk_errors(tmp_path):
        raise kind("I/O error: No space left on device (os error 28)")


def test_a_disk_is_named_once(tmp_path):
    with (
        run_error(r"^writing to .*/inner failed: [^/]*$"),
        files.disk_errors(tmp_path),
        files.disk_errors(tmp_path / "inner"),
    ):
        raise Exception("Read-only file system (os error 30)")


def test_errors_that_say_nothing_of_the_disk_pass(tmp_path):
    with pytest.raises(FileNotFoundError), files.disk_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "No such file")
    with run_error("full"), files.malformed(tmp_path / "a.json"):
        raise RunError("the disk is full")


def test_a_hash_is_of_all_bytes(tmp_path):
    content = bytes(9_000_000) + b"end"
    (tmp_path / "file").write_bytes(content)
    assert files.sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_link_is_not_the_file_that_was_recorded(tmp_path):
    (tmp_path / "file").write_text("content")
    facts = files.facts_of(tmp_path / "file")
    assert files.file_problem(tmp_path / "file", facts["size"], facts["sha256"]) == ""
    (tmp_path / "link").symlink_to("file")
    assert "link is missing" in files.file_problem(
        tmp_path / "link", facts["size"], facts["sha256"]
    )


def names_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_folder_is_replaced_completely_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("old")
    for leftover in (".model.partial", ".model.old"):  # of killed processes
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "stale").write_text("")
    for failure in (ValueError, KeyboardInterrupt):
        with pytest.raises(failure), files.atomic_folder(folder) as partial:
            (partial / "new").write_text("")
            raise failure
        with pytest.raises(failure), files.atomic_path(folder / "old") as temporary:
            temporary.write_text("new")
            raise failure
        assert names_below(tmp_path) == ["model", "model/old"]
    with files.atomic_folder(folder) as partial:
        (partial / "new").write_text("")
    assert names_below(tmp_path) == ["model", "model/new"]


def test_a_link_or_a_copy(tmp_path, monkeypatch):
    source = tmp_path / "source"
    target = tmp_path / "target"
    source.write_text("content")
    target.write_text("old")
    for _ in range(2):  # the second time they are one file already
        files.link_or_copy(source, target)
        assert target.samefile(source)
        assert not list(tmp_path.glob(".*"))

    def raise_validation_errors(code):
        def link(*names):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "link", link)

    raise_validation_errors(errno.EXDEV)
    files.link_or_copy(source, tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "content"
    assert not (tmp_path / "copy").samefile(source)
    raise_validation_errors(errno.EDQUOT)
    with run_error("is full"):
        files.link_or_copy(source, tmp_path / "other")
    assert names_below(tmp_path) == ["copy", "source", "target"]


def test_a_file_that_comes_late_is_waited_for(tmp_path, monkeypatch):
    path = tmp_path / "late"
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        path.write_bytes(bytes(len(waits)))

    monkeypatch.setattr(files.time, "sleep", sleep)
    files.await_file(path, 3)
    assert len(waits) == 3


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    with user_error("cannot be made: File name too long"):
        files.require_new(tmp_path / ("a" * 300))


def test_json_is_utf8_of_a_known_format(tmp_path):
    path = tmp_path / "a.json"
    files.write_json_atomic(path, {"é": 1})
    assert path.read_bytes() == '{\n  "é": 1\n}\n'.encode()
    files.pop_format(path, {"format": files.FORMAT})
    for content, words in (
        (
            {"format": 2},
            "has format 2; mora_ds .* reads format 6 alone: go on with the version that wrote it",
        ),
        ({}, "has format None"),
    ):
        with user_error(rf"a\.json {words}"):
            files.pop_format(path, content)
    path.write_text("[]")
    with user_error(r"a\.json is damaged: a JSON object was expected, not list"):
        files.read_json(path)
    with user_error(r"b\.json is missing"):
        files.read_json(tmp_path / "b.json")
    with user_error(f"{tmp_path} cannot be read"):
        files.read_json(tmp_path)


@pytest.mark.parametrize(
    "error, words",
    [
        (UserError("of a value"), "a.json: of a value"),
        (KeyError("step"), "a.json is damaged: KeyError"),
        (ZeroDivisionError("x"), "a.json is damaged"),
        (RuntimeError("x"), "a.json is damaged"),
    ],
)
def test_what_reading_a_file_raises_names_it(error, words):
    with user_error(words), files.malformed(Path("a.json")):
        raise error


YAML = """
{x: {a: 1, a: 2}} | 'a' is given twice
{[1]: 2} | is not a valid key
a: [ | is not valid YAML
a: 2024-99-99 | is not valid YAML
a: &a [*a] | aliases are not supported
"""
"""Others are lines of tests/config/test_bad_launches.py."""


@each_row("text, words", YAML)
def test_yaml_that_is_refused(tmp_path, text, words):
    (tmp_path / "a.yaml").write_text(text)
    with user_error(words):
        files.load_yaml(str(tmp_path / "a.yaml"), "recipe")


@pytest.mark.parametrize("number", [f"0x{'f' * 5000}", f"[1{'0' * 200}]"])
def test_a_whole_number_has_at_most_200_digits(tmp_path, number):
    (tmp_path / "a.yaml").write_text(f"a: {number}")
    with user_error("is not valid YAML: a whole number has more than 200 digits"):
        files.load_yaml(str(tmp_path / "a.yaml"), "recipe")


def test_yaml_that_is_read(tmp_path):
    path = tmp_path / "a.yaml"
    nested = "a: {b: 1}\n1: d", {"a": {"b": 1}, 1: "d"}
    # A time is text, and no number of base 60
    times = "a: 1:30:00\nb: 1:30.5", {"a": "1:30:00", "b": "1:30.5"}
    large = f"a: {'9' * 200}", {"a": 10**200 - 1}
    for text, content in (("", {}), large, nested, times):
        path.write_text(text)
        assert files.load_yaml(str(path), "recipe") == content
    with user_error(r"cannot read recipe .*b\.yaml"):
        files.load_yaml(str(tmp_path / "b.yaml"), "recipe")


def test_a_folder_is_at_work_until_its_process_leaves_it(tmp_path):
    assert not files.is_abandoned(tmp_path), "an empty one may be about to be locked"
    (tmp_path / "file").write_text("")
    with files.at_work(tmp_path):
        assert not files.is_abandoned(tmp_path)
    assert files.is_abandoned(tmp_path)


class InCloud:
    """A path of another library."""

    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return self.path


def test_whatever_names_a_path_is_one():
    assert [
        files.as_path(path, "") for path in ("a/b", Path("a/b"), InCloud("a/b"))
    ] == [Path("a/b")] * 3
    for value in ("", None, 3, b"a", InCloud(b"a"), InCloud("")):
        with user_error(r"^f: `x` must be a path, got "):
            files.as_path(value, "f: `x`")
