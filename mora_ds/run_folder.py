"""The output folder of a run: who may write into it, and what stands in `run.yaml`."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from mora_ds.errors import UserError
from mora_ds.files import disk_errors

RUN_FILE = "run.yaml"
_PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "sentencepiece", "safetensors")
_OURS = (
    RUN_FILE, "metrics.jsonl", "summary.json", "tensorboard", "checkpoints", "ledger", "merged", "base", "tokenizer",
)  # fmt: skip
"""Everything a run writes: what --overwrite_output_dir deletes, and nothing else."""


def claim(folder: Path, overwrite: bool, resume: bool) -> None:
    """Make `folder` ready for a run. One rank calls it.

    Raises `UserError` when it holds another run (unless `overwrite` or `resume`), or is no folder to write into.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file")
    if (folder / RUN_FILE).exists() and not resume:
        if not overwrite:
            raise UserError(
                f"--output_dir {folder} holds another run: choose another folder, continue it with "
                "--resume_from_checkpoint auto, or delete it with --overwrite_output_dir"
            )
        _clear(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written to: {error.strerror or error}") from error


def write_run_file(folder: Path, settings: dict[str, Any], resolved: dict[str, Any]) -> None:
    """`run.yaml`: the resolved settings, flat, so that the file is a recipe that repeats the run, and what it ran on."""
    content = {**settings, "versions": versions(), "resolved": resolved}
    with disk_errors(folder):
        beside = folder / f".{RUN_FILE}.partial"
        beside.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
        beside.replace(folder / RUN_FILE)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def _clear(folder: Path) -> None:
    for name in _OURS:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.exists() or path.is_symlink():
            path.unlink()
