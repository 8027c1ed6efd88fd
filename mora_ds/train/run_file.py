"""`run.yaml`: the settings of a run, the versions that it ran with, and the mark that the folder is a run's."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from mora_ds.checkpoint.layout import RUN_FILE
from mora_ds.common.errors import UserError
from mora_ds.common.files import JsonObject, atomic_path, load_yaml
from mora_ds.common.nested import different_keys, flattened
from mora_ds.config.arguments import RECORDED_KEYS
from mora_ds.engine.ds_keys import masked

Facts: TypeAlias = Mapping[str, Any]
"""Name -> setting or fact of a run."""

_PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "sentencepiece",
    "safetensors",
)
_OWNS = "owns"
_OF_FLAGS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "bf16", "fp16",
}  # fmt: skip
"""Sections of a DeepSpeed config whose values flags decide."""


def write_run_file(folder: Path, settings: Facts, resolved: Facts, owns: list[str]) -> None:
    """Write `run.yaml`: the resolved settings, which as a recipe repeat the run, and versions and facts of the run.

    `owns`: the names in `folder` that the run makes. Secrets of the DeepSpeed config are masked. Raises `RunError` on a
    full disk.
    """
    content = {
        **settings,
        "versions": versions(),
        "resolved": {**without_secrets(resolved), _OWNS: owns},
    }
    with atomic_path(folder / RUN_FILE) as partial:
        partial.write_text(
            yaml.safe_dump(content, sort_keys=False, allow_unicode=True),
            encoding="utf-8",
        )


def without_secrets(resolved: Facts) -> JsonObject:
    """The facts of a run with the secrets of its DeepSpeed config masked."""
    return {name: masked(value) if name == "deepspeed" else value for name, value in resolved.items()}


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }


def changed_settings(folder: Path, settings: Facts, resolved: Facts) -> list[str]:
    """Each of the `settings` that the run in `folder` was last started with otherwise, as "--name before -> now", and
    each value of a DeepSpeed config that was edited in its place, among the facts `resolved`. Those that say where the
    run is and whether it goes on are no part of it."""
    before = _read(folder)
    if before is None:
        return []
    of_the_folder = (
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "cache_dir",
    )
    changes = [
        f"--{name} {before[name]} -> {value}"
        for name, value in settings.items()
        if name not in of_the_folder and name in before and before[name] != value
    ]
    if before.get("deepspeed") == settings.get("deepspeed"):
        there = _of_deepspeed_file(before["resolved"])
        here = _of_deepspeed_file(without_secrets(resolved))
        changes += [
            f"{name} in --deepspeed {there.get(name)} -> {here.get(name)}" for name in different_keys(there, here)
        ]
    return changes


def _of_deepspeed_file(resolved: Facts) -> JsonObject:
    """The values of a run's DeepSpeed config that no flag decides, by their keys."""
    config = resolved.get("deepspeed") or {}
    return flattened({key: value for key, value in config.items() if key not in _OF_FLAGS})


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in `folder`: whether its run.yaml is one that a run has written."""
    return _read(folder) is not None


def owned_by_run(folder: Path) -> list[str]:
    """The names that the run in `folder` makes; none where there is no run."""
    content = _read(folder)
    return [] if content is None else [str(name) for name in content["resolved"][_OWNS]]


def _read(folder: Path) -> dict[Any, Any] | None:
    if not (folder / RUN_FILE).is_file():
        return None
    try:
        content = load_yaml(str(folder / RUN_FILE), RUN_FILE)
    except UserError:
        return None
    is_runs = all(isinstance(content.get(key), dict) for key in RECORDED_KEYS)
    return content if is_runs and isinstance(content["resolved"].get(_OWNS), list) else None
