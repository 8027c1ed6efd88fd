"""Output folders that come from someone else: nothing outside of them is touched, and
nothing in them waits or is written through.
"""

import os
import shutil
from unittest import mock

import pytest
import yaml

from mora_ds.common.untrusted import read_text
from mora_ds.engine.ds_config import load_ds_config
from mora_ds.models.load import read_model_config
from mora_ds.train.metrics import MetricsLog
from mora_ds.train.output_folder import LOCK, STARTING, reserve
from tests.helpers.errors import user_error
from tests.helpers.folders import a_run, forget, prepared, put
from tests.helpers.snapshot import untouched


@pytest.mark.parametrize("name", ["../precious", "notes", "checkpoints/../../precious"])
def test_overwriting_leaves_what_no_run_makes(tmp_path, name):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    out = a_run(tmp_path / "out")
    put(out, "notes", "mine")
    path = out / "run.yaml"
    content = yaml.safe_load(path.read_text())
    content["resolved"]["owns"].append(name)
    path.write_text(yaml.safe_dump(content))
    with untouched(precious), untouched(out / "notes"):
        reservation = reserve(out)
        reservation.prepare(True, False)
        reservation.commit()
        forget(out)


@pytest.mark.parametrize(
    "name",
    [".overwritten", ".deleting", "ledger", "ledger/sums", "checkpoints", "base"],
)
def test_nothing_is_moved_deleted_or_written_through_a_linked_folder(tmp_path, name):
    other = a_run(tmp_path / "other")
    out = a_run(tmp_path / "out")
    shutil.rmtree(out / name, ignore_errors=True)
    (out / name).symlink_to(other)
    with (
        untouched(other),
        user_error(f"{name} is a link, and a run does not write through links"),
    ):
        prepared(out, False, True)


def test_a_link_to_another_run_s_settings_is_refused(tmp_path):
    other = a_run(tmp_path / "other")
    out = tmp_path / "out"
    put(out, "metrics.jsonl", "mine")
    (out / "run.yaml").symlink_to(other / "run.yaml")
    with untouched(tmp_path), user_error("run.yaml is a link"):
        prepared(out, True, False)


@pytest.mark.parametrize("name", [LOCK, STARTING])
def test_no_file_is_written_through_a_link(tmp_path, name):
    target = tmp_path / "target"
    out = tmp_path / "out"
    out.mkdir()
    (out / name).symlink_to(target)
    try:
        prepared(out, False, False)
    except ValueError as error:
        assert "cannot be written to" in str(error)
    forget(out)
    assert not target.exists()


def test_a_lost_run_yaml_has_a_way_on(tmp_path):
    out = a_run(tmp_path / "out")
    (out / "run.yaml").unlink()
    with user_error(
        rf"--output_dir NEW --resume_from_checkpoint {out}/checkpoints/latest"
    ):
        reserve(out)


READERS = {
    "deepspeed": load_ds_config,
    "model_config": read_model_config,
    "text": read_text,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
def test_a_file_that_never_ends_is_refused(tmp_path, read, kind):
    path = tmp_path / "file.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(2**40)
    with user_error("is no file|is larger than"):
        read(path)


def test_a_log_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with user_error("is no file"):
        MetricsLog(tmp_path, 9, True, start_step=3)


class FullDisk:
    """A file on a disk that takes some bytes of the next row, and then no more."""

    def __init__(self, file, taken):
        self.file = file
        self.taken = taken

    def write(self, line):
        if self.taken is None:
            raise OSError(28, os.strerror(28))
        return self.file.write(line[: self.taken])

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("taken", [None, 0, 7])
def test_a_full_disk_costs_a_row_and_not_the_run(tmp_path, caplog, taken):
    log = MetricsLog(tmp_path, 9, True)
    log.record("merge", 1, {})
    with mock.patch.object(log, "_file", FullDisk(log._file, taken)):
        log.record("merge", 2, {})
    log.record("merge", 3, {})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [yaml.safe_load(line)["step"] for line in lines] == [1, 3]
    assert "a row of" in caplog.text
