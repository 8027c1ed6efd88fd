"""tools/bench/learning.py: wrong flags, the choice of the best learning rate, and that a
finished run is not repeated.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mora_ds.common.files import read_json
from mora_ds.config.arguments import parse
from mora_ds.config.validate import validate
from tests.helpers.errors import user_error
from tests.helpers.tables import each_row
from tests.helpers.tools import call, tool
from tools import figures
from tools.bench.learning_methods import METHODS_FILE, Methods
from tools.bench.trials import command_line
from tools.runs import Row, best_rows

BAD = """
--methods loar | Did you mean 'lora'?
--methods lora@fast | 'fast' is no learning rate
--steps 0 | at least 1
--batch 0 | at least 1
--replay 1.0 | --replay must be
--base MODEL | belong together
--base gone --new a b --old c d | there is no gone
--methods_file gone.yaml | gone.yaml
--with gone.json | --with: there is no gone.json
"""


@each_row("flags, message", BAD)
def test_bad_flags_are_named_before_anything_runs(tmp_path, flags, message):
    with user_error(re.escape(message)):
        call("bench/learning", "--work", tmp_path / "work", *flags.split())
    assert not (tmp_path / "work").exists()


BAD_METHODS = """
{rates: []} | at least 1 item
{rates: [0]} | above 0
{rates: [1], replay: 1.5} | replay must be
{rates: [1], cycle: 2} | cycle
"""


@each_row("method, message", BAD_METHODS)
def test_bad_methods_are_named_with_their_file(tmp_path, method, message):
    path = tmp_path / "methods.yaml"
    path.write_text(f"settings: {{}}\nmethods: {{own: {method}}}\n")
    with user_error(f"methods.yaml.*{message}"):
        call("bench/learning", "--work", tmp_path / "work", "--methods_file", path)


@pytest.mark.parametrize(
    "path",
    sorted(METHODS_FILE.parent.glob("learning*.yaml")),
    ids=lambda path: path.stem,
)
def test_every_method_is_one_that_the_training_program_takes(user, tmp_path, path):
    methods = Methods.read(path)
    files = {
        "model_name_or_path": user.model,
        "train_files": [user.train],
        "eval_files": [user.held],
    }
    for method in methods.methods.values():
        for rate in method.rates:
            of_method = method.settings(rate, 3000, user.held)
            settings = {**files, "max_steps": 3000, **methods.settings, **of_method}
            validate(parse(command_line(settings, tmp_path / "recipe.yaml")))


def row(method, rate, new, old):
    """A row of a method of rank 8, with a run for each seed."""
    texts = zip(new, old, strict=True)
    runs = [
        {"seed": seed, "trained": 10, "perplexity": {"new": on_new, "old": on_old}}
        for seed, (on_new, on_old) in enumerate(texts, 1)
    ]
    return Row(method, 8, rate, runs)


def test_best_of_equal_learning_rates_forgets_least():
    bench = tool("bench/learning")
    rows = [
        row("lora", 1e-3, new=[250.0, 252.0], old=[90.0, 90.0]),
        row("lora", 1e-2, new=[201.0, 203.0], old=[100.0, 102.0]),
        row("lora", 3e-2, new=[201.0, 200.0], old=[130.0, 131.0]),
        row("full", 1e-3, new=[101.0], old=[99.0]),
    ]
    assert bench.best_rates(rows) == {("lora", 8): 1e-2, ("full", 8): 1e-3}
    assert bench.rate_cell(rows[1], (1e-3, 1e-2, 3e-2)) == "0.01"
    assert bench.rate_cell(rows[2], (1e-2, 3e-2)) == "0.03*"
    assert bench.rate_cell(rows[1], (1e-2,)) == "0.01"


def test_the_gap_is_that_of_the_seeds_that_all_have():
    bench = tool("bench/learning")
    lora = row("lora", 1e-2, new=[201.0, 203.0], old=[100.0, 102.0])
    full = row("full", 1e-3, new=[101.0], old=[99.0])
    mora = row("mora-rotate", 1e-2, new=[176.0, 300.0], old=[99.0, 99.0])
    peers = {"lora": lora, "full": full}
    assert bench.gap_cell(mora, peers) == "25%"
    assert bench.gap_cell(lora, peers) == "-"
    assert bench.gap_cell(mora, {}) == "-"


@pytest.fixture
def ran(monkeypatch):
    """The settings of all runs. The runs are pretended: 0.01 is the best learning rate."""
    ran = []

    def pretend(settings, log):
        folder = Path(settings["output_dir"])
        folder.mkdir()
        ran.append(settings)
        perplexities = {
            "new": 100.0
            + settings["seed"]
            + 1e4 * abs(settings["learning_rate"] - 1e-2),
            "old": 200.0,
        }
        summary = {
            "trainable_params": 7,
            "perplexity_after": perplexities,
            "peak_memory_bytes": 3 * 2**29,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        rows = [
            {"step": 10, "loss": 5.0, "step_time_s": 9.0},
            {"step": 15, "loss": 5.0, "step_time_s": 2.0},
            {"step": 20, "loss": 5.0, "step_time_s": 2.5},
            {"step": 20, "eval_perplexity": perplexities},
        ]
        if "eval_tasks" in settings:
            scores = {"acc_norm": 0.5, "acc": 0.1 + settings["seed"] / 10}
            rows.append({"step": 20, "tasks": {"quiz": scores}})
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / "metrics.jsonl").write_text("".join(lines))

    monkeypatch.setattr(tool("bench/learning"), "pretrain_alone", pretend)
    return ran


def bench(user, work, report, *flags):
    """A call of 40 steps and two seeds, one in the sweep, unless `flags` say otherwise."""
    texts = ("--new", user.train, user.held, "--old", user.train, user.other)
    files = ("--base", user.model, *texts, "--work", work, "--json", report)
    call(
        "bench/learning",
        *files,
        "--jobs 1 --steps 40 --seeds 2 --sweep_seeds 1",
        *flags,
    )


def test_a_finished_run_is_not_repeated(user, tmp_path, ran):
    methods = "--methods lora@0.003 lora@0.01 lora@0.03 relora@0.01"

    def again(*more):
        bench(user, tmp_path / "work", tmp_path / "all.json", methods, *more)

    again()
    assert [run["learning_rate"] for run in ran] == [3e-3, 1e-2, 3e-2, 1e-2, 1e-2, 1e-2]
    assert [run.get("merge_every") for run in ran] == [None, None, None, 10, None, 10]
    report = read_json(tmp_path / "all.json")
    assert len(report["runs"]) == 6
    for path in (tmp_path, user.root):
        assert str(path) not in json.dumps(report["runs"])
    (point,) = report["runs"][0]["curve"]
    assert point == {"step": 20, "new": pytest.approx(171.0), "old": 200.0}
    row = report["tables"]["learning"][1]
    assert row == [
        "lora",
        "7",
        "0.01",
        "2",
        "101.5 ± 0.5",
        "200.0 ± 0.0",
        "2.50",
        "1.50",
    ]
    again()
    assert len(ran) == 6
    again("--rank 4")
    assert len(ran) == 12
    assert {run["per_device_train_batch_size"] for run in ran} == {8}
    again("--methods none recipe@0.01 --batch 2 --compute weight --replay 0.25")
    changed = [
        (run["per_device_train_batch_size"], run.get("compute"), run.get("replay"))
        for run in ran[12:]
    ]
    assert changed == [
        (2, None, None),
        *[(2, "weight", [f"old={user.train}:0.25"])] * 2,
    ]


def test_a_table_grows_by_the_runs_of_an_earlier_one(user, tmp_path, ran):
    first = tmp_path / "first.json"
    second = tmp_path / "second.json"
    bench(user, tmp_path / "one", first, "--methods lora")
    assert len(ran) == 4

    def grown(user, *more):
        bench(user, tmp_path / "two", second, "--with", first, "--methods", *more)

    moved = replace(user, train=Path(shutil.copy(user.train, tmp_path / "moved.jsonl")))
    grown(moved, "lora@0.01", "recipe@0.003", "--seeds 3")
    added = [(run["seed"], "replay" in run) for run in ran[4:]]
    assert added == [(1, True), (3, False), (2, True), (3, True)]
    report = read_json(second)
    rows = [[row[0], row[2], row[3]] for row in report["tables"]["learning"][1:]]
    assert rows == [["lora", "0.01", "3"], ["recipe", "0.003", "3"]]
    runs = [
        (run["method"], run["learning_rate"], run["seed"]) for run in report["runs"]
    ]
    of_lora = [(3e-3, 1), (1e-2, 1), (1e-2, 2), (1e-2, 3), (3e-2, 1)]
    assert runs[:5] == [("lora", *run) for run in of_lora]
    refused = "--with .*first.json: not the same"
    with user_error(f"{refused} flags as here: r8-41-lora-0.003-1"):
        grown(user, "none", "--steps 41")
    with user_error(f"{refused} texts as here: r8-40-lora"):
        grown(replace(user, train=user.held), "none")
    assert len(ran) == 8


def test_ranks_and_scores_of_tasks_are_in_one_table(user, tmp_path, ran):
    quiz = tmp_path / "quiz.yaml"
    methods = "--rank 2 4 --methods full@0.01 lora@0.01"
    bench(user, tmp_path, tmp_path / "all.json", methods, "--tasks", quiz)
    # Without a rank a method runs once
    assert [run["mora_rank"] for run in ran] == [2, 2, 4, 2, 2, 4]
    assert [run["eval_tasks"] for run in ran] == [[str(quiz)]] * 6
    report = read_json(tmp_path / "all.json")
    scores = [run["scores"]["quiz"] for run in report["runs"]]
    assert scores[:2] == pytest.approx([0.2, 0.3])
    rows = [(row[0], row[1], row[-3]) for row in report["tables"]["learning"]]
    assert rows == [
        ("rank", "method", "quiz"),
        ("-", "full", "25.0%"),
        ("2", "lora", "25.0%"),
        ("4", "lora", "25.0%"),
    ]
    best = best_rows(tmp_path / "all.json")
    assert [(row.method, row.rank, len(row.runs)) for row in best] == [
        ("full", 0, 2),
        ("lora", 2, 2),
        ("lora", 4, 2),
    ]


def test_the_figures_have_a_curve_for_every_method(tmp_path):
    for name, methods in figures.DRAWN.items():
        figures.draw(name, tmp_path)
        text = (tmp_path / f"{name.replace('_', '-')}.svg").read_text()
        labels = {figures.STYLES[method][0] for method in methods if method != "none"}
        assert {label for label in labels if f">{label}<" in text} == labels
