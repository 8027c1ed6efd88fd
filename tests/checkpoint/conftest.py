"""A run's folder with a merge ledger, made without training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mora_ds.remora.ledger import Ledger
from tests.helpers.exports import FakeRun, fake_run


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    """Three cycles, every kind of operator, live squares, a run's own ledger beside its checkpoint. Not written to."""
    run = fake_run(tmp_path_factory.mktemp("run"), cycles=3, num_hidden_layers=1, trained=("model.norm.weight",))
    Ledger.open(run.checkpoint / "ledger").copy_to(run.output / "ledger")
    return run


@pytest.fixture
def copied(original: FakeRun, tmp_path: Path) -> Path:
    """The run's output folder, free to be damaged; its base lies at the same relative place."""
    shutil.copytree(original.base, tmp_path / "base")
    shutil.copytree(original.output, tmp_path / "out", symlinks=True)
    return tmp_path / "out"
