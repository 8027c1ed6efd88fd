"""The tables of docs/results/ and of the README, from the JSON in docs/results/data."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tools import plans
from tools.figures import points
from tools.tables import mean_and_spread, ruler, table_row

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
    start = f"<!-- {name}, by tools/docs.py -->"
    end = f"<!-- end of {name} -->"
    head, _, after_start = text.partition(start)
    _, end_comment, tail = after_start.partition(end)
    assert end_comment, f"no {start} ... {end}"
    return "\n".join([head + start, *body, end + tail])


# -- planned figures ---------------------------------------------------------------------------------------------------
def memory(text: str) -> str:
    """The tables of results/memory.md, from data/plans.json."""
    known = plans.plans()
    body = ["| Llama 7B, 8 GPUs, and 70B, 64 GPUs | Base | Static memory | Peak |", "|---|---|---|---|"]
    for model, (gpus, _) in plans.MEMORY.items():
        for method in plans.METHODS:
            gigabytes = {name: f"{size / 1e9:,.2f} GB" for name, size in known[model, method, gpus]["bytes"].items()}
            base = "sharded" if "full" in method else gigabytes["base"]
            body.append(table_row(f"{model}, {method}", base, gigabytes["held"], gigabytes["peak"]))
    text = between(text, "memory", body)
    body = [table_row("GB sent by one GPU in a step, at this number of GPUs", *map(str, plans.GPUS))]
    body.append(ruler(len(plans.GPUS) + 1, numbers=True))
    body += [table_row(name, *(f"{value:,.3f}" for value in values)) for name, values in plans.traffic().items()]
    return between(text, "traffic", body)


# -- benchmarks --------------------------------------------------------------------------------------------------------
RESULT = re.compile(r"<!-- (?P<file>[\w-]+\.json) (?P<part>.+?), by tools/docs\.py -->")


def results(text: str) -> str:
    """A page with its blocks `<!-- FILE.json PART, by tools/docs.py -->` written anew.

    PART is a table of the benchmark's JSON; above it stand the command and the machine.
    """
    for block in list(RESULT.finditer(text)):
        result = json.loads((plans.DATA / block["file"]).read_text(encoding="utf-8"))
        made_by = f"{_command(block['file'], result['command'])} on {_machine(result['measured_on'])}:"
        titles, *rows = result["tables"][block["part"]]
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


def _machine(measured_on: dict[str, Any]) -> str:
    """The machine of a result in a few words."""
    cores = measured_on["cores"]
    versions = measured_on["versions"]
    amx = "with AMX" if "amx_bf16" in measured_on["cpu_features"] else "without AMX"
    device = f"{cores} CPU core{'s' * (cores > 1)} ({amx})" if measured_on["device"] == "CPU" else measured_on["device"]
    return f"{device}, torch {versions['torch'].partition('+')[0]}, mora_ds {versions['mora_ds']}"


# -- learning ----------------------------------------------------------------------------------------------------------
def learning(text: str) -> str:
    """The README with its table of what each method learned and kept on the pretrained model."""
    by_method = {point.method: point for point in points(plans.DATA / "learning_135m_replay.json")}
    body = [table_row("", "trained", "new text", "old text", "seeds"), ruler(5, numbers=True)]
    for title, method in README_LEARNING.items():
        point = by_method[method]
        perplexities = [mean_and_spread(seeds) for seeds in (point.new, point.old)]
        body.append(table_row(title, f"{point.trained:,}", *perplexities, str(len(point.new))))
    return between(text, "learning", body)
