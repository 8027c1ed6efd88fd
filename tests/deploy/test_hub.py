"""--push_to_hub, against a stand-in for the Hub: what is uploaded, who sees it, and a run
without a network.
"""

import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import create_autospec

import huggingface_hub
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from mora_ds.common.errors import NonFatalFailure
from mora_ds.common.files import read_json
from mora_ds.deploy.hub import push_folder
from tests.helpers.errors import run_error
from tests.helpers.exports import fake_run
from tests.helpers.gloo import run_alone
from tests.helpers.jobs import job
from tests.helpers.snapshot import snapshot
from tests.helpers.tools import call

TOKEN = "hf_SecretOfTheTest"
REPOSITORY = "someone/model"


NO_PERMISSION = OSError("401 Client Error: invalid username or password")
NO_NETWORK = HTTPError("connection refused")


@contextmanager
def uploads_to(folder, error=None):
    """Within it this process has a token, and uploads go to `folder`/REPOSITORY in place of
    the Hub, which may answer everything with an error. Calls that huggingface_hub's own
    methods would not take fail."""

    def create_repo(api, repo_id, *, private, exist_ok):
        if error is not None:
            raise error
        assert private
        assert exist_ok
        return f"https://hub.test/{repo_id}"

    def upload_folder(api, *, repo_id, folder_path, commit_message):
        shutil.rmtree(folder / repo_id, ignore_errors=True)
        shutil.copytree(folder_path, folder / repo_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        for method in (create_repo, upload_folder):
            original = getattr(HfApi, method.__name__)
            patch.setattr(
                HfApi, method.__name__, create_autospec(original, side_effect=method)
            )
        yield


def export_flags(run, merged):
    flags = f"--checkpoint {run.output} --output {merged} --push_to_hub {REPOSITORY}"
    return flags.split()


def test_an_export_is_uploaded_as_it_was_written(tmp_path, merged):
    run = fake_run(tmp_path)
    with uploads_to(tmp_path / "hub"):
        call("export", *export_flags(run, merged))
    assert snapshot(tmp_path / "hub" / REPOSITORY) == snapshot(merged)


@pytest.mark.parametrize("error", [NO_PERMISSION, NO_NETWORK])
def test_an_export_that_is_refused_stays_where_it_is(tmp_path, merged, error):
    run = fake_run(tmp_path)
    with (
        uploads_to(tmp_path / "hub", error),
        run_error("not uploaded") as failed,
    ):
        call("export", *export_flags(run, merged))
    assert f"hf upload {REPOSITORY} FOLDER" in str(failed.value)
    assert TOKEN not in str(failed.value)
    assert (merged / "model.safetensors").is_file()


def test_error_message_masks_the_token(tmp_path):
    error = OSError(f"the token {TOKEN} is refused")
    with (
        uploads_to(tmp_path, error),
        run_error(r"the token \*\*\* is refused") as failed,
    ):
        push_folder(tmp_path, REPOSITORY)
    assert TOKEN not in str(failed.value)
    assert failed.value.__cause__ is None


def uploading_job(folder, argv):
    """A run that uploads. For `run_ranks`."""
    with uploads_to(folder):
        job(argv)


def failing_job(is_offline, argv):
    """What failed in a run that the Hub rejects, or that has no network; training goes on.
    For `run_ranks`.
    """
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(NonFatalFailure) as failure,
    ):
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", is_offline)
        with nullcontext() if is_offline else uploads_to(Path(), NO_PERMISSION):
            job(argv)
    return str(failure.value)


def test_a_run_uploads_its_model_or_its_adapter(user, tmp_path, out):
    flags = user.flags(out, "--max_steps 2 --push_to_hub", REPOSITORY)
    hub = tmp_path / "hub" / REPOSITORY
    run_alone(uploading_job, tmp_path / "hub", flags)
    assert {"adapter.json", "adapter.safetensors", "base.json", "README.md"} <= set(
        snapshot(hub)
    )
    assert read_json(hub / "adapter.json")["step"] == 2
    run_alone(
        uploading_job,
        tmp_path / "hub",
        [*flags, "--export_merged", "--overwrite_output_dir"],
    )
    assert snapshot(hub) == snapshot(out / "merged")
    written = b"".join(path.read_bytes() for path in out.glob("*.*"))
    assert REPOSITORY.encode() in written
    assert TOKEN.encode() not in written


@pytest.mark.parametrize("is_offline", [False, True])
def test_a_run_goes_on_without_the_hub(user, out, is_offline):
    flags = user.flags(out, "--max_steps 2 --push_to_hub", REPOSITORY)
    failure = run_alone(failing_job, is_offline, flags)
    assert "--push_to_hub" in failure
    assert "not uploaded" in failure
    assert TOKEN not in failure
    assert read_json(out / "summary.json")["steps"] == 2
