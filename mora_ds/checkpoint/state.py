"""The state of a run that a checkpoint stores, and what a run must have in common with
the checkpoint it resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mora_ds.adapters.config import FLAGS, AdapterConfig
from mora_ds.checkpoint.layout import STATE_FILE
from mora_ds.common import files
from mora_ds.common.errors import UserError
from mora_ds.common.files import JsonObject
from mora_ds.common.nested import different_keys, flattened
from mora_ds.common.untrusted import Count, Processes, typed_fully


@dataclass
class TrainerState:
    """trainer_state.json: how far a run has come after its last optimizer step."""

    step: Count = 0
    """Optimizer steps done."""
    tokens: Count = 0
    """Tokens trained on, over all ranks."""
    merges: list[Count] = field(default_factory=list)
    """The value of `step` at each merge, ascending."""
    perplexity_before: dict[str, float] = field(default_factory=dict)
    """Evaluation set -> perplexity before the first step."""
    perplexity_last: dict[str, float] = field(default_factory=dict)
    """Evaluation set -> perplexity at the newest evaluation."""
    task_costs_before: dict[str, float] = field(default_factory=dict)
    """Task -> its cost before the first step (`tasks.TaskResult`)."""
    task_costs_last: dict[str, float] = field(default_factory=dict)
    """Task -> its cost at the newest evaluation of tasks."""
    best_step: Count = 0
    """The evaluated step with the best score (`forgetting.Watch.score`); 0 for none."""
    best_score: float | None = None
    """The score of the checkpoint of `best_step`."""
    total_steps: Count = 0
    """Planned optimizer steps, from which the learning-rate schedule follows."""
    at_peak: bool = False
    """Whether the learning rate is at its peak, so that --decay_from may begin here."""
    finished: bool = False
    """Whether all steps are done, with the evaluation after the last one."""
    evaluation_pending: bool = False
    """Whether the evaluation after this step, which comes after saving, is to be
    made."""
    merge_pending: bool = False
    """Whether the merge after this step is still to be made."""
    failures: list[str] = field(default_factory=list)
    """Failures that did not end the training, a line each, for the end of the run."""
    scheduler: JsonObject | None = None
    """State of the scheduler that `initialize` was given; None without one."""
    stream: JsonObject | None = None
    """Positions of streamed sources before the next step's batch; None without
    streams."""
    chunked_loss: bool = False
    """Whether losses are computed in chunks (`chunk_loss`), as in the resumed run."""
    world_size: Processes = 1
    """Number of ranks that wrote the checkpoint."""
    identity: JsonObject = field(default_factory=dict)
    """What a resumed run must have in common with this one (`run_identity`)."""

    @classmethod
    def read(cls, folder: Path) -> TrainerState:
        """The state in a checkpoint's folder. Raises `UserError` naming the file when
        it is missing or damaged."""
        path = folder / STATE_FILE
        content = files.read_json(path)
        return typed_fully(cls, content, f"{path} is damaged")


def run_identity(
    base_fingerprint: str, adapter: AdapterConfig, more: Mapping[str, Any] | None
) -> JsonObject:
    """The identity of a run with an adapter, and `more` that its trainer adds."""
    return {
        "base": base_fingerprint,
        "adapter": adapter.to_dict(),
        **(more or {}),
    }


def check_world_size(folder: Path, state: TrainerState, world: int) -> None:
    """Raises `UserError` when `world` does not divide the checkpoint's global batch."""
    sequences = state.identity.get("global_batch_size")
    if isinstance(sequences, int) and sequences % world:
        raise UserError(
            f"{folder} belongs to a run of {sequences} sequences a step, which {world} ranks cannot share evenly: "
            f"start a number of them that divides {sequences}"
        )


def check_identity(folder: Path, saved: JsonObject, now: JsonObject) -> None:
    """Raises a `UserError` that names all in which the checkpoint's run differs."""
    there, here = (
        flattened(json.loads(json.dumps(identity))) for identity in (saved, now)
    )
    differences = [
        f"{_label(key)}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in different_keys(there, here)
    ]
    if differences:
        raise UserError(
            f"{folder} belongs to another run:\n  " + "\n  ".join(differences)
        )


_OF_TEXT = (
    "--train_files, --dataset_name, --mixture, --replay, --text_column, --document_start, --held_out_share, "
    "--streaming, --shuffle_buffer and the tokenizer"
)
"""What decides the tokens of a source."""

_LABELS = {
    "base": "weights of --model_name_or_path",
    "model_config": "config.json of --model_name_or_path, and --rope_scaling",
    "mixture.sources": f"tokens of the training text ({_OF_TEXT})",
    "mixture.weights": "weights of --mixture, --train_files or --replay",
    "mixture.epochs": "epochs of --mixture",
    "adapter.kind": "--adapter",
    "adapter.layer_sizes": "research.targets",
    "adapter.alpha": "--lora_alpha",
    "adapter.domains": "research.domain_adapters",
    "alignment": "research.alignment_weight, alignment_rank (None: no alignment loss)",
    "global_batch_size": "sequences a step (--per_device_train_batch_size, --gradient_accumulation_steps, ranks)",
    "dtype": "compute dtype (--bf16, --fp16)",
    "attention": "attention (--attn_implementation)",
    "optimizer": "--optimizer (None: adamw)",
    "decay_from": "step of --decay_from",
    "decay_parent": "manifest of the checkpoint of --decay_from",
}
"""Key of a flat identity -> what the user calls it, and what None means there."""
_FLAGS = {"seed", "seq_len", "document_mask", "merge_every"}
"""Keys that are flags of the same name."""


def _label(key: str) -> str:
    """`key` as the user calls it, with the name of a mixture's source or phase."""
    setting, _, name = key.partition("mixture.")[2].partition(".")
    if name:
        return f"{_LABELS[f'mixture.{setting}']}, {name}"
    layer = key.removeprefix("adapter.layer_sizes.")
    if layer != key:
        return f"{_LABELS['adapter.layer_sizes']}, {layer}"
    if key in _FLAGS:
        return f"--{key}"
    return _LABELS.get(key) or FLAGS.get(key.removeprefix("adapter."), key)
