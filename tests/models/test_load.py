"""Which files of a Hub repository are downloaded; folders on disk are loaded by most other tests."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import huggingface_hub
import pytest

from mora_ds.models import load


@pytest.mark.parametrize(
    ("held", "wanted"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin"], ["config.json", "model.safetensors"]),
        (["config.json", "pytorch_model.bin", "rust_model.ot"], ["config.json", "pytorch_model.bin"]),
    ],
)
def test_pickled_weights_are_downloaded_where_there_are_no_others(
    held: list[str], wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """facebook/opt-125m and many of its age have no safetensors."""

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        for file in held:
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert sorted(path.name for path in load._download("some/model").iterdir()) == wanted
