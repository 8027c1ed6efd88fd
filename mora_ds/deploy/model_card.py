"""README.md of an exported model: the facts of its run, in a table."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from mora_ds.checkpoint.adapter_files import AdapterFile, BaseReference
from mora_ds.checkpoint.layout import STATE_FILE, SUMMARY_FILE
from mora_ds.common.files import read_json
from mora_ds.common.version import __version__
from mora_ds.deploy.logits_check import Comparison
from mora_ds.remora.ledger import Ledger

PERPLEXITIES = {"perplexity_before": "before", "perplexity_last": "after", "perplexity_after": "after"}
"""Field of trainer_state.json or summary.json -> column of the table."""


def model_card(
    checkpoint: Path,
    adapter: AdapterFile,
    ledger: Ledger,
    reference: BaseReference,
    dtype: str,
    comparison: Comparison | None,
) -> str:
    """Markdown with the run's facts; perplexities if the checkpoint (or else its run's summary.json) has them."""
    rows = _facts(adapter, ledger, reference, dtype)
    if comparison is not None:
        rows["verified"] = comparison.line()
    rows.update({name: _cell(value) for name, value in adapter.facts.items()})
    text = ["---", "library_name: transformers", "tags: [mora, continual-pretraining]", "---", "", "# Merged model", ""]
    text += ["Continual pretraining with MoRA; the update is merged into the weights, so that this is a plain model."]
    text += ["", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    text += _perplexity_table(checkpoint)
    cycles = ledger.summary() or ["none: nothing was merged during the run"]
    text += ["", "## Merged cycles", "", "```", *cycles, "```"]
    return "\n".join([*text, ""])


def _facts(adapter: AdapterFile, ledger: Ledger, reference: BaseReference, dtype: str) -> dict[str, str]:
    operators = Counter(entry.operator.describe() for entry in adapter.layers.values())
    shapes = sorted({entry.operator.value_shape for entry in adapter.layers.values()})
    sizes = ", ".join(" x ".join(map(str, shape)) for shape in shapes)
    rank = "by a plan" if adapter.config.planned_layers else str(adapter.config.rank)
    return {
        "base": f"`{reference.folder}`",
        "base fingerprint": f"`{reference.fingerprint}`",
        "rank (of a LoRA with as many parameters)": rank,
        "operator": ", ".join(operators),
        "adapted layers": f"{len(adapter.layers)}, with {sizes} numbers each",
        "other trained tensors": str(len(adapter.trainables)),
        "steps": str(adapter.step),
        "merges": str(ledger.cycles),
        "dtype of the run / of this model": f"{adapter.dtype} / {dtype}",
        "mora_ds": __version__,
    }


def _perplexity_table(checkpoint: Path) -> list[str]:
    columns: dict[str, dict[str, Any]] = {}
    for path in (checkpoint / STATE_FILE, checkpoint.parent.parent / SUMMARY_FILE):
        content = read_json(path) if path.is_file() else {}
        for name, column in PERPLEXITIES.items():
            if isinstance(content.get(name), dict) and content[name]:
                columns.setdefault(column, content[name])
    if not columns:
        return []
    names = sorted({name for values in columns.values() for name in values})
    head = ["", "## Perplexity", "", f"| text | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    rows = [[name, *(values.get(name) for values in columns.values())] for name in names]
    cells = [[f"{each:.3f}" if isinstance(each, int | float) else each or "-" for each in row] for row in rows]
    return head + [f"| {' | '.join(row)} |" for row in cells]


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
