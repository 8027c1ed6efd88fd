"""Names of the files of a run and its checkpoints, and what a given path means."""

from __future__ import annotations

from pathlib import Path

from mora_ds.errors import UserError
from mora_ds.files import (
    MANIFEST,
)

LEDGER_FOLDER = "ledger"

TOKENIZER_FOLDER = "tokenizer"

PROBE_FILE = "probe.safetensors"


def find_checkpoint(path: Path) -> Path:
    """The step folder that `path` means: itself, what it links to, or the latest of a run's output folder."""
    for folder in (path, path / "checkpoints" / "latest", path / "latest"):
        if (folder / ADAPTER_JSON).is_file() or (folder / MANIFEST).is_file():
            return folder.resolve()
    raise UserError(f"--checkpoint: {path} is neither a checkpoint nor the output folder of a run that has one")


ADAPTER_JSON = "adapter.json"

ADAPTER_TENSORS = "adapter.safetensors"

BASE_JSON = "base.json"


def adapter_folder(path: Path) -> Path | None:
    """The folder with adapter.json that `path` means: itself, what it links to, or a run's latest checkpoint."""
    for folder in (path, path / "checkpoints" / "latest", path / "latest"):
        if (folder / ADAPTER_JSON).is_file():
            return folder.resolve()
    return None


def find_adapter(path: Path) -> Path:
    """The folder that `path` means: itself, or the latest checkpoint of a run. Raises `UserError`."""
    folder = adapter_folder(path)
    if folder is None:
        raise UserError(f"{path} is neither an adapter, nor a checkpoint, nor the output folder of a run that has one")
    return folder
