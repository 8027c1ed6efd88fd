"""The state of a run that a checkpoint keeps, and what it must have in common with the run that resumes it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mora_ds import files
from mora_ds.checkpoint.layout import STATE_FILE
from mora_ds.errors import UserError


@dataclass
class TrainerState:
    """Where a run stands. Everything a resumed run must agree on is in `identity`."""

    step: int = 0
    tokens: int = 0
    merges: list[int] = field(default_factory=list)
    stall_window: list[float] = field(default_factory=list)
    """What `stall.StallRule` decides from: the newest values of its signal in the running cycle."""
    perplexity_before: dict[str, float] = field(default_factory=dict)
    perplexity_last: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    """The evaluated step of the least weighted loss so far (`forgetting.Watch.score`); 0: none yet."""
    best_score: float | None = None
    total_steps: int = 0
    """Optimizer steps that the run was to have: the schedule hangs on them."""
    finished: bool = False
    """Whether all of them are done, with what follows the last one."""
    evaluation_pending: bool = False
    """Whether the evaluation after this step is still to be made: the run was stopped before it or in its midst."""
    stream: dict[str, Any] | None = None
    """Where streamed sources stand before the next step's batch."""
    world_size: int = 1
    identity: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> TrainerState:
        """Of a checkpoint. Raises `UserError` naming the file when it is missing or damaged."""
        path = folder / STATE_FILE
        content = files.read_json(path)
        with files.malformed(path):
            return cls(**content)


def check_world_size(folder: Path, world: int) -> None:
    """Raises `UserError` when so many ranks cannot go on with the checkpoint: its batch must divide by them."""
    rows = TrainerState.read(folder).identity.get("global_batch_size")
    if isinstance(rows, int) and rows % world:
        able = [str(number) for number in range(1, rows + 1) if rows % number == 0]
        raise UserError(
            f"{folder} belongs to a run of {rows} sequences a step, which {world} ranks cannot share evenly: "
            f"start {', '.join(able[:-1]) + ' or ' if able[:-1] else ''}{able[-1]} of them"
        )


def check_identity(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises one `UserError` that names everything in which the checkpoint's run differs from this one."""
    there, here = (_flat(json.loads(json.dumps(identity))) for identity in (saved, now))
    differences = [
        f"{_meaning(key)}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key)
    ]
    if differences:
        raise UserError(f"{folder} belongs to another run:\n  " + "\n  ".join(differences))


_MEANING = {
    "base": "weights of --model_name_or_path",
    "model_config": "config.json of --model_name_or_path",
    "tokens": "tokens of the training text (--train_files, --dataset_name and the tokenizer)",
    **{f"mixture.{part}": f"{part} of --mixture" for part in ("sources", "weights", "epochs")},
    "adapter.kind": "--adapter",
    "adapter.rank": "--mora_rank (or --lora_rank)",
    "adapter.dropout": "--mora_dropout",
    "adapter.vector_sets": "--subspace_cycles (None: 1)",
    "adapter.vectors": "singular vectors of the base (--operator subspace, --alignment_weight)",
    "alignment": "--alignment_weight, --alignment_rank (None: no such loss)",
    "adapter.base_bits": "--base_bits (None: 16)",
    "adapter.domains": "domains of --domain_adapters (None: without)",
    "adapter.freeze": "--freeze (None: none)",
    "global_batch_size": "sequences a step, over all ranks (--per_device_train_batch_size and so on)",
    "dtype": "compute dtype (--bf16, --fp16)",
    "optimizer": "--optimizer (None: adamw)",
}


def _meaning(key: str) -> str:
    """In the user's words; of a mixture, with the source's name or the phase."""
    part, _, name = key.partition("mixture.")[2].partition(".")
    return f"{_MEANING[f'mixture.{part}']}, {name}" if name else _MEANING.get(key, key)


def _flat(identity: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in identity.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
