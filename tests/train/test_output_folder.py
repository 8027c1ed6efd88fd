"""The output folder: a run takes none that holds something of the user's under its names,
and removes only its own.
"""

import errno
import fcntl
import os
import time
from unittest import mock

import pytest

from mora_ds.common.errors import UserError
from mora_ds.train import output_folder
from mora_ds.train.output_folder import (
    NAMES,
    abandon,
    check_merged,
    join,
    release,
    reserve,
)
from tests.helpers.errors import user_error
from tests.helpers.folders import a_run, forget, prepared, put
from tests.helpers.snapshot import snapshot, untouched


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", [*NAMES, ".overwritten", ".deleting"])
def test_a_name_of_a_run_without_a_run_is_the_users(tmp_path, name, overwrite):
    put(tmp_path, name, "seed: 1")
    with untouched(tmp_path), user_error(name) as refused:
        reserve(tmp_path).prepare(overwrite, not overwrite)
    assert str(tmp_path) in str(refused.value)
    assert "move it away" in str(refused.value)


def test_other_files_do_not_matter_and_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".writable").write_text("mine")
    with untouched(tmp_path):
        reserve(tmp_path).prepare(False, False)
        put(tmp_path, "tokenizer", "new")
        abandon(tmp_path)


def test_a_new_folder_goes_again_with_the_folders_above_it(tmp_path, monkeypatch):
    with untouched(tmp_path):
        reserve(tmp_path / "a/b").prepare(False, True)
        abandon(tmp_path / "a/b")
    locked = mock.Mock(side_effect=UserError("locked"))
    monkeypatch.setattr(output_folder, "_lock", locked)
    with untouched(tmp_path), user_error("locked"):
        reserve(tmp_path / "a/b")


def test_a_lock_file_that_another_run_deletes_meanwhile_is_made_again(
    tmp_path, monkeypatch
):
    lockf = fcntl.lockf

    def deleted(*arguments):
        monkeypatch.setattr(fcntl, "lockf", lockf)
        (tmp_path / ".lock").unlink()
        return lockf(*arguments)

    monkeypatch.setattr(fcntl, "lockf", deleted)
    reserve(tmp_path)
    assert (tmp_path / ".lock").exists()
    abandon(tmp_path)


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_start_that_is_given_up_leaves_the_run_as_it_was(tmp_path, overwrite):
    """A resumed run may have written the files of its start-up again, an overwriting one
    all of them.
    """
    out = a_run(tmp_path / "out", "tokenizer")
    with untouched(out):
        reserve(out).prepare(overwrite, not overwrite)
        for name in ("tokenizer", "ledger", "base"):
            if (out / name / "file").exists():
                (out / name / "file").unlink()
            put(out, name, "new")
        abandon(out)


def test_sums_of_merges_are_set_aside_by_links_alone(tmp_path, monkeypatch):
    """They are as large as the model: where there are no links, a start that is given up
    loses them.
    """
    out = a_run(tmp_path / "out")
    (out / "ledger/sums").mkdir(parents=True)
    (out / "ledger/sums/0-rank-00000.safetensors").write_text("sums")
    with untouched(out):
        reserve(out).prepare(False, True)
        abandon(out)
    monkeypatch.setattr(os, "link", mock.Mock(side_effect=OSError(errno.EPERM, "")))
    reserve(out).prepare(False, True)
    aside = out / ".overwritten/ledger"
    assert not list((aside / "sums").iterdir())
    assert (aside / "file").exists()
    abandon(out)


def test_overwriting_removes_what_the_run_has_made(tmp_path):
    out = a_run(tmp_path / "out", "tokenizer")
    put(out, "notes.txt", "mine")
    reservation = reserve(out)
    reservation.prepare(True, False)
    reservation.commit()
    assert {path.name for path in out.iterdir()} == {"notes.txt", ".lock"}
    forget(out)


@pytest.mark.parametrize("name", ["base", "tokenizer"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_what_the_run_in_the_folder_has_not_made_is_the_users(
    tmp_path, name, overwrite
):
    out = a_run(tmp_path / "out")
    put(out, name, "mine")
    with untouched(out), user_error(f"{name}, which the run there has not made"):
        prepared(out, overwrite, not overwrite)


def killed(folder, work):
    """A start-up that ends there without a word, and the next one's repair."""
    work()
    forget(folder)
    reserve(folder)
    forget(folder)


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_start_that_was_killed_is_undone_by_the_next_one(tmp_path, overwrite):
    out = a_run(tmp_path / "out", "tokenizer")
    put(
        out,
        "merged",
        "the user's, made from a checkpoint of a run that exports nothing",
    )
    before = snapshot(out)

    def start():
        reserve(out).prepare(overwrite, not overwrite)
        (out / "tokenizer/file").unlink(missing_ok=True)
        put(out, "tokenizer", "new")

    killed(out, start)
    assert snapshot(out) == before


def test_a_first_start_that_was_killed_leaves_nothing(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")

    def start():
        reserve(tmp_path).prepare(False, True)
        put(tmp_path, "base", "new")

    killed(tmp_path, start)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", ".lock"}


def orphan(folder, seconds):
    """The process of another rank, which is left for some time; it has joined when this
    returns.
    """
    reader, writer = os.pipe()
    if child := os.fork():
        assert os.read(reader, 1) == b"1"
        return child
    join(folder)
    os.write(writer, b"1")
    time.sleep(seconds)
    os._exit(0)


def test_a_run_begins_when_all_ranks_of_the_earlier_one_have_ended(
    tmp_path, monkeypatch
):
    """Rank 0's lock has gone with it; another one may still be writing its shard."""
    out = a_run(tmp_path / "out")
    child = orphan(out, 2)
    monkeypatch.setattr(output_folder, "_ORPHANS_S", 0.2)
    with untouched(out), user_error(rf"alive \(process {child}\)"):
        reserve(out)
    monkeypatch.setattr(output_folder, "_ORPHANS_S", 60)
    reserve(out)
    assert os.waitpid(child, os.WNOHANG)[0] == child, "it was waited for"
    abandon(out)


def test_a_rank_that_gives_the_folder_up_holds_it_no_longer(tmp_path):
    out = a_run(tmp_path / "out")
    join(out)
    join(out)
    release(out)
    reserve(out)
    abandon(out)
    join(tmp_path / "a node that does not see it")


@pytest.mark.parametrize(
    "files", ["a.txt", "shared/config.json a.txt", "shared/config.json b/a.txt"]
)
def test_a_merged_folder_that_is_no_model_is_refused_before_training(tmp_path, files):
    out = a_run(tmp_path / "out")
    for file in files.split():
        put(out / "merged", file, "{}")
    with untouched(out), user_error("--export_merged"):
        prepared(out, False, True, True)


@pytest.mark.parametrize(
    "files", ["", "config.json a.txt", "shared/config.json b/config.json"]
)
def test_models_are_replaced(merged, files):
    for file in files.split():
        put(merged, file, "{}")
    check_merged(merged)
