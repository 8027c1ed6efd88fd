"""--push_to_hub, against a stand-in for the Hub: what is uploaded, who sees it, and a run without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from mora_ds.commands import export
from mora_ds.common.errors import FailedBeside, RunError
from mora_ds.deploy.hub import push_folder
from tests.helpers.exports import contents, fake_run
from tests.helpers.gloo import run_ranks
from tests.helpers.hub import Hub, stand_in
from tests.helpers.jobs import Playground, job, refusal
from tests.helpers.mistakes import answer

TOKEN = "hf_SecretOfTheTest"
REPOSITORY = "someone/model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with stand_in() as found:
        turn_to(found.url, monkeypatch)
        yield found


def turn_to(url: str, patch: pytest.MonkeyPatch, is_offline: bool = False) -> None:
    """Makes this process take `url` for the Hub, and a token of its own."""
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", is_offline)
    original = huggingface_hub.HfApi.__init__

    def at_the_stand_in(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{"endpoint": url, **kwargs})

    patch.setattr(huggingface_hub.HfApi, "__init__", at_the_stand_in)


def test_an_export_is_uploaded_as_it_was_written(tmp_path: Path, hub: Hub) -> None:
    run, merged = fake_run(tmp_path), tmp_path / "merged"
    flags = ["--checkpoint", str(run.output), "--output", str(merged), "--push_to_hub", REPOSITORY]
    assert answer(export.main, "mora-ds export", flags) == (0, "")
    assert hub.private == {REPOSITORY: True}
    assert hub.files[REPOSITORY] == contents(merged)
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_an_export_that_is_refused_stays_where_it_is(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    run, merged = fake_run(tmp_path), tmp_path / "merged"
    hub.refuses = True
    words = ["mora-ds export", "--checkpoint", str(run.output), "--output", str(merged), "--push_to_hub", REPOSITORY]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(RunError, match="not uploaded") as failed:
        export.main()
    assert f"hf upload {REPOSITORY} {merged}" in str(failed.value) and TOKEN not in str(failed.value)
    assert (merged / "model.safetensors").is_file()


def test_an_error_that_repeats_the_token_is_told_without_it(tmp_path: Path, hub: Hub) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(f"the token {TOKEN} is refused")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
        with pytest.raises(RunError, match=r"the token \*\*\* is refused") as failed:
            push_folder(tmp_path, REPOSITORY)
    assert TOKEN not in str(failed.value) and failed.value.__cause__ is None


def trained(url: str, is_offline: bool, argv: list[str]) -> tuple[dict[str, Any], str]:
    """A run's summary, and what failed beside it. For `run_ranks`."""
    with pytest.MonkeyPatch.context() as patch:
        turn_to(url, patch, is_offline)
        try:
            return job(argv), ""
        except FailedBeside as failure:
            return {}, str(failure)


def test_a_run_uploads_its_model_or_its_adapter(user: Playground, tmp_path: Path, hub: Hub) -> None:
    flags = user.flags(tmp_path / "out", "--max_steps", 2, "--push_to_hub", REPOSITORY)
    run_ranks(1, trained, hub.url, False, flags)
    adapter = hub.files.pop(REPOSITORY)
    assert {"adapter.json", "adapter.safetensors", "base.json", "README.md"} <= set(adapter)
    assert json.loads(adapter["adapter.json"])["step"] == 2
    run_ranks(1, trained, hub.url, False, [*flags, "--export_merged", "--overwrite_output_dir"])
    assert hub.files[REPOSITORY] == contents(tmp_path / "out" / "merged")
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").glob("*.*"))
    assert REPOSITORY.encode() in written and TOKEN.encode() not in written


@pytest.mark.parametrize("is_offline", [False, True])
def test_a_run_goes_on_without_the_hub(user: Playground, tmp_path: Path, hub: Hub, is_offline: bool) -> None:
    hub.refuses = True
    flags = user.flags(tmp_path / "out", "--max_steps", 2, "--push_to_hub", REPOSITORY)
    ((_, failure),) = run_ranks(1, trained, hub.url, is_offline, flags)
    assert "--push_to_hub" in failure and "not uploaded" in failure
    assert "mora-ds convert adapter" in failure and TOKEN not in failure
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 2


def test_a_name_that_no_repository_has_is_refused_at_once(user: Playground, tmp_path: Path) -> None:
    assert "--push_to_hub a/b/c" in refusal(user.flags(tmp_path / "out", "--push_to_hub", "a/b/c"))
    assert not (tmp_path / "out").exists()
