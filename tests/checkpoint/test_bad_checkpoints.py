"""Checkpoints that a run cannot go on from are named, and nothing changes: without a
manifest, with a foreign section, without one of its own, of another format.
"""

import shutil

import pytest

from mora_ds.checkpoint.manager import CheckpointManager, complete_checkpoints
from mora_ds.checkpoint.storage import local_copy, storage_of
from mora_ds.checkpoint.verify import verify
from mora_ds.common.files import FORMAT, MANIFEST, write_manifest
from mora_ds.deploy.export import export_merged
from tests.helpers.damage import change_json, checkpoint_at
from tests.helpers.errors import user_error
from tests.helpers.gloo import run_alone, run_ranks
from tests.helpers.jobs import golden_flags, refused, refused_each, run
from tests.helpers.outcome import assert_same_outcome
from tests.helpers.stores import OVER_STORES, shown, stored


def without_manifest(folder):
    (folder / MANIFEST).unlink()


def foreign_section(folder):
    (folder / "critic").mkdir()
    (folder / "critic/value.json").write_text("{}")
    write_manifest(folder)


def without_ledger(folder):
    shutil.rmtree(folder / "ledger")
    write_manifest(folder)


def last_format(folder):
    change_json(folder / MANIFEST, lambda content: content.update(format=FORMAT - 1))


BAD = {
    without_manifest: "which has no manifest.json: it was never saved to the end",
    foreign_section: "manifest.json lists critic, which is of no section that this run has",
    without_ledger: "manifest.json: the section ledger is missing, it lists no ledger",
    last_format: f"manifest.json has format {FORMAT - 1}; mora_ds",
}


USER_ERRORS = ("UserError", "OtherFormat")


@OVER_STORES
def test_a_run_does_not_go_on_from_it(user, golden, out, tmp_path):
    """Nor is its output folder made."""
    cases = []
    for harm in BAD:
        folder = tmp_path / harm.__name__ / "checkpoints/step-000006"
        shutil.copytree(golden / "checkpoints/step-000006", folder)
        harm(folder)
        stored(folder.parents[1])
        cases.append(golden_flags(user, out, "--resume_from_checkpoint", folder))
    for results in run_ranks(2, refused_each, cases):
        for (kind, message), words in zip(results, BAD.values(), strict=True):
            assert kind in USER_ERRORS
            assert words in message


@OVER_STORES
def test_auto_does_not_pass_over_another_format(user, golden, out):
    """It is not damaged, and an older checkpoint is no better."""
    shutil.copytree(golden, out, symlinks=True)
    last_format(out / "checkpoints/step-000006")
    stored(out)
    argv = golden_flags(user, out, "--resume_from_checkpoint auto")
    kind, message = run_alone(refused, argv)
    assert kind in USER_ERRORS
    assert "go on with the version that wrote it" in message


@OVER_STORES
def test_without_a_manifest_it_is_neither_verified_nor_exported(golden, out, merged):
    shutil.copytree(golden, out, symlinks=True)
    newest = out / "checkpoints/step-000006"
    without_manifest(newest)
    stored(out)
    steps = [verdict.folder.name for verdict in verify(out)]
    assert steps == ["step-000002", "step-000004"]
    with user_error("step-000006 has no manifest.json"):
        export_merged(local_copy(newest), merged)
    assert not merged.exists()


@OVER_STORES
def test_auto_passes_over_what_has_no_manifest_and_the_next_save_deletes_it(
    user, golden, out
):
    shutil.copytree(golden, out, symlinks=True)
    newest = out / "checkpoints/step-000006"
    without_manifest(newest)
    shutil.copytree(newest, out / "checkpoints/step-000003")
    stored(out)
    run(2, golden_flags(user, out, "--resume_from_checkpoint auto"))
    shown(out)
    assert_same_outcome(out, golden)


@OVER_STORES
def test_a_folder_is_a_checkpoint_when_it_is_committed(out):
    out.mkdir()
    store = storage_of(out / "checkpoints")
    for file in (".step-000002.writing/file", "step-000003/file"):
        with store.write(file) as path:
            path.write_text("without a manifest")
    with pytest.raises(OSError), store.write("step-000003/another") as path:
        path.write_text("half")
        raise OSError
    assert list(store.sizes("step-000003")) == ["file"]
    assert complete_checkpoints(store.root) == []
    for file in checkpoint_at(out, 2).iterdir():
        store.put(f".step-000002.writing/{file.name}", file)
    store.commit(".step-000002.writing", "step-000002")
    (checkpoint,) = complete_checkpoints(store.root)
    assert CheckpointManager.verify(checkpoint) == []
