"""Names of the files and folders of a run, a checkpoint and an adapter, and what a given path means.

    OUTPUT_DIR/         run.yaml  metrics.jsonl  summary.json  ledger/  tokenizer/  base/  merged/  checkpoints/
    checkpoints/        step-000050/  step-000100/  latest -> step-000100  best -> step-000050
    step-000100/        engine/  ledger/  adapter.json  adapter.safetensors  base.json  tokenizer/  probe.safetensors
                        rng.safetensors  trainer_state.json  manifest.json
    exported adapter/   adapter.json  adapter.safetensors  base.json  ledger/  manifest.json

Files in ledger/ are named in `remora.ledger`, the manifest in `files`, files in engine/ in `engine.shards`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mora_ds.common.errors import UserError
from mora_ds.common.files import MANIFEST, read_json
from mora_ds.common.untrusted import require_plain
from mora_ds.remora.ledger import LEDGER_FILE, Ledger

RUN_FILE = "run.yaml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
CHECKPOINTS = "checkpoints"
MERGED_FOLDER = "merged"
BASE_FOLDER = "base"

LATEST = "latest"
BEST = "best"

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

_STEP = "step-"
_STEP_NAME = re.compile(rf"{_STEP}(?:[0-9]{{6}}|[1-9][0-9]{{6,11}})")
"""The names that `step_folder` gives, and no other: step-000040.bak, a copy made by hand, is not one."""


def step_folder(root: Path, step: int) -> Path:
    """The folder of the checkpoint after optimizer step `step`, in the folder `root` of all checkpoints."""
    return root / f"{_STEP}{step:06d}"


def is_step_name(name: str) -> bool:
    """Whether `step_folder` gives this name to a folder."""
    return _STEP_NAME.fullmatch(name) is not None


def step_of(folder: Path) -> int:
    """Inverse of `step_folder`. Raises `ValueError` for another name."""
    if not is_step_name(folder.name):
        raise ValueError(f"{folder.name} is not the name of a checkpoint")
    return int(folder.name.removeprefix(_STEP))


def complete_checkpoints(root: Path) -> list[Path]:
    """Step folders that have their final name, oldest first; those that are being written have another."""
    return sorted((path for path in root.glob(f"{_STEP}*") if is_step_name(path.name) and path.is_dir()), key=step_of)


def unknown_entries(root: Path) -> list[str]:
    """Names in the folder `root` of all checkpoints that no run gives, hidden ones aside: the user's own files and
    folders, which are neither read nor deleted."""
    names = (path.name for path in root.iterdir() if not path.name.startswith("."))
    return sorted(name for name in names if name not in (LATEST, BEST) and not is_step_name(name))


RNG_FILE = "rng.safetensors"
"""The random states of all ranks: for each kind a tensor uint8 (ranks, bytes)."""


def tokenizer_of(folder: Path | None) -> Path | None:
    """The tokenizer's folder in a checkpoint, where it has one."""
    return folder / TOKENIZER_FOLDER if folder is not None and (folder / TOKENIZER_FOLDER).is_dir() else None


# -- what a path means -------------------------------------------------------------------------------------------------


def adapter_folder(path: Path) -> Path | None:
    """The folder with adapter.json that `path` means: itself, what it links to, or a run's latest checkpoint. Raises
    `UserError` for one with links in it."""
    return _first_with(path, ADAPTER_JSON)


def has_adapter(path: Path) -> bool:
    """Whether there is an `adapter_folder`, be it readable or not."""
    return _candidate(path, ADAPTER_JSON) is not None


def find_adapter(path: Path, flag: str = "") -> Path:
    """As `adapter_folder`; also a checkpoint whose adapter.json is missing, which its manifest then shows. Raises
    `UserError` that begins with `flag` where there is none."""
    folder = _first_with(path, ADAPTER_JSON, MANIFEST)
    if folder is None or not (folder / ADAPTER_JSON).is_file():
        refuse_full_training(path)
    if folder is None:
        text = f"{path} is neither an adapter, nor a checkpoint, nor the output folder of a run that has one"
        raise UserError(f"{flag}: {text}" if flag else text)
    return folder


def is_full_training(folder: Path) -> bool:
    """Whether it is a checkpoint of --adapter full, which has neither adapter nor ledger."""
    try:
        return bool(read_json(folder / STATE_FILE)["identity"]["adapter"]["kind"] == "full")
    except (UserError, LookupError, TypeError):
        return False


def refuse_full_training(path: Path) -> None:
    """Raises `UserError`, which says where the model is, where `path` means a checkpoint of --adapter full."""
    folder = _candidate(path, STATE_FILE)
    if folder is not None and is_full_training(folder):
        merged = folder.parent.parent / MERGED_FOLDER
        model = f"{merged} is" if merged.is_dir() else "resume the run with --export_merged, which writes"
        raise UserError(f"{path} is of full training (--adapter full) and has no adapter to merge: {model} its model")


def _first_with(path: Path, *names: str) -> Path | None:
    folder = _candidate(path, *names)
    if folder is not None:
        require_plain(folder)
    return folder


def _candidate(path: Path, *names: str) -> Path | None:
    for folder in (path, path / CHECKPOINTS / LATEST, path / LATEST):
        if any((folder / name).is_file() for name in names):
            return folder.resolve()
    return None


@dataclass(frozen=True)
class LedgerLocation:
    """Where a merge ledger lies, and what belongs to it."""

    ledger: Path
    checkpoint: Path | None
    """The checkpoint that the path named, links resolved; None where it named a ledger or a run."""
    reference: Path | None
    """A folder with base.json, which says where the base lies and what its tensors are called."""

    def open(self, hashes: bool = True) -> Ledger:
        """Raises `UserError` as `Ledger.open` does."""
        return Ledger.open(self.ledger, hashes=hashes)


def find_ledger(path: Path) -> LedgerLocation:
    """`path` is a ledger's folder, a checkpoint (or a link to one), or a run's output folder, whose own ledger is
    meant. Raises `UserError` where there is no ledger."""
    checkpoint = None
    if (path / LEDGER_FILE).is_file():
        ledger = path
    else:
        if (path / ADAPTER_JSON).is_file() or (path / MANIFEST).is_file():
            checkpoint = path.resolve()
            require_plain(checkpoint)
        ledger = (checkpoint or path) / LEDGER_FOLDER
    if not (ledger / LEDGER_FILE).is_file():
        raise UserError(f"{path} holds no ledger: name a ledger folder, a checkpoint, or the output folder of a run")
    require_plain(ledger)
    parent = ledger.absolute().parent
    candidates = (parent, parent / CHECKPOINTS / LATEST)
    reference = next((folder.resolve() for folder in candidates if (folder / BASE_JSON).is_file()), None)
    return LedgerLocation(ledger, checkpoint, reference)
