"""`run.yaml`: the settings and versions of a run, and the mark that a folder is a
run's."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from mora_ds.checkpoint.layout import RUN_FILE
from mora_ds.common.errors import UserError
from mora_ds.common.files import atomic_path, load_yaml
from mora_ds.config.flags import RECORDED_KEYS
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


def write_run_file(
    folder: Path, settings: Facts, resolved: Facts, owns: list[str]
) -> None:
    """Write `run.yaml`: the resolved settings, which as a recipe repeat the run, and
    versions and facts of the run.

    `owns`: the names in `folder` that the run makes. Secrets of the DeepSpeed config
    are masked. Raises `RunError` on a full disk.
    """
    facts = dict(resolved)
    if "deepspeed" in facts:
        facts["deepspeed"] = masked(facts["deepspeed"])
    facts[_OWNS] = owns
    content = {**settings, "versions": versions(), "resolved": facts}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    with atomic_path(folder / RUN_FILE) as partial:
        partial.write_text(text, encoding="utf-8")


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }


_OF_A_START = (
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "cache_dir",
)
"""Settings that say where a run is and whether it goes on, not what it computes."""


def changed_settings(folder: Path, settings: Facts) -> list[str]:
    """The settings that have changed since the last start of the run in `folder`, as
    "--name before -> now"."""
    before = _read(folder) or {}
    return [
        f"--{name} {before[name]} -> {value}"
        for name, value in settings.items()
        if name not in _OF_A_START and before.get(name, value) != value
    ]


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in `folder`, and written its run.yaml."""
    return _read(folder) is not None


def owned_by_run(folder: Path) -> list[str]:
    """The names that the run in `folder` makes; none where there is no run."""
    content = _read(folder)
    return [] if content is None else [str(name) for name in content["resolved"][_OWNS]]


def _read(folder: Path) -> dict[Any, Any] | None:
    path = folder / RUN_FILE
    if path.is_symlink() or not path.is_file():
        return None
    try:
        content = load_yaml(str(path), RUN_FILE)
    except UserError:
        return None
    is_runs = all(isinstance(content.get(key), dict) for key in RECORDED_KEYS)
    return (
        content
        if is_runs and isinstance(content["resolved"].get(_OWNS), list)
        else None
    )
