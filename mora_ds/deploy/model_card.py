"""README.md of an exported model: the facts of its run, in a table."""

import json
from collections.abc import Iterable
from typing import Any

from mora_ds.checkpoint.adapter_files import AdapterFile, BaseReference
from mora_ds.common.version import __version__


def model_card(
    adapter: AdapterFile,
    reference: BaseReference,
    dtype: str,
) -> str:
    """Markdown with the facts of the run."""
    operators = sorted({entry.operator.describe() for entry in adapter.layers.values()})
    facts: dict[str, Any] = {
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
    text = [
        "Continual pretraining with MoRA; the update is merged into the weights, so that this is a plain model.",
        "",
        "| | |",
        "|---|---|",
    ]
    text += [f"| {_cell(name)} | {_cell(value)} |" for name, value in facts.items()]
    return card("transformers", "mora", "Merged model", text)


def card(library: str, tags: str, title: str, lines: Iterable[str]) -> str:
    """A README.md as the Hub reads it: library, tags, a title, and Markdown below it."""
    head = [
        "---",
        f"library_name: {library}",
        f"tags: [{tags}, continual-pretraining]",
        "---",
        "",
        f"# {title}",
        "",
    ]
    return "\n".join([*head, *lines, ""])


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
