"""The damage matrix: every kind of file cut, flipped in a bit or deleted; found, named,
passed over, never trained on.

What `auto` passes over and `latest` refuses is decided without an engine, so most cases
only copy a finished run.

One file because all of them share that run.
"""

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

from mora_ds.checkpoint.adapter_files import BaseReference
from mora_ds.checkpoint.manager import complete_checkpoints, resume_checkpoint
from mora_ds.checkpoint.storage import local_copy
from mora_ds.common.errors import RunError, UserError
from mora_ds.data import build_cache, load_corpus, load_tokenizer
from mora_ds.deploy.export import export_merged
from mora_ds.remora.ledger import Ledger
from tests.helpers.damage import HARMS, change_json, cut, flip, gone, make_own, mount
from tests.helpers.errors import run_error, user_error
from tests.helpers.gloo import run_alone, run_ranks
from tests.helpers.jobs import (
    golden_flags,
    output_of,
    refused,
    refused_each,
    rows,
    run,
    validation_errors_of,
)
from tests.helpers.outcome import assert_same_outcome, tree
from tests.helpers.resume import disturb
from tests.helpers.stores import (
    OVER_STORES,
    be_read_only,
    edited,
    in_memory,
    stored,
)


@pytest.fixture
def out(golden, out):
    """A copy in which files with several names are still one file each."""
    subprocess.run(["cp", "-a", str(golden), str(out)], check=True)
    stored(out)
    return out


KINDS = (
    "adapter.json",
    "adapter.safetensors",
    "base.json",
    "probe.safetensors",
    "trainer_state.json",
    "manifest.json",
    "ledger/ledger.json",
    "ledger/cycle-00001.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "engine/layouts.safetensors",
    *(f"engine/rank-{rank:05d}.safetensors" for rank in (0, 1)),
)


def test_every_file_of_a_checkpoint_has_its_case(golden):
    checkpoint = golden / "checkpoints/step-000006"
    files = {
        str(path.relative_to(checkpoint))
        for path in checkpoint.rglob("*")
        if path.is_file()
    }
    assert files - set(KINDS) == {"ledger/cycle-00000.safetensors"}
    assert not set(KINDS) - files


# -- a checkpoint ----------------------------------------------------------------------


@OVER_STORES
@pytest.mark.parametrize(
    "kind, harm", list(zip(KINDS, itertools.cycle(HARMS), strict=False))
)
def test_a_damaged_checkpoint_is_passed_over_and_refused(out, kind, harm, caplog):
    root = out / "checkpoints"
    with edited(out, f"step-000006/{kind}") as damaged:
        make_own(damaged)
        HARMS[harm](damaged)
    assert resume_checkpoint("auto", root) == root / "step-000004"
    (line,) = caplog.messages
    assert line.startswith(f"skipped {root / 'step-000006'}: ")
    assert kind in line
    asked = (
        ["latest", str(root / "step-000006")]
        if kind != "manifest.json" or harm != "gone"
        else []
    )
    for wanted in asked:
        with user_error("step-000006 is damaged") as caught:
            resume_checkpoint(wanted, root)
        assert kind in str(caught.value)
        assert "--resume_from_checkpoint auto" in str(caught.value)
    # An export reads no shards and no random states: of these it sees the size alone.
    if asked and (harm != "flip" or not kind.startswith("engine/")):
        with pytest.raises((UserError, RunError)):
            export_merged(local_copy(root / "step-000006"), out / "merged")
        assert not (out / "merged").exists()


def edit(checkpoint, change):
    change_json(checkpoint / "manifest.json", change)


def lose(checkpoint, name):
    """From the manifest and from the folder."""
    (checkpoint / name).unlink()
    edit(checkpoint, lambda content: content["files"].pop(name))


EDITS = {
    "shard in neither": lambda folder: lose(folder, KINDS[-1]),
    "one hash missing": lambda folder: edit(
        folder, lambda content: content["files"].pop(KINDS[-1])
    ),
    "another size": lambda folder: edit(
        folder, lambda content: content["files"]["base.json"].update(size=1)
    ),
}


@OVER_STORES
@pytest.mark.parametrize("change", EDITS)
def test_a_manifest_that_is_not_the_one_written(out, change, caplog):
    root = out / "checkpoints"
    with edited(out, "step-000006") as checkpoint:
        EDITS[change](checkpoint)
    assert resume_checkpoint("auto", root) == root / "step-000004"
    assert "manifest.json" in caplog.messages[0]
    with user_error(r"manifest\.json"):
        resume_checkpoint("latest", root)


def test_auto_does_not_begin_afresh_where_a_damaged_cycle_is_linked_on_a_disk(
    user, out
):
    """Both cycles are one file with four names each: a damaged first one leaves nothing to
    go on from.
    """
    root = out / "checkpoints"
    flip(out / "ledger/cycle-00000.safetensors", 0.9)
    argv = golden_flags(user, out, "--resume_from_checkpoint", "auto")
    message = validation_errors_of(argv, ranks=2)
    assert f"no checkpoint in {root} is intact" in message
    for step in (2, 4, 6):
        assert f"step-00000{step}/ledger/cycle-00000.safetensors" in message


def test_auto_goes_back_to_before_a_damaged_cycle_that_is_linked_on_a_disk(
    user, golden, out, caplog
):
    """The run's own ledger, two checkpoints and their cycle share the damage, and the list
    of that ledger is cut short too; the run is the same in the end.
    """
    flip(out / "ledger/cycle-00001.safetensors", 0.9)
    make_own(out / "ledger/ledger.json")
    cut(out / "ledger/ledger.json")
    assert (
        resume_checkpoint("auto", out / "checkpoints")
        == out / "checkpoints/step-000002"
    )
    assert len(caplog.messages) == 2
    run(2, golden_flags(user, out, "--resume_from_checkpoint", "auto"))
    assert_same_outcome(out, golden)


# -- latest ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", [None, "step-000099", "../elsewhere/step-000008", "../elsewhere"]
)
def test_a_link_latest_on_a_disk_that_leads_nowhere_or_elsewhere(out, target):
    root = out / "checkpoints"
    shutil.copytree(root / "step-000006", out / "elsewhere/step-000008")
    (root / "latest").unlink()
    if target is not None:
        (root / "latest").symlink_to(target)
    assert resume_checkpoint("auto", root) == root / "step-000006"
    with user_error("--resume_from_checkpoint latest: "):
        resume_checkpoint("latest", root)


# -- the run's ledger ------------------------------------------------------------------


def harmed_job(argv):
    """A run whose first cycle is damaged after step 3. For `run_ranks`."""
    cycle = output_of(argv) / "ledger/cycle-00000.safetensors"
    disturb(3, lambda trainer: flip(cycle))
    return refused(argv, may_change=True)


def test_a_ledger_that_is_damaged_while_the_run_goes_on(user, tmp_path):
    """A low bit of one number: the merge's probe does not see it, the next checkpoint does,
    and is not written.
    """
    out = tmp_path / "out"
    kind, message = run_alone(harmed_job, golden_flags(user, out))
    assert kind in ("RunError", "UserError")
    assert "cycle-00000.safetensors" in message
    assert [path.name for path in complete_checkpoints(out / "checkpoints")] == [
        "step-000002"
    ]
    assert not list((out / "checkpoints").glob(".*"))


# -- metrics ---------------------------------------------------------------------------


def test_a_damaged_row_of_metrics_costs_that_row_alone(user, golden, out):
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[2] = b"\xff" + lines[2][1:]
    (out / "metrics.jsonl").write_bytes(b"".join([*lines, b"7\n", b'{"step":']))
    run(2, golden_flags(user, out, "--resume_from_checkpoint", "auto"))
    wanted = rows(golden)
    assert rows(out) == wanted[:2] + wanted[3:]


# -- the base --------------------------------------------------------------------------


def another_rope(path):
    """Valid JSON, the same weights, another model."""
    change_json(
        path, lambda content: content["rope_parameters"].update(rope_theta=12345.0)
    )


BASES = [
    ("model.safetensors", cut, "model.safetensors"),
    ("model.safetensors", flip, "weights of --model_name_or_path"),
    ("model.safetensors", gone, "--model_name_or_path"),
    ("config.json", cut, "config.json"),
    ("config.json", another_rope, "config.json of --model_name_or_path"),
    ("config.json", gone, "config.json"),
    ("tokenizer.json", cut, "--model_name_or_path"),
    ("tokenizer.json", gone, "--model_name_or_path"),
]


def test_a_damaged_base_is_not_trained_on(user, out, tmp_path):
    cases = []
    for index, (name, harm, _) in enumerate(BASES):
        folder = Path(shutil.copytree(user.model, tmp_path / f"base-{index}"))
        harm(folder / name)
        more = ("--resume_from_checkpoint auto --model_name_or_path", folder)
        cases.append(golden_flags(user, out, *more))
    before = tree(out)
    for results in run_ranks(2, refused_each, cases):
        for (kind, message), (name, harm, words) in zip(results, BASES, strict=True):
            assert kind == "UserError", (name, harm.__name__, message)
            assert words in message, (name, harm.__name__, message)
    assert tree(out) == before
    same = Path(shutil.copytree(user.model, tmp_path / "elsewhere"))
    change_json(
        same / "config.json",
        lambda content: content.update(transformers_version="5.99.0"),
    )
    latest = (
        "--resume_from_checkpoint",
        out / "checkpoints/step-000004",
        "--model_name_or_path",
        same,
    )
    run(2, golden_flags(user, out, *latest))
    assert BaseReference.read(out / "checkpoints/step-000006").folder == str(
        same.resolve()
    )


# -- disks -----------------------------------------------------------------------------


@pytest.fixture
def read_only():
    mounted = []

    def freeze(folder):
        mount(folder, "--bind", str(folder))
        mounted.append(folder)
        mount(folder, "-o", "remount,bind,ro")

    yield freeze
    for mount_point in reversed(mounted):
        subprocess.run(["umount", "-l", str(mount_point)], check=True)


def fill(disk, free_bytes):
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - free_bytes))


def test_a_cache_on_a_full_disk(user, disk):
    fill(disk, 16_384)
    with pytest.raises((RunError, UserError), match=f"{disk}"):
        build_cache(
            load_corpus([str(user.train)]), load_tokenizer(user.model), disk / "cache"
        )
    assert not list((disk / "cache").glob("*partial*"))


def test_a_cycle_on_a_full_disk(out, disk):
    book = Ledger.open(out / "ledger").copy_to(disk / "ledger")
    fill(disk, 4_096)
    mora_matrices = {name: book.mora_matrix(1, name) for name in book.layers(1)}
    before = tree(disk / "ledger")
    with run_error(f"{disk / 'ledger'} is full"):
        book.append(9, book.layers(1), mora_matrices.items())
    assert tree(disk / "ledger") == before
    assert Ledger.open(disk / "ledger").cycles == book.cycles == 2


def test_an_export_onto_a_full_disk_leaves_the_old_one(golden, disk):
    export_merged(golden, disk / "merged")
    fill(disk, 16_384)
    before = tree(disk)
    with run_error("full"):
        export_merged(golden, disk / "merged", overwrite=True)
    assert tree(disk) == before


def test_an_output_folder_that_cannot_be_written_to(user, out, read_only):
    (out / "checkpoints/.step-000008.writing").mkdir()
    read_only(out)
    for more in ("--resume_from_checkpoint auto", "--overwrite_output_dir", "--seed 1"):
        message = validation_errors_of(golden_flags(user, out, more))
        assert f"--output_dir {out} cannot be written to" in message


def frozen_job(argv, folder):
    """A run during which the file system of a folder becomes read-only, after step 3. For
    `run_ranks`.
    """

    def freeze(trainer):
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)

    disturb(3, freeze)
    return refused(argv)


@pytest.mark.parametrize(
    "name, newest", [("checkpoints", "step-000002"), ("ledger", "step-000004")]
)
def test_a_folder_that_becomes_read_only(
    user, golden, tmp_path, read_only, name, newest
):
    """The checkpoint of step 4 is written before the merge of step 4, which the ledger
    cannot take.
    """
    out = tmp_path / "out"
    probe = tmp_path / "probe"
    probe.mkdir()
    read_only(probe)  # skips where mounting is not allowed
    argv = golden_flags(user, out)
    kind, message = run_alone(frozen_job, argv, str(out / name))
    subprocess.run(["umount", "-l", str(out / name)], check=True)
    assert kind == "RunError"
    assert f"writing to {out / name} failed" in message
    assert "Read-only" in message
    assert (
        resume_checkpoint("latest", out / "checkpoints") == out / "checkpoints" / newest
    )
    assert run(1, [*argv, "--resume_from_checkpoint", "auto"])["steps"] == 6


def frozen_store_job(argv):
    """A run whose storage takes nothing after step 3. For `run_ranks`."""
    disturb(3, lambda trainer: be_read_only(output_of(argv)))
    return refused(argv)


def test_a_storage_that_becomes_read_only(user, tmp_path):
    """As a folder on a disk."""
    out = tmp_path / "out"
    argv = golden_flags(user, out)
    with in_memory(tmp_path):
        kind, message = run_alone(frozen_store_job, argv)
        assert kind == "RunError"
        assert f"writing to {out / 'checkpoints'} failed" in message
        assert "Read-only" in message
        be_read_only(out, False)
        newest = resume_checkpoint("latest", out / "checkpoints")
        assert newest == out / "checkpoints/step-000002"
        again = run(1, [*argv, "--resume_from_checkpoint", "auto"])
        assert again["steps"] == 6


def test_a_shared_cache_may_be_read_only(user, tmp_path, read_only):
    cache = tmp_path / "cache"
    more = ("--max_steps 3 --cache_dir", cache)
    run(1, golden_flags(user, tmp_path / "first", *more))
    read_only(cache)
    run(1, golden_flags(user, tmp_path / "second", *more))
    other_text = golden_flags(
        user, tmp_path / "third", *more, "--train_files", user.held
    )
    words = f"--cache_dir {cache} cannot be written to: Read-only file system"
    assert words in validation_errors_of(other_text)
