"""What a checkpoint holds, and on a disk: its files and links, what is flushed when, and
what a full disk does.
"""

import os
import shutil
import time
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mora_ds.checkpoint import storage as storages
from mora_ds.checkpoint.manager import CheckpointManager, complete_checkpoints
from mora_ds.common.files import verify_manifest
from mora_ds.runtime.ranks import Ranks
from tests.helpers.gloo import run_alone
from tests.helpers.jobs import job, refused
from tests.helpers.pool import run_pooled

# -- what it holds ---------------------------------------------------------------------


def test_a_checkpoint_holds_no_base_weight(user, golden):
    """No tensor has the shape of one, none is large enough to hide one, no float of one
    stands in a row anywhere.
    """
    base = AutoModelForCausalLM.from_pretrained(user.model)
    frozen = {
        name: tensor for name, tensor in base.named_parameters() if "norm" not in name
    }
    shapes = {tensor.shape for tensor in frozen.values()}
    checkpoint = (golden / "checkpoints/latest").resolve()
    tensor_files = list(checkpoint.rglob("*.safetensors"))
    assert {path.parent.name for path in tensor_files} >= {"engine", "ledger"}
    for path in tensor_files:
        for name, tensor in load_file(path).items():
            assert tensor.shape not in shapes, path
            assert tensor.numel() <= 8 * 400 or name == "rng.cpu", path
    content = b"".join(path.read_bytes() for path in checkpoint.rglob("*.*"))
    for name, tensor in frozen.items():
        assert tensor.detach().numpy().tobytes()[:64] not in content, name


def test_its_files_and_links_on_a_disk(golden):
    checkpoint = golden / "checkpoints/latest"
    assert os.readlink(checkpoint) == "step-000006"
    assert [path.name for path in complete_checkpoints(golden / "checkpoints")] == [
        "step-000002",
        "step-000004",
        "step-000006",
    ]
    assert AutoTokenizer.from_pretrained(checkpoint / "tokenizer").eos_token == "</s>"
    assert not list((golden / "checkpoints").glob(".*")), "nothing half-written stays"
    cycle = golden / "ledger/cycle-00000.safetensors"
    assert (checkpoint / "ledger" / cycle.name).samefile(cycle), (
        "a link, not a copy a checkpoint"
    )


def save_after_a_slow_listing(root):
    storage = storages.LocalStorage(root)
    storage.repair = lambda: time.sleep(2)
    return CheckpointManager(storage, [], Ranks.current(timeout_s=1.0)).save(1)


def test_a_slow_listing_on_rank_0_is_waited_for(tmp_path):
    assert run_pooled(2, save_after_a_slow_listing, tmp_path) == 2 * [
        tmp_path / "step-000001"
    ]


def flushed_job(argv):
    """What a run flushes, renames and links, in order, from its first checkpoint's manifest
    on.
    """
    events = []
    flush = os.fsync
    rename = os.replace
    link = storages.replace_symlink

    def fsync(descriptor):
        flush(descriptor)
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def replace(source, target):
        rename(source, target)
        events.append(f"{source} -> {Path(target).name}")

    def replace_symlink(path, target):
        events.append(f"{path} links")
        link(path, target)

    os.fsync = fsync
    os.replace = replace
    storages.replace_symlink = replace_symlink
    job(argv)
    return events[
        next(index for index, event in enumerate(events) if "manifest.json" in event) :
    ]


def test_folders_on_a_disk_are_flushed_before_and_after_a_checkpoint_gets_its_name(
    user, out
):
    """Without it a power cut may leave the name of a checkpoint without its files, or a
    link to no checkpoint.
    """
    flags = "--max_steps 2 --save_steps 1 --save_total_limit 1"
    events = run_alone(flushed_job, user.flags(out, flags))
    renamed = next(
        index for index, event in enumerate(events) if " -> step-000002" in event
    )
    temporary = events[renamed].split(" -> ")[0]
    linked = next(
        index
        for index, event in enumerate(events)
        if event.endswith("latest links") and index > renamed
    )
    listed = max(
        index
        for index, event in enumerate(events[:renamed])
        if event.endswith(".manifest.json.partial")
    )
    assert {temporary, f"{temporary}/engine"} <= set(events[listed:renamed]), (
        "once more, when all their files are there"
    )
    assert str(out / "checkpoints") in events[renamed:linked]
    assert [path.name for path in complete_checkpoints(out / "checkpoints")] == [
        "step-000002"
    ]


# -- the disk --------------------------------------------------------------------------


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(user, disk):
    out = disk / "out"
    for ballast in range(2):
        (disk / f"ballast-{ballast}").write_bytes(bytes(7_000))
        argv = user.flags(out, "--save_steps 1 --max_steps 60 --logging_steps 60")
        kind, message = run_alone(refused, argv)
        assert kind == "RunError"
        assert f"the disk that holds {out}" in message
        assert "is full" in message
        complete = complete_checkpoints(out / "checkpoints")
        assert complete
        assert all(verify_manifest(folder) == [] for folder in complete)
        assert (out / "checkpoints/latest").resolve() == complete[-1]
        assert not list((out / "checkpoints").glob(".*")), (
            "half a checkpoint would keep the disk full"
        )
        shutil.rmtree(out)
