"""One run of two ranks that the tests of checkpoints share, and one that was made without
training.
"""

import subprocess

import pytest

from mora_ds.remora.ledger import Ledger
from tests.helpers.damage import mount
from tests.helpers.exports import fake_run
from tests.helpers.jobs import golden_flags, playground, run


@pytest.fixture(scope="session")
def user(tmp_path_factory):
    """One for all files of this folder, none of which changes it."""
    return playground(tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="session")
def golden(user, tmp_path_factory):
    """The output folder of a run with `golden_flags`. Not written to."""
    out = tmp_path_factory.mktemp("golden") / "out"
    run(2, golden_flags(user, out))
    return out


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Three cycles, every kind of operator, current MoRA matrices, a run's own ledger next to its
    checkpoint. Not written to.
    """
    run = fake_run(
        tmp_path_factory.mktemp("run"),
        cycles=3,
        num_hidden_layers=1,
        trained=("model.norm.weight",),
    )
    Ledger.open(run.checkpoint / "ledger").copy_to(run.output / "ledger")
    return run


@pytest.fixture
def disk(tmp_path):
    """A file system of 1 MiB."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    mount(mount_point, "-t", "tmpfs", "-o", "size=1m", "tmpfs")
    yield mount_point
    subprocess.run(["umount", "-l", str(mount_point)], check=True)
