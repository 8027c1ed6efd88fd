"""The tables of docs/results/ and of the README, from the JSON in docs/results/data."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tools import figures
from tools.docs_matrix import ruler, table_row
from tools.figures_learning import mean, points

README_LEARNING = {
    "before training": "none",
    "LoRA, rank 8": "lora",
    "MoRA, rank 8": "mora-rotate",
    "MoRA with Muon, and a product of rank 16 for the embeddings": "recipe-product",
    "full training": "full",
}
"""Row of the README's table -> its method in data/learning_135m_replay.json."""


def between(text: str, name: str, body: Sequence[str]) -> str:
    """`text` with `body` between its two comments `name` and `end of name`."""
    start, end = f"<!-- {name}, by tools/docs.py -->", f"<!-- end of {name} -->"
    head, _, rest = text.partition(start)
    _, found, tail = rest.partition(end)
    assert found, f"no {start} ... {end}"
    return "\n".join([head + start, *body, end + tail])


# -- planned figures ---------------------------------------------------------------------------------------------------
def memory(text: str) -> str:
    """The tables of results/memory.md, from the JSON that its figures are drawn from."""
    plans = figures.plans()
    body = ["| Llama 7B, 8 GPUs, and 70B, 64 GPUs | Base | Static memory | Peak |", "|---|---|---|---|"]
    for model, (gpus, _) in figures.MEMORY.items():
        for method in figures.METHODS:
            sizes = plans[model, method, gpus]["bytes"]
            base = "sharded" if "full" in method else f"{sizes['base'] / 1e9:,.2f} GB"
            cells = (base, *(f"{sizes[key] / 1e9:,.2f} GB" for key in ("held", "peak")))
            body.append(table_row(f"{model}, {method}", *cells))
    text = between(text, "memory", body)
    lines = figures.traffic(plans)
    body = [table_row("GB sent by one GPU in a step, at this number of GPUs", *map(str, figures.GPUS))]
    body.append(ruler(len(figures.GPUS) + 1, numbers=True))
    body += [table_row(name, *(f"{value:,.3f}" for value in values)) for name, values in lines.items()]
    return between(text, "traffic", body)


# -- benchmarks --------------------------------------------------------------------------------------------------------
RESULT = re.compile(r"<!-- (?P<file>[\w-]+\.json) (?P<part>.+?), by tools/docs\.py -->")


def results(text: str) -> str:
    """A page with its blocks `<!-- FILE.json PART, by tools/docs.py -->` written anew.

    PART is a table of the benchmark's JSON or "sentences"; above it stand the command and the machine.
    """
    for block in list(RESULT.finditer(text)):
        found = json.loads((figures.DATA / block["file"]).read_text(encoding="utf-8"))
        made_by = f"{_command(block['file'], found['command'])} on {_machine(found['measured_on'])}:"
        if block["part"] == "sentences":
            body = [made_by, "", *(f"- {sentence}" for sentence in found["sentences"])]
        else:
            titles, *rows = shown(found["tables"][block["part"]])
            head = [table_row(*titles), ruler(len(titles), numbers=True)]
            body = [made_by, "", *head, *(table_row(*row) for row in rows)]
        text = between(text, f"{block['file']} {block['part']}", ["", *body, ""])
    return text


def _command(file: str, command: str) -> str:
    """The command that made a result, where a reader can give it as it stands; otherwise its program and the JSON that
    holds it, since it names files of the one who measured."""
    words = command.split()
    if len(words) <= LONGEST_COMMAND and "--with" not in words:
        return f"`{command}`"
    return f"`{words[1]}` (`{file}`)"


LONGEST_COMMAND = 14
"""Words of a command that stands above its table."""


def shown(table: Sequence[Sequence[str]]) -> list[list[str]]:
    """A table as the pages show it.

    A deviation stands behind its mean, and only where there is more than one seed to deviate. Bits a byte, which
    follow from the perplexity, and columns without a value stay in the JSON.
    """
    titles, *rows = table
    if "seeds" in titles:
        several = [int(row[titles.index("seeds")]) > 1 for row in rows]
        for place in [place for place, title in enumerate(titles) if title == "±"]:
            means = [
                f"{row[place - 1]} ± {row[place]}" if many else row[place - 1]
                for row, many in zip(rows, several, strict=True)
            ]
            rows = [[*row[: place - 1], mean, *row[place:]] for row, mean in zip(rows, means, strict=True)]
    hidden = {
        place
        for place, title in enumerate(titles)
        if title == "±" or title.endswith("b/B") or all(row[place] == "-" for row in rows)
    }
    return [[cell for place, cell in enumerate(line) if place not in hidden] for line in (titles, *rows)]


def _machine(found: dict[str, Any]) -> str:
    """The machine of a result in a few words."""
    cores, versions = found["cores"], found["versions"]
    amx = "with AMX" if "amx_bf16" in found["cpu_features"] else "without AMX"
    device = f"{cores} CPU core{'s' * (cores > 1)} ({amx})" if found["device"] == "CPU" else found["device"]
    return f"{device}, torch {versions['torch'].partition('+')[0]}, mora_ds {versions['mora_ds']}"


# -- learning ----------------------------------------------------------------------------------------------------------
def learning(text: str) -> str:
    """The README with its table of what each method learned and kept on the pretrained model."""
    found = {point.method: point for point in points(figures.DATA / "learning_135m_replay.json")}
    body = [table_row("", "trained", "new text", "old text", "seeds"), "|---|---:|---:|---:|---:|"]
    for title, method in README_LEARNING.items():
        point = found[method]
        body.append(table_row(title, f"{point.trained:,}", _spread(point.new), _spread(point.old), str(len(point.new))))
    return between(text, "learning", body)


def _spread(perplexities: Sequence[float]) -> str:
    """The mean over seeds, and how far the seed that lies farthest is from it; one seed has no spread."""
    centre = mean(perplexities)
    if len(perplexities) == 1:
        return f"{centre:.1f}"
    return f"{centre:.1f} ± {max(abs(seed - centre) for seed in perplexities):.1f}"
