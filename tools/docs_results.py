"""The tables within pages: benchmarks' and plans' from the JSON in docs/results/data,
the packages' from their code.

A table stands between `<!-- NAME, by tools/docs.py -->` and `<!-- end of NAME -->`.
NAME is one of `TABLES`, or FILE.json and a table of that benchmark.
"""

import ast
import re
from typing import Any

from mora_ds.common.files import read_json
from tools import plans
from tools.runs import Row, best_rows, rows_of
from tools.tables import cell, mean_and_spread, number_table, ruler, table_row

PRETRAINED = "learning_135m_rivals.json"
LONG = "learning_135m_long.json"
LONG_ONE_SEED = "learning_135m_long_one_seed.json"
"""Runs of 1,500 steps, with other old text; the second file has more methods."""
README_LEARNING = {
    "before training": "none",
    "LoRA, rank 8": "lora",
    "LoRA and a product of rank 16 for the embeddings": "lora-product",
    "MoRA, rank 8": "mora",
    "the default recipe: MoRA and that product": "mora-product",
}
"""Row of the README's table -> its method in `PRETRAINED` and `LONG`."""
SIZES = ("2m", "13m", "135m")
"""Sizes of the bases whose gradients were measured."""
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
LAYERWISE = {
    "Gemma": "layerwise_gemma.json",
    "SmolLM2": "layerwise_135m.json",
    "13M": "layerwise_13m.json",
    "2M": "layerwise_2m.json",
}
"""Base -> the JSON of its runs with a scale for each layer's update."""

MEMORIZATION = (
    "memorization_135m.json",
    "memorization_135m_seeds.json",
    "memorization_135m_rank1.json",
    "memorization_135m_full.json",
    "memorization_gemma.json",
)
"""The JSONs of the paper's task on pretrained models. The first two share the runs of
the first seed at the best learning rate."""

TABLE = re.compile(r"<!-- (?P<name>.+?), by tools/docs\.py -->")


def with_tables(text: str) -> str:
    """A page with its tables rewritten."""
    for name in TABLE.findall(text):
        body = TABLES[name]() if name in TABLES else benchmark(*name.split(" ", 1))
        head, mark, after_mark = text.partition(f"<!-- {name}, by tools/docs.py -->")
        _, end, tail = after_mark.partition(f"<!-- end of {name} -->")
        assert end, f"{name} has no end"
        text = "\n".join([head + mark, *body, end + tail])
    return text


# -- planned figures -------------------------------------------------------------------
def memory() -> list[str]:
    """The table of results/memory.md, from data/plans.json."""
    known = plans.plans()
    titles = "| Llama 7B, 8 GPUs, and 70B, 64 GPUs | Base | Static memory | Peak |"
    body = [titles, ruler(4)]
    for model, (gpus, _) in plans.MEMORY.items():
        for method in plans.METHODS:
            nbytes = known[model, method, gpus]["bytes"]
            base, static, peak = (
                f"{nbytes[name] / 1e9:,.2f} GB" for name in ("base", "held", "peak")
            )
            if "full" in method:
                base = "sharded"
            body.append(table_row(f"{model}, {method}", base, static, peak))
    return body


def traffic() -> list[str]:
    """The second table of results/memory.md, from data/plans.json: what one GPU sends for
    Llama 7B."""
    known = plans.plans()

    def sent(method: str) -> list[float]:
        return [known["7B", method, gpus]["bytes_sent"] for gpus in plans.GPUS]

    def sent_with_base_sharded(gpus: int) -> float:
        """What a LoRA sends under ZeRO-3, which gathers frozen parameters like others: the
        all-gathers of full training, and LoRA's own reductions."""
        gathered = known["7B", "full training, ZeRO-3", gpus]["bytes_gathered"]
        reduced = known["7B", "LoRA r=8, ZeRO-2", gpus]["bytes_reduced"]
        return float((gathered + reduced) * (gpus - 1) / gpus)

    nbytes = {
        "full training, ZeRO-3": sent("full training, ZeRO-3"),
        "LoRA r=8, ZeRO-3, base sharded": list(map(sent_with_base_sharded, plans.GPUS)),
        "mora_ds, MoRA r=256": sent("MoRA r=256"),
        "mora_ds, whole embeddings": sent("whole embeddings"),
        "mora_ds, default recipe": sent("default recipe"),
        "mora_ds, MoRA r=8": sent("MoRA r=8"),
        "LoRA r=8, ZeRO-2 (as PEFT)": sent("LoRA r=8, ZeRO-2"),
    }
    rows = [
        [name, *(f"{value / 1e9:,.3f}" for value in values)]
        for name, values in nbytes.items()
    ]
    what = "GB sent by one GPU in a step, at this number of GPUs"
    return number_table([what, *map(str, plans.GPUS)], rows)


# -- benchmarks ------------------------------------------------------------------------
def benchmark(file: str, table: str) -> list[str]:
    """The table `table` of a benchmark's JSON, below the command and the machine."""
    result = read_json(plans.DATA / file)
    titles, *rows = result["tables"][table]
    return ["", f"{_origin(file, result)}:", "", *number_table(titles, rows), ""]


def _origin(file: str, result: dict[str, Any]) -> str:
    """The command and the machine of a result, where a reader can give the
    command as it stands; otherwise the JSON that holds both, since the command names
    files of the one who measured."""
    command = result["command"]
    machine = result["measured_on"]
    versions = machine["versions"]
    if len(command.split()) > LONGEST_COMMAND or "--with" in command:
        return f"`{file}`, mora_ds {versions['mora_ds']}"
    device = machine["device"]
    if device == "CPU":
        amx = "with AMX" if "amx_bf16" in machine["cpu_features"] else "without AMX"
        device = f"{machine['cores']} CPU cores ({amx})"
    torch = versions["torch"].partition("+")[0]
    return f"`{command}` on {device}, torch {torch}, mora_ds {versions['mora_ds']}"


LONGEST_COMMAND = 9
"""Words of a command that stands above its table."""


def merges_by_cycle() -> list[str]:
    """Of results/scale.md: CPU seconds of a merge, from data/scale.json, a cycle a
    column."""
    tables = read_json(plans.DATA / "scale.json")["tables"]
    _, *counted = tables["CPU seconds of a merge and a replay"]
    seconds: dict[str, dict[str, str]] = {}
    for layers, ranks, cycle, merge, *_ in counted:
        seconds.setdefault(f"{layers} x {ranks}", {})[cycle] = merge
    cycles = next(iter(seconds.values()))
    rows = [[what, *merges.values()] for what, merges in seconds.items()]
    return number_table(["layers x ranks", *cycles], rows)


# -- learning --------------------------------------------------------------------------
def learning() -> list[str]:
    """README's table: what each method learned and kept on the pretrained model."""
    titles = [
        "",
        "trained",
        "new text",
        "old text",
        "seeds",
        "new/old in 1,500 steps, 2 seeds (without ±: 1)",
    ]
    by_method = {row.method: row for row in best_rows(plans.DATA / PRETRAINED)}
    # Two seeds come before one
    long_by_method = {row.method: row for row in reversed(_long_rows())}
    lines = []
    for title, method in README_LEARNING.items():
        row = by_method[method]
        texts = (mean_and_spread(row.perplexities(text)) for text in ("new", "old"))
        after_long = long_by_method.get(method)
        last = "-" if after_long is None else _new_and_old(after_long)
        lines.append([title, f"{row.trained:,}", *texts, str(len(row.runs)), last])
    return number_table(titles, lines)


def long_runs() -> list[str]:
    """Of results/learning-tables.md: what each method learned, kept, answered and cost in
    1,500 steps."""
    lines = []
    for row in _long_rows():
        tasks = (f"{100 * row.score(task):.1f}" for task in LONG_TASKS)
        cost = ("-", "-")
        if row.trained:
            cost = (f"{row.cost('s/step'):.2f}", f"{row.cost('peak GiB'):.2f}")
        rate = f"{row.rate:g}" if row.trained else "-"
        lines.append([row.method, rate, _new_and_old(row), "/".join(tasks), *cost])
    titles = ["", "learning rate", "new/old", "tasks, %", "s/step", "peak GiB"]
    return number_table(titles, lines)


LONG_TASKS = ("hpo_trained", "hpo_held")


def _long_rows() -> list[Row]:
    return best_rows(plans.DATA / LONG) + best_rows(plans.DATA / LONG_ONE_SEED)


def layerwise() -> list[str]:
    """Of results/learning-tables.md: LoRA, MoRA, and MoRA with a scale for each layer's
    update, at the best learning rate of four."""
    lines = []
    for base, file in LAYERWISE.items():
        by_method = {row.method: row for row in best_rows(plans.DATA / file)}
        mora = by_method.get("mora") or by_method["mora-rotate"]
        rows = (by_method["lora"], mora, by_method["mora-layerwise"])
        cells = (f"{row.rate:g}: {_new_and_old(row)}" for row in rows)
        lines.append([base, *cells])
    return number_table(["", "LoRA", "MoRA", "MoRA with scales"], lines)


def _new_and_old(row: Row) -> str:
    texts = (mean_and_spread(row.perplexities(text)) for text in ("new", "old"))
    return "/".join(texts).replace(" ", "")


def memorization() -> list[str]:
    """Of results/learning-tables.md: digits known in the course of the runs, and the
    perplexity of prose after them."""
    runs: dict[tuple[str, int, float, int], dict[str, Any]] = {}
    for file in MEMORIZATION:
        model = "Gemma/" if "gemma" in file else ""
        for run in read_json(plans.DATA / file)["runs"]:
            method = model + run["method"]
            trial = (method, run["rank"], run["learning_rate"], run["seed"])
            runs[trial] = {**run, "method": method}
    rows = rows_of(runs.values())
    steps = rows[0].runs[0]["steps"]
    shown = [place for place, step in enumerate(steps) if step in (200, 300, 400)]
    titles = ["digits right, %", "learning rate"]
    lines = []
    for row in rows:
        name = f"{row.method}-{row.rank}" if row.rank else row.method
        line = [name, f"{row.rate:g}"]
        for place in shown:
            percents = [100 * run["accuracy"][place] for run in row.runs]
            line.append(mean_and_spread(percents))
        prose = [run["perplexity"][1] for run in row.runs]
        lines.append([*line, mean_and_spread(prose)])
    titles += [f"{steps[place]}" for place in shown]
    return number_table([*titles, "prose"], lines)


def _energies(size: str) -> dict[str, list[str]]:
    """{span: the share of each base of this size}, with the bases' names first."""
    table = read_json(plans.DATA / f"energy_{size}.json")["tables"]["mean"]
    return {span: shares for span, *shares in table}


def prediction() -> list[str]:
    """The table of results/learning.md: each span's energy at the start, and what was
    learned."""
    lines = []
    for base, outcomes in OUTCOMES.items():
        energies = _energies(base.lower())
        shares = [energies[span][0] for span in ENERGY.values()]
        learned = [
            _against_mora(method, outcomes) for method in ("lora", "mora-gradient")
        ]
        lines.append([base, *shares, *learned])
    titles = ["", *ENERGY, "perplexity: LoRA", "sides from the gradient"]
    return number_table(titles, lines)


def _against_mora(method: str, outcomes: dict[str, str]) -> str:
    """How far a method's mean perplexity on the new text is from MoRA's; "-" where it
    was not measured."""
    if method not in outcomes:
        return "-"
    learned = {row.method: row for row in best_rows(plans.DATA / outcomes[method])}
    return (
        f"{learned[method].mean('new') / learned['mora-rotate'].mean('new') - 1:+.1%}"
    )


# -- packages --------------------------------------------------------------------------
def packages() -> list[str]:
    """The table of contributing.md: what each package is, and what it may import."""
    from tests.test_imports import MAY_IMPORT

    body = ["| Package | What it is | May import |", ruler(3)]
    for name, may_import in MAY_IMPORT.items():
        package = plans.ROOT / "mora_ds" / name / "__init__.py"
        if package.is_file():
            doc = (
                ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) or ""
            )
            sentence = re.split(r"(?<=\.)\s", doc)[0]
            imported = ", ".join(sorted(may_import)) or "nothing of `mora_ds`"
            body.append(table_row(f"`{name}/`", cell(sentence), imported))
    return body


TABLES = {
    "memory": memory,
    "traffic": traffic,
    "learning": learning,
    "long runs": long_runs,
    "layerwise": layerwise,
    "memorization": memorization,
    "merges by cycle": merges_by_cycle,
    "prediction": prediction,
    "packages": packages,
}
