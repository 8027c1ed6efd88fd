"""README.md of an exported model: the facts of its run, in a table."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mora_ds.checkpoint.adapter_files import AdapterFile, BaseReference
from mora_ds.checkpoint.layout import STATE_FILE
from mora_ds.checkpoint.state import TrainerState
from mora_ds.common.files import JsonObject
from mora_ds.common.version import __version__
from mora_ds.deploy.logits_check import Comparison


def write_model_card(
    folder: Path,
    checkpoint: Path | None,
    adapter: AdapterFile,
    reference: BaseReference,
    dtype: str,
    comparison: Comparison | None,
) -> None:
    """Write a README.md with the run's facts, and with its perplexities if it ended at
    this checkpoint. `checkpoint` None: they are of another model."""
    operators = sorted({entry.operator.describe() for entry in adapter.layers.values()})
    facts: JsonObject = {
        "base": f"`{reference.folder}`",
        "base fingerprint": f"`{reference.fingerprint}`",
        "operator": ", ".join(operators),
        "adapted layers": len(adapter.layers),
        "other trained tensors": len(adapter.trainables),
        "steps": adapter.step,
        "merges": adapter.cycle,
        "dtype of the run / of this model": f"{adapter.dtype} / {dtype}",
        "mora_ds": __version__,
        **adapter.facts,
    }
    if checkpoint is not None:
        facts.update(_perplexities(checkpoint))
    if comparison is not None:
        facts["verified"] = comparison.line()
    text = [
        "Continual pretraining with MoRA; the update is merged into the weights, so that this is a plain model.",
        "",
        "| | |",
        "|---|---|",
    ]
    text += [f"| {_cell(name)} | {_cell(value)} |" for name, value in facts.items()]
    write_card(folder, "transformers", "mora", "Merged model", text)


def write_card(
    folder: Path, library: str, tags: str, title: str, lines: Iterable[str]
) -> None:
    """Write a README.md as the Hub reads it: library, tags, a title, and Markdown below
    it."""
    head = [
        "---",
        f"library_name: {library}",
        f"tags: [{tags}, continual-pretraining]",
        "---",
        "",
        f"# {title}",
        "",
    ]
    text = "\n".join([*head, *lines, ""])
    (folder / "README.md").write_text(text, encoding="utf-8")


def _perplexities(checkpoint: Path) -> dict[str, str]:
    """Of each evaluation set before and after a run; none if it did not end here."""
    if not (checkpoint / STATE_FILE).is_file():
        return {}
    state = TrainerState.read(checkpoint)
    if not state.finished:
        return {}
    perplexities = {}
    for name, before in state.perplexity_before.items():
        after = state.perplexity_last.get(name, math.nan)
        if math.isfinite(before + after):
            perplexities[f"perplexity on {name}"] = f"{before:.3f} -> {after:.3f}"
    return perplexities


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
