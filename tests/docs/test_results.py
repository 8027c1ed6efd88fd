"""No figure without its JSON: what the pages of results show is drawn by tools/docs.py and
tools/figures.py.
"""

import re
from statistics import fmean

import pytest

from mora_ds.common.files import read_json
from tests.helpers.pages import FENCE, PAGES, ROOT
from tools import docs_results, plans
from tools.runs import best_rows

RESULTS = sorted((ROOT / "docs/results").glob("*.md"))
DRAWN = re.compile(
    r"<!-- (?P<name>.+?), by tools/docs\.py -->.*?<!-- end of (?P=name) -->", re.DOTALL
)
TABLE = re.compile(r"^(\|.+\|)\n\|[ :|-]+\|$", re.MULTILINE)
"""The titles of a table."""
FACTS = ["| Command | What it measures | Results |"]
"""Titles of the tables that hold no measurement."""
IMAGES = {
    "base-and-matrices.svg": "a diagram",
    "tensorboard.png": "a screenshot",
    "learning.svg": "learning.json",
    "learning-long.svg": "learning_long.json",
    "learning-long-13m.svg": "learning_long_13m.json",
    "learning-scratch.svg": "learning_scratch.json",
    "memorization.svg": "memorization_135m_seeds.json",
    "soak.svg": "soak.json soak_merges.json",
}
"""Image of docs/ -> the JSON that it is drawn from, or what it shows in place of a
measurement.
"""
SOURCES = set(" ".join(IMAGES.values()).split())


def test_no_table_of_results_is_typed_by_hand():
    """But one of facts, which shows that they are found."""
    typed = [
        titles
        for page in RESULTS
        for titles in TABLE.findall(FENCE.sub("", DRAWN.sub("", page.read_text())))
    ]
    assert typed == FACTS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_drawn_table_is_what_its_json_says(page):
    text = page.read_text()
    assert docs_results.with_tables(text) == text, "run tools/docs.py"


CURVE = re.compile(
    r"^\| `(\S+\.json)` `(\S+)` (\S+) \| (\d+) \| ([\d., ]+) \| ([\d., ]+) \|",
    re.MULTILINE,
)
"""A row of the guide to a healthy run: file, method, learning rate, seeds, perplexities
against the start.
"""


def test_the_curves_of_a_healthy_run_are_those_of_the_json():
    rows = CURVE.findall((ROOT / "docs/guides/healthy-run.md").read_text())
    assert len(rows) >= 6
    for file, method, learning_rate, seeds, *sides in rows:
        runs = read_json(ROOT / "docs/results/data" / file)["runs"]
        (start,) = (run["perplexity"] for run in runs if run["method"] == "none")
        curves = [
            run["curve"]
            for run in runs
            if (run["method"], run["learning_rate"]) == (method, float(learning_rate))
        ]
        assert len(curves) == int(seeds)
        for side, shown in zip(("old", "new"), sides, strict=True):
            means = [
                sum(point[side] for point in points) / len(curves)
                for points in zip(*curves, strict=True)
            ]
            assert [f"{mean / start[side]:.2f}" for mean in means] == shown.split(", ")


QUOTED = {
    "index.md": {"learning_135m_rivals.json": ("lora", "mora")},
    "results/learning.md": {
        "learning_135m_replay.json": ("lora", "mora-rotate"),
        "learning_135m_rivals.json": (
            "lora",
            "mora",
            "lora-product",
            "mora-product",
            "mora-muon-product",
        ),
        "learning_135m_long.json": ("lora", "mora"),
        "learning_135m_long_one_seed.json": (
            "mora",
            "full",
            "relora",
            "remora",
            "lora-product",
            "mora-product",
        ),
        "learning_gemma.json": ("lora", "mora"),
        "learning_135m_sides.json": ("mora-rotate", "mora-gradient"),
        "learning_135m_renewed.json": ("remora-rotate", "remora-gradient"),
        "learning_13m_sides.json": ("remora-rotate", "remora-gradient"),
    },
    "results/learning-tables.md": {
        "learning_135m.json": ("lora", "mora-rotate", "full")
    },
}
"""Page of docs/ -> JSON -> methods of which a sentence gives the perplexities on the new
and on the old text.
"""


@pytest.mark.parametrize(
    ("page", "file", "method"),
    [
        (page, file, method)
        for page, files in QUOTED.items()
        for file, methods in files.items()
        for method in methods
    ],
)
def test_perplexities_in_a_sentence_are_those_of_the_json(page, file, method):
    text = " ".join((ROOT / "docs" / page).read_text().split())
    (row,) = (row for row in best_rows(plans.DATA / file) if row.method == method)
    assert f"{row.mean('new'):.1f} and {row.mean('old'):.1f}" in text


LEADS = """
README.md                | on Gemma 3 270M LoRA was {}% ahead      | gemma       | mora
docs/recipes/choosing.md | Gemma 3 270M | **LoRA was {}% ahead**   | gemma       | mora
docs/recipes/choosing.md | LoRA was {}% ahead                      | 135m_replay | mora-rotate
docs/results/learning.md | **Without that token LoRA was {}% ahead | 135m_replay | mora-rotate
"""
"""Page, a sentence on LoRA's lead on the new text, its JSON, and MoRA's method there."""


OLD_LEADS = {
    "README.md": "in 1,500 steps LoRA kept the old text {}% better",
    "docs/recipes/choosing.md": "after 768,000 tokens LoRA was {}% ahead on old text",
    "docs/results/learning.md": "level on the new text, LoRA is {}% ahead on the old one",
}
"""Page -> what it says of LoRA's lead on the old text after a long run, in which both
learn as much of the new one."""


@pytest.mark.parametrize("page", OLD_LEADS)
def test_a_lead_of_lora_on_the_old_text_is_that_of_the_json(page):
    rows = {row.method: row for row in best_rows(plans.DATA / docs_results.LONG)}
    lora, mora = rows["lora"], rows["mora"]
    assert mora.mean("new") == pytest.approx(lora.mean("new"), rel=0.01)
    percent = 100 * (1 - lora.mean("old") / mora.mean("old"))
    text = " ".join((ROOT / page).read_text().split())
    assert OLD_LEADS[page].format(f"{percent:.0f}") in text


MERGED = {
    "docs/guides/remora.md": "four cycles cost LoRA {}% there, and MoRA nothing",
    "docs/results/learning.md": "four merges cost LoRA {}%, and MoRA nothing",
}
"""Page -> what it says merges cost in a long run."""


@pytest.mark.parametrize("page", MERGED)
def test_what_merges_cost_is_that_of_the_json(page):
    # Of the same seed
    plain = {row.method: row for row in best_rows(plans.DATA / docs_results.LONG)}
    merged = {
        row.method: row for row in best_rows(plans.DATA / docs_results.LONG_ONE_SEED)
    }
    cost = merged["relora"].mean("new") / plain["lora"].mean("new", {1}) - 1
    assert MERGED[page].format(f"{100 * cost:.0f}") in " ".join(
        (ROOT / page).read_text().split()
    )
    assert merged["remora"].mean("new") <= plain["mora"].mean("new", {1})


@pytest.mark.parametrize("case", LEADS.strip().splitlines())
def test_a_lead_of_lora_is_that_of_the_json(case):
    page, *sentence, file, method = (cell.strip() for cell in case.split("|"))
    means = {
        row.method: row.mean("new")
        for row in best_rows(plans.DATA / f"learning_{file}.json")
    }
    percent = 100 * (1 - means["lora"] / means[method])
    text = " ".join((ROOT / page).read_text().split())
    assert " | ".join(sentence).format(f"{percent:.0f}") in text


MEMORIZED = {
    "README.md": "{mora[300]}% to {lora[300]}% in 300 steps",
    "docs/results/learning.md": (
        "knows {mora[300]}% of the digits after 300 steps, LoRA {lora[300]}%: a lead in each seed, as predicted. "
        "After 400 steps it is {mora[400]}% and {lora[400]}%, and LoRA leads in one seed"
    ),
}
"""Page -> a sentence on how much each method memorized."""


@pytest.mark.parametrize("page", MEMORIZED)
def test_what_a_sentence_says_was_memorized_is_that_of_the_json(page):
    runs = read_json(plans.DATA / "memorization_135m_seeds.json")["runs"]
    mora, lora = (
        [run for run in runs if run["method"] == method] for method in ("mora", "lora")
    )

    def shares(runs, step):
        return [run["accuracy"][run["steps"].index(step)] for run in runs]

    def percents(runs):
        return {step: f"{100 * fmean(shares(runs, step)):.0f}" for step in (300, 400)}

    text = " ".join((ROOT / page).read_text().split())
    assert MEMORIZED[page].format(mora=percents(mora), lora=percents(lora)) in text

    def seeds_with_lead(step):
        pairs = zip(shares(mora, step), shares(lora, step), strict=True)
        return sum(high > low for high, low in pairs)

    assert (seeds_with_lead(300), seeds_with_lead(400)) == (3, 2)


def test_every_json_is_shown_somewhere():
    names = {
        name for page in PAGES for name in docs_results.TABLE.findall(page.read_text())
    }
    shown = {name.split()[0] for name in names}
    energies = {f"energy_{size}.json" for size in docs_results.SIZES}
    files = {path.name for path in (ROOT / "docs/results/data").glob("*.json")}
    layerwise = set(docs_results.LAYERWISE.values())
    memorization = set(docs_results.MEMORIZATION)
    # Drawn without their names or not at all, but a page says where they are
    named = {
        "learning_135m.json",
        "learning_135m_long.json",
        "learning_135m_long_one_seed.json",
        "learning_135m_pilot.json",
        "learning_trials.json",
    }
    tables = (ROOT / "docs/results/learning-tables.md").read_text()
    assert all(f"`{name}`" in tables for name in named)
    drawn = shown | energies | layerwise | memorization | SOURCES
    # plans.json: the tables of results/memory.md
    assert files - drawn == {"plans.json"} | named


def test_every_image_has_its_data_or_shows_none():
    files = {
        path.name
        for path in (ROOT / "docs").rglob("*.*")
        if path.suffix in (".svg", ".png", ".jpg")
    }
    assert files == set(IMAGES)
    data = {source for source in SOURCES if source.endswith(".json")}
    assert data <= {path.name for path in (ROOT / "docs/results/data").glob("*.json")}
