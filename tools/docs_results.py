"""The tables within pages: benchmarks' and plans' from the JSON in docs/results/data, the
packages' from their code.

A table stands between `<!-- NAME, by tools/docs.py -->` and `<!-- end of NAME -->`. NAME is
one of `TABLES`, or FILE.json and a table of that benchmark.
"""

import ast
import json
import re
from statistics import fmean
from typing import Any

from tools import plans
from tools.figures import points
from tools.tables import cell, mean_and_spread, ruler, table_row

README_LEARNING = {
    "before training": "none",
    "LoRA, rank 8": "lora",
    "MoRA, rank 8": "mora-rotate",
    "the default recipe: Muon, a product of rank 16 for embeddings": "recipe-product",
    "full training": "full",
}
"""Row of the README's table -> its method in data/learning_135m_replay.json."""
SIZES = ("2m", "13m", "135m")
"""Of the bases whose gradients were measured."""
ENERGY = {
    "MoRA's energy": "MoRA, rotate",
    "its sides from the gradient": "M between the gradient's sides",
    "LoRA's": "LoRA, A turned to the gradient",
}
"""Column of the prediction -> its span in data/energy_*.json."""
OUTCOMES = {
    "2M": {"lora": "learning.json"},
    "13M": {"lora": "learning_13m.json", "mora-gradient": "learning_13m_sides.json"},
    "135M": {
        "lora": "learning_135m_sides.json",
        "mora-gradient": "learning_135m_sides.json",
    },
}
"""Base -> method -> the JSON that compares it with MoRA between random groups."""


TABLE = re.compile(r"<!-- (?P<name>.+?), by tools/docs\.py -->")


def with_tables(text: str) -> str:
    """A page with its tables written anew."""
    for name in TABLE.findall(text):
        body = TABLES[name]() if name in TABLES else benchmark(*name.split(" ", 1))
        head, mark, after_mark = text.partition(f"<!-- {name}, by tools/docs.py -->")
        _, end, tail = after_mark.partition(f"<!-- end of {name} -->")
        assert end, f"{name} has no end"
        text = "\n".join([head + mark, *body, end + tail])
    return text


# -- planned figures ---------------------------------------------------------------------------------------------------
def memory() -> list[str]:
    """Of results/memory.md, from data/plans.json."""
    known = plans.plans()
    body = [
        "| Llama 7B, 8 GPUs, and 70B, 64 GPUs | Base | Static memory | Peak |",
        "|---|---|---|---|",
    ]
    for model, (gpus, _) in plans.MEMORY.items():
        for method in plans.METHODS:
            gigabytes = {
                name: f"{size / 1e9:,.2f} GB"
                for name, size in known[model, method, gpus]["bytes"].items()
            }
            base = "sharded" if "full" in method else gigabytes["base"]
            body.append(
                table_row(
                    f"{model}, {method}",
                    base,
                    gigabytes["held"],
                    gigabytes["peak"],
                )
            )
    return body


def traffic() -> list[str]:
    """Of results/memory.md, from data/plans.json."""
    titles = table_row(
        "GB sent by one GPU in a step, at this number of GPUs", *map(str, plans.GPUS)
    )
    rows = [
        table_row(name, *(f"{value:,.3f}" for value in values))
        for name, values in plans.traffic().items()
    ]
    return [titles, ruler(len(plans.GPUS) + 1, numbers=True), *rows]


# -- benchmarks --------------------------------------------------------------------------------------------------------
def benchmark(file: str, part: str) -> list[str]:
    """The table `part` of a benchmark's JSON, below the command and the machine."""
    result = json.loads((plans.DATA / file).read_text(encoding="utf-8"))
    made_by = f"{_origin(file, result)}:"
    titles, *rows = result["tables"][part]
    head = [table_row(*titles), ruler(len(titles), numbers=True)]
    return ["", made_by, "", *head, *(table_row(*row) for row in rows), ""]


def _origin(file: str, result: dict[str, Any]) -> str:
    """The command and the machine that made a result, where a reader can give the command
    as it stands; otherwise the JSON that holds both, since the command names files of the
    one who measured."""
    words = result["command"].split()
    measured_on = result["measured_on"]
    versions = measured_on["versions"]
    if len(words) > LONGEST_COMMAND or "--with" in words:
        return f"`{file}`, mora_ds {versions['mora_ds']}"
    torch_version = versions["torch"].partition("+")[0]
    return f"`{result['command']}` on {_device(measured_on)}, torch {torch_version}, mora_ds {versions['mora_ds']}"


LONGEST_COMMAND = 9
"""Words of a command that stands above its table."""


def _device(measured_on: dict[str, Any]) -> str:
    if measured_on["device"] != "CPU":
        return str(measured_on["device"])
    amx = "with AMX" if "amx_bf16" in measured_on["cpu_features"] else "without AMX"
    return f"{measured_on['cores']} CPU cores ({amx})"


# -- learning ----------------------------------------------------------------------------------------------------------
def learning() -> list[str]:
    """Of the README: what each method learned and kept on the pretrained model."""
    by_method = {
        point.method: point for point in points(plans.DATA / "learning_135m_replay.json")
    }
    body = [
        table_row("", "trained", "new text", "old text", "seeds"),
        ruler(5, numbers=True),
    ]
    for title, method in README_LEARNING.items():
        point = by_method[method]
        perplexities = [mean_and_spread(seeds) for seeds in (point.new, point.old)]
        body.append(
            table_row(
                title,
                f"{point.trained:,}",
                *perplexities,
                str(len(point.new)),
            )
        )
    return body


def energy() -> list[str]:
    """Of results/learning-tables.md: the shares of every base, from data/energy_*.json, a
    column each.
    """
    tables = [
        json.loads((plans.DATA / f"energy_{size}.json").read_text(encoding="utf-8"))
        for size in SIZES
    ]
    rows = []
    for lines in zip(*(table["tables"]["mean"] for table in tables), strict=True):
        span = lines[0][0]
        rows.append([span, *(share for line in lines for share in line[1:])])
    return [
        table_row(*rows[0]),
        ruler(len(rows[0]), numbers=True),
        *(table_row(*row) for row in rows[1:]),
    ]


def prediction() -> list[str]:
    """Of results/learning.md: the energy that each span holds at the start, and what its
    method has learned.
    """
    titles = ["", *ENERGY, "perplexity: LoRA", "sides from the gradient"]
    body = [table_row(*titles), ruler(len(titles), numbers=True)]
    for base, outcomes in OUTCOMES.items():
        energies = json.loads(
            (plans.DATA / f"energy_{base.lower()}.json").read_text(encoding="utf-8")
        )
        shares = {span: columns[0] for span, *columns in energies["tables"]["mean"]}
        learned = [_against_mora(method, outcomes) for method in ("lora", "mora-gradient")]
        body.append(table_row(base, *(shares[span] for span in ENERGY.values()), *learned))
    return body


def _against_mora(method: str, outcomes: dict[str, str]) -> str:
    """How far a method's mean perplexity on the new text is from MoRA's; "-" where it was
    not measured.
    """
    if method not in outcomes:
        return "-"
    learned = {point.method: point for point in points(plans.DATA / outcomes[method])}
    return f"{fmean(learned[method].new) / fmean(learned['mora-rotate'].new) - 1:+.1%}"


# -- packages ----------------------------------------------------------------------------------------------------------
def packages() -> list[str]:
    """Of contributing.md: what each package is, by its documentation, and what it may
    import, by its test.
    """
    from tests.test_imports import MAY_IMPORT

    body = ["| Package | What it is | May import |", "|---|---|---|"]
    for name in MAY_IMPORT:
        folder = plans.ROOT / "mora_ds" / name
        if folder.is_dir():
            doc = (
                ast.get_docstring(
                    ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
                )
                or ""
            )
            imported = ", ".join(sorted(MAY_IMPORT.get(name, ()))) or "nothing of `mora_ds`"
            body.append(
                table_row(
                    f"`{name}/`",
                    cell(re.split(r"(?<=\.)\s", doc.split("\n\n")[0])[0]),
                    imported,
                )
            )
    return body


TABLES = {
    "memory": memory,
    "traffic": traffic,
    "learning": learning,
    "energy": energy,
    "prediction": prediction,
    "packages": packages,
}
