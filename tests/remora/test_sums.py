"""The kept sums of merged weights: merges and resumes that cost one cycle, with the bits of
a replay, whatever becomes of the files.
"""

import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.common.tensor_files import SafetensorsWriter
from mora_ds.engine.initialize import initialize
from mora_ds.models.base import BaseCheckpoint
from mora_ds.remora import sums
from mora_ds.remora.ledger import Ledger
from mora_ds.remora.merge import ReMoRA
from mora_ds.train.run import Run
from tests.helpers.crafted import change_header
from tests.helpers.damage import cut, flip
from tests.helpers.engines import (
    assert_replayed,
    ds_config,
    half_precision,
    merging_run,
)
from tests.helpers.gloo import run_alone, run_ranks
from tests.helpers.models import micro_step, tiny_model, tokens
from tests.helpers.pool import run_pooled

CONFIG = MoRAConfig(rank=4, operator="share", grouping="permuted")
MERGES = 5


@contextmanager
def cycles_read():
    """The cycles whose matrices are read from the ledger within the block."""
    read = []
    original = Ledger.mora_matrix

    def counted(ledger, cycle, module):
        read.append(cycle)
        return original(ledger, cycle, module)

    with mock.patch.object(Ledger, "mora_matrix", counted):
        yield read


def merged(folder, config=CONFIG, dtype="bfloat16", room=None):
    """(result of `merging_run`, cycles that its merges read, ledger files mapped)"""
    disk = mock.patch.object(
        sums.shutil, "disk_usage", lambda path: SimpleNamespace(free=room)
    )
    with cycles_read() as read:
        if room is None:
            result = merging_run(folder, config, 3, dtype, MERGES)
        else:
            with disk:
                result = merging_run(folder, config, 3, dtype, MERGES)
    return result, read, mapped_cycles()


def mapped_cycles():
    return Path("/proc/self/maps").read_text().count("cycle-")


def resumed(folder, config=CONFIG, dtype="bfloat16"):
    """(weights of a run that goes on, cycles read, cycles read by its next merges, whether
    sums of the newest checkpoint are there after each)"""
    model = tiny_model("llama", dtype=getattr(torch, dtype))
    inject(model, config)
    engine, *_ = initialize(
        model=model, config=ds_config(3, 2, 1, **half_precision(dtype))
    )
    folder = Path(folder)
    with cycles_read() as read:
        run = Run(
            engine,
            base=folder / "base",
            folder=folder / "out",
            resume=folder / "out/checkpoints/latest",
        )
    weights = {name: layer.weight.clone() for name, layer in mora_layers(model).items()}
    has_sums = []
    with cycles_read() as read_by_merge:
        for step in (MERGES + 1, MERGES + 2):
            micro_step(engine, tokens(2))
            run.merge(step)
            head = Ledger.open(folder / "out/checkpoints/latest/ledger").head
            has_sums.append(any((folder / "out/ledger/sums").glob(f"{head}-*")))
            run.save(step)
    return weights, read, read_by_merge, has_sums


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, *run_alone(merged, str(folder))


def test_a_merge_reads_no_earlier_cycle(run):
    folder, result, read, mapped = run
    assert read == []
    assert mapped == 0, "files of cycles stay mapped"
    assert_replayed([result], folder)
    assert len(list((folder / "out/ledger/sums").iterdir())) == 1, "one cycle's sums"


def gone(path):
    path.unlink()


def of_another_run(path):
    path.rename(path.with_name("0" * 64 + "-rank-00000.safetensors"))


def without_a_checksum(path):
    path.write_bytes(path.read_bytes().replace(b'.checksum"', b'.chebksum"', 1))


def of_integers(path):
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))


def of_another_shape(path):
    """With the checksum of its bytes."""

    def change(header):
        name = min(name for name in header if name.endswith("proj"))
        rows, columns = header[name]["shape"]
        header[name]["shape"] = [rows * columns, 1]

    change_header(path, change)


def a_link(path):
    path.rename(path.with_name("kept"))
    path.symlink_to(path.with_name("kept"))


@pytest.mark.parametrize(
    "damage",
    [
        None,
        gone,
        cut,
        flip,
        without_a_checksum,
        of_integers,
        of_another_shape,
        of_another_run,
        a_link,
    ],
    ids=lambda damage: getattr(damage, "__name__", "none"),
)
def test_a_resume_has_the_same_bits_whatever_became_of_the_sums(run, tmp_path, damage):
    folder, result, *_ = run
    copy = tmp_path / "run"
    shutil.copytree(folder, copy, symlinks=True)
    for rank in range(2):
        # A run of two ranks was killed
        (copy / f"out/ledger/sums/.rank-0000{rank}.safetensors.partial").touch()
    if damage is not None:
        (file,) = (copy / "out/ledger/sums").glob("*-rank-*")
        damage(file)
    weights, read, read_by_merge, has_sums = run_alone(resumed, str(copy))
    assert not list((copy / "out/ledger/sums").glob("*.partial"))
    for name, weight in result["weights"].items():
        assert torch.equal(weights[name], weight), name
    assert bool(read) == (damage is not None)
    if damage in (flip, of_integers, of_another_shape):
        # The one layer that is damaged is formed again, and the file is gone
        assert len(read) == MERGES
        assert set(read_by_merge) == set(range(MERGES))
    else:
        assert read_by_merge == [], "a replay keeps its sums"
        assert has_sums == [True, True], "a killed run goes on from them"


def test_without_room_for_all_sums_merges_replay_the_ledger(run, tmp_path):
    folder, *_ = run
    (file,) = (folder / "out/ledger/sums").iterdir()
    room = 2 * file.stat().st_size
    # Three times the sums of one of the two would fit
    ranks = run_ranks(2, merged, str(tmp_path), CONFIG, "bfloat16", room)
    assert_replayed([result for result, *_ in ranks], tmp_path)
    for _, read, _ in ranks:
        assert set(read) == set(range(MERGES - 1))
    assert not list((tmp_path / "out/ledger/sums").iterdir())


def test_processes_of_a_node_keep_the_sums_of_the_layers_that_they_form(tmp_path):
    ranks = run_ranks(2, merged, str(tmp_path))
    assert [read for _, read, _ in ranks] == [[], []]
    assert_replayed([result for result, *_ in ranks], tmp_path)
    names = sorted(path.name for path in (tmp_path / "out/ledger/sums").iterdir())
    head = Ledger.open(tmp_path / "out/ledger").head
    assert names == [f"{head}-rank-0000{rank}.safetensors" for rank in range(2)]


def with_a_late_rank(folder, method, *arguments):
    """Whether the last rank had come, once this one has called a method."""
    come = folder / "come"
    ledger = SimpleNamespace(
        folder=folder,
        head="",
        append=lambda *_: None,
        records=[SimpleNamespace(sha256="0" * 64, size=0)],
        follow=lambda *_: None,
    )
    engine = SimpleNamespace(device="cpu", module=torch.nn.Module())
    remora = ReMoRA(engine, CONFIG, ledger, None, {})
    remora._rebuild_weights = lambda *_, **__: {}
    dist.barrier()
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(0.5)
        come.touch()
    getattr(remora, method)(*arguments)
    return come.exists()


@pytest.mark.parametrize("call", [("_record", 1, {}, {}), ("rebuild_base",)])
def test_rank_0_deletes_no_sum_that_another_rank_still_reads(tmp_path, call):
    """On another node it would lose a file that it has mapped."""
    assert run_pooled(4, with_a_late_rank, tmp_path, *call) == [True] * 4


def test_bases_of_8_bits_are_quantized_from_the_sum(tmp_path):
    config = MoRAConfig(rank=4, operator="share", base_bits=8)
    result, read, _ = run_alone(merged, str(tmp_path), config)
    assert read == []
    weights, *_ = run_alone(resumed, str(tmp_path), config)
    for name, weight in result["weights"].items():
        assert torch.equal(weights[name], weight), name


def test_a_ledger_is_checked_without_staying_in_memory(run):
    folder, *_ = run
    ledger = Ledger.open(folder / "out/ledger")
    assert mapped_cycles() == 0
    base = BaseCheckpoint.open(folder / "base")
    assert ledger.base_fingerprint == base.fingerprint()


def filling_up(folder, method):
    """Merges while the disk fills up at the third sum of each, or shows it when the file
    is closed, as one of another machine may."""
    original = getattr(SafetensorsWriter, method)

    def full(writer, *args):
        name = args[0] or "k_proj.checksum"
        of_sums = any(key.endswith(".checksum") for key in writer.layout)
        if of_sums and name.endswith("k_proj.checksum"):
            writer._file.close()
            raise OSError(28, os.strerror(28))
        return original(writer, *args)

    with mock.patch.object(SafetensorsWriter, method, full):
        return merged(folder)


@pytest.mark.parametrize("method", ["write", "__exit__"])
def test_a_full_disk_costs_the_sums_alone(tmp_path, method):
    result, read, _ = run_alone(filling_up, str(tmp_path), method)
    assert_replayed([result], tmp_path)
    assert read
    assert not list((tmp_path / "out/ledger/sums").iterdir())
