"""README.md of an exported model: the facts of its run, in a table."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mora_ds.checkpoint.adapter_files import AdapterFile, BaseReference
from mora_ds.checkpoint.layout import STATE_FILE, SUMMARY_FILE
from mora_ds.common.files import read_json
from mora_ds.common.version import __version__
from mora_ds.deploy.logits_check import Comparison
from mora_ds.remora.ledger import Ledger


def model_card(
    checkpoint: Path | None,
    adapter: AdapterFile,
    ledger: Ledger,
    reference: BaseReference,
    dtype: str,
    comparison: Comparison | None,
) -> str:
    """Markdown with the run's facts; perplexities if the checkpoint (or else its run's summary.json) has them.
    `checkpoint` None: they are of another model."""
    rows = _facts(adapter, ledger, reference, dtype)
    if comparison is not None:
        rows["verified"] = comparison.line()
    rows.update({name: _cell(value) for name, value in adapter.facts.items()})
    text = ["Continual pretraining with MoRA; the update is merged into the weights, so that this is a plain model."]
    text += ["", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    if checkpoint is not None:
        text += _perplexity_table(checkpoint)
    cycles = [f"cycle {record.cycle:>3}  step {record.step:>7}" for record in ledger.records]
    cycles = cycles or ["none: nothing was merged during the run"]
    text += ["", "## Merged cycles", "", "```", *cycles, "```"]
    return card("transformers", "mora", "Merged model", text)


def card(library: str, tags: str, title: str, lines: Iterable[str]) -> str:
    """A README.md as the Hub reads it: the library that loads the folder, tags, a title, and Markdown below it."""
    head = ["---", f"library_name: {library}", f"tags: [{tags}, continual-pretraining]", "---", "", f"# {title}", ""]
    return "\n".join([*head, *lines, ""])


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
    """Each evaluation set's perplexity at the start and at the end, as far as they are known."""
    known: dict[str, Any] = {}
    for path in (checkpoint.parent.parent / SUMMARY_FILE, checkpoint / STATE_FILE):  # the checkpoint's own count more
        content = read_json(path) if path.is_file() else {}
        known.update((name, value) for name, value in content.items() if isinstance(value, dict) and value)
    before = known.get("perplexity_before", {})
    after = known.get("perplexity_last") or known.get("perplexity_after", {})
    if content.get("evaluation_pending"):  # of the checkpoint; what is known is of an earlier or a later model
        after = {}
    cells = (
        f"| {name} | {_number(before.get(name))} | {_number(after.get(name))} |" for name in sorted(before | after)
    )
    head = ["", "## Perplexity", "", "| text | before | after |", "|---|---|---|"]
    return [*head, *cells] if before or after else []


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "-"


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
