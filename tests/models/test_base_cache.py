"""--base_cache_dir: the model's files are copied to a node's own disk once, whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mora_ds.checkpoint.adapter_files import BaseReference
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.files import at_work
from mora_ds.models import base_cache
from mora_ds.models.base import BaseCheckpoint
from mora_ds.runtime.ranks import Ranks
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, losses, run

ALONE = Ranks(0, 1, 0, None, 1.0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (tmp_path / "blob").write_bytes(bytes(1000))
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")  # as the Hub's cache has it
    return folder


def test_it_is_copied_once_and_again_when_it_has_changed(model: Path, tmp_path: Path) -> None:
    first = base_cache.cached_base(model, tmp_path / "cache", ALONE)
    assert {path.name for path in first.iterdir()} == {"config.json", "model.safetensors"}
    assert not (first / "model.safetensors").is_symlink()
    made = (first / "config.json").stat().st_ino
    assert base_cache.cached_base(model, tmp_path / "cache", ALONE) == first
    assert (first / "config.json").stat().st_ino == made, "not copied a second time"
    (model / "config.json").write_text('{"other": 1}')
    second = base_cache.cached_base(model, tmp_path / "cache", ALONE)
    assert second != first and (second / "config.json").read_text() == '{"other": 1}'
    assert not list((tmp_path / "cache").glob(".*"))
    (model / "config.json").write_text('{"other": 2}')  # of the same size
    os.utime(model / "config.json", ns=(1, 1))
    third = base_cache.cached_base(model, tmp_path / "cache", ALONE)
    assert (third / "config.json").read_text() == '{"other": 2}'
    shutil.copytree(model, tmp_path / "twin" / "model", symlinks=True)
    assert base_cache.cached_base(tmp_path / "twin" / "model", tmp_path / "cache", ALONE) != third
    assert third.stat().st_mode & 0o777 == 0o755, "others on the node may read it"


def test_a_copy_that_fails_leaves_nothing_and_an_abandoned_one_goes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", lambda source, target: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(RunError, match="is full"):
            base_cache.cached_base(model, cache, ALONE)
    assert not list(cache.iterdir())
    left = cache / ".filling-killed"
    left.mkdir()
    (left / "model.safetensors").write_bytes(bytes(10))
    busy = cache / ".filling-busy"
    shutil.copytree(left, busy)
    with at_work(busy):
        base_cache.cached_base(model, cache, ALONE)
    assert not left.exists() and busy.exists() and len(list(cache.iterdir())) == 2


def test_a_cache_without_room_or_without_a_folder_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"--base_cache_dir .*cache: 0\.0 GB are needed"):
        base_cache.cached_base(model, tmp_path / "cache", ALONE)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--base_cache_dir"):
        base_cache.cached_base(model, tmp_path / "file" / "cache", ALONE)


def fingerprints(folder: str) -> tuple[str, str, int]:
    """(by all ranks together, by this one alone, tensors that this rank read for the first)"""
    base, read = BaseCheckpoint.open(folder), []
    original = base.read
    base.read = lambda key: (read.append(key), original(key))[1]  # type: ignore[method-assign, func-returns-value]
    return base.fingerprint(ranks=Ranks.current()), BaseCheckpoint.open(folder).fingerprint(), len(read)


@pytest.mark.gloo
def test_the_fingerprint_is_made_of_slices(user: Playground) -> None:
    found = run_ranks(3, fingerprints, str(user.model))
    assert len({value for together, alone, _ in found for value in (together, alone)}) == 1
    assert sum(count for _, _, count in found) == len(BaseCheckpoint.open(user.model).keys())
    assert all(count for _, _, count in found)


@pytest.mark.gloo
def test_a_run_reads_the_copy_and_names_the_original(user: Playground, tmp_path: Path) -> None:
    cache, out, plain = tmp_path / "cache", tmp_path / "out", tmp_path / "plain"
    more: tuple[Any, ...] = ("--max_steps", 2, "--save_steps", 2)
    run(2, user.flags(out, *more, "--base_cache_dir", cache))
    run(2, user.flags(plain, *more))
    assert torch.equal(losses(out), losses(plain))
    (copy,) = cache.iterdir()
    assert (copy / "model.safetensors").is_file()
    reference = BaseReference.read(out / "checkpoints" / "latest")
    assert Path(reference.folder) == user.model.resolve()
