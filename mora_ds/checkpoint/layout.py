"""Names of the files and folders of a run, a checkpoint and an adapter, and what a given
path means.

    OUTPUT_DIR/         run.yaml  metrics.jsonl  summary.json  ledger/  tokenizer/  base/  merged/  checkpoints/
    checkpoints/        step-000050/  step-000100/  latest -> step-000100  best -> step-000050
    step-000100/        engine/  ledger/  adapter.json  adapter.safetensors  base.json  tokenizer/  probe.safetensors
                        trainer_state.json  manifest.json
    exported adapter/   adapter.json  adapter.safetensors  base.json  ledger/  manifest.json

Files in ledger/ are named in `remora.ledger`, the manifest in `files`, files in engine/
in `shard_table`. Needs neither DeepSpeed nor other processes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mora_ds.common.errors import UserError
from mora_ds.common.fetched import CHECKPOINTS as CHECKPOINTS
from mora_ds.common.fetched import LATEST as LATEST
from mora_ds.common.files import (
    MANIFEST,
    read_json,
)
from mora_ds.common.untrusted import require_plain
from mora_ds.remora.ledger import LEDGER_FILE, Ledger

RUN_FILE = "run.yaml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
BEST = "best"
MERGED_FOLDER = "merged"
BASE_FOLDER = "base"

ENGINE_TAG = "engine"
"""The folder of the engine's shards."""
LEDGER_FOLDER = "ledger"
TOKENIZER_FOLDER = "tokenizer"
ADAPTER_JSON = "adapter.json"
ADAPTER_TENSORS = "adapter.safetensors"
BASE_JSON = "base.json"
PROBE_FILE = "probe.safetensors"
STATE_FILE = "trainer_state.json"

ADAPTER_PARTS = (ADAPTER_JSON, ADAPTER_TENSORS, BASE_JSON, LEDGER_FOLDER)
"""What an adapter consists of, in a checkpoint and alone."""

RESUME = "--resume_from_checkpoint"
AUTO = "auto"
"""Value of --resume_from_checkpoint: the newest checkpoint that is intact."""

_STEP = "step-"
_STEP_NAME = re.compile(rf"{_STEP}(?:[0-9]{{6}}|[1-9][0-9]{{6,11}})")
"""The names that `step_name` gives; a copy step-000040.bak is no checkpoint."""


def step_name(step: int) -> str:
    """The name of the folder of the checkpoint after a step."""
    return f"{_STEP}{step:06d}"


def is_step_name(name: str) -> bool:
    """Whether `step_name` gives this name to a folder."""
    return _STEP_NAME.fullmatch(name) is not None


def step_of(folder: Path) -> int:
    """Inverse of `step_name`. Raises `ValueError` for another name."""
    if not is_step_name(folder.name):
        raise ValueError(f"{folder.name} is not the name of a checkpoint")
    return int(folder.name.removeprefix(_STEP))


def tokenizer_of(folder: Path) -> Path | None:
    """The tokenizer's folder in a checkpoint, where it has one."""
    tokenizer = folder / TOKENIZER_FOLDER
    return tokenizer if tokenizer.is_dir() else None


# -- what a path means -----------------------------------------------------------------


def adapter_folder(path: Path, marks: Sequence[str] = (ADAPTER_JSON,)) -> Path | None:
    """The folder with adapter.json (one of the files `marks`) that `path` means:
    itself, what it links to, or a run's latest checkpoint. Raises `UserError` for one
    with links in it."""
    folder = _candidate(path, marks)
    if folder is not None:
        require_plain(folder)
    return folder


def find_adapter(path: Path, flag: str = "") -> Path:
    """As `adapter_folder`; also a checkpoint whose adapter.json is missing, which its
    manifest then shows. Raises `UserError` that begins with `flag` where there is
    none."""
    folder = adapter_folder(path, (ADAPTER_JSON, MANIFEST))
    if folder is None or not (folder / ADAPTER_JSON).is_file():
        refuse_full_training(path)
    elif (folder / ENGINE_TAG).is_dir() and not (folder / MANIFEST).is_file():
        raise UserError(
            f"{flag}: {folder} has no {MANIFEST}: it was never saved to the end, and is no checkpoint".lstrip(
                ": "
            )
        )
    if folder is None:
        text = f"{path} is neither an adapter, nor a checkpoint, nor the output folder of a run that has one"
        if (path / "adapter_config.json").is_file():
            text += (
                "; mora-ds convert mora reads adapters of kongds's PEFT and of axolotl"
            )
        raise UserError(f"{flag}: {text}" if flag else text)
    return folder


def is_full_training(folder: Path) -> bool:
    """Whether it is a checkpoint of --adapter full, without adapter and ledger."""
    try:
        identity = read_json(folder / STATE_FILE)["identity"]
        return identity["adapter"]["kind"] == "full"
    except (UserError, LookupError, TypeError):
        return False


def refuse_full_training(path: Path) -> None:
    """Raises `UserError` that says where the model is, for one of --adapter full."""
    folder = _candidate(path, (STATE_FILE,))
    if folder is not None and is_full_training(folder):
        merged = folder.parent.parent / MERGED_FOLDER
        model = "resume the run with --export_merged, which writes"
        if merged.is_dir():
            model = f"{merged} is"
        raise UserError(
            f"{path} is of full training (--adapter full) and has no adapter to merge: {model} its model"
        )


def _candidate(path: Path, marks: Sequence[str]) -> Path | None:
    for folder in (path, path / CHECKPOINTS / LATEST, path / LATEST):
        if any((folder / name).is_file() for name in marks):
            return folder.resolve()
    return None


@dataclass(frozen=True)
class LedgerLocation:
    """A merge ledger, and what belongs to it."""

    ledger: Ledger
    checkpoint: Path | None
    """The checkpoint that was named, links resolved; None if it was a ledger or a
    run."""


def find_ledger(path: Path) -> LedgerLocation:
    """`path` is a ledger's folder, a checkpoint (or a link to one), or a run's output
    folder, whose own ledger is meant. Raises `UserError` where there is no ledger, and
    as `Ledger.open` does."""
    checkpoint = None
    if (path / LEDGER_FILE).is_file():
        ledger = path
    else:
        if (path / ADAPTER_JSON).is_file() or (path / MANIFEST).is_file():
            checkpoint = path.resolve()
            require_plain(checkpoint)
        ledger = (checkpoint or path) / LEDGER_FOLDER
    if not (ledger / LEDGER_FILE).is_file():
        raise UserError(
            f"{path} holds no ledger: name a ledger folder, a checkpoint, or the output folder of a run"
        )
    require_plain(ledger)
    return LedgerLocation(Ledger.open(ledger), checkpoint)
