"""tools/bench/memorization.py, as small as it gets: every method learns on one engine, and
what it prints is right.
"""

import json
import sys
from types import SimpleNamespace

import pytest

from mora_ds.common.files import read_json
from tests.helpers.errors import user_error
from tests.helpers.jobs import REPOSITORY
from tests.helpers.tables import words
from tests.helpers.tools import call, called, tool
from tools import figures
from tools.runs import rows_of

TOOL = REPOSITORY / "tools/bench/memorization.py"


def test_bad_flags_are_named_before_anything_runs(tmp_path):
    for flags, message in (
        ("--steps 20", "--steps must be above 20"),
        ("--batch 7 --micro_batch 2", "--batch 7 is no multiple"),
    ):
        with user_error(message):
            call("bench/memorization", "--work", tmp_path / "work", flags)
    assert not (tmp_path / "work").exists()


def test_the_small_base_learns_what_digits_are_and_is_made_once(
    tmp_path, user, monkeypatch
):
    bench = tool("bench/memorization")
    monkeypatch.setattr(bench, "DIGIT_STEPS", 1)
    warm = SimpleNamespace(warm=user.model)
    monkeypatch.setattr(bench, "warm_base", lambda folder: warm)
    folder = bench.small_base(tmp_path)
    assert bench.PairTokens.of(folder).pairs(3, seed=1).shape == (3, 66)
    monkeypatch.delattr(bench, "warm_base")
    assert bench.small_base(tmp_path) == folder


def test_the_best_learning_rate_is_that_of_the_largest_mean_accuracy():
    runs = [
        {
            "method": "mora",
            "rank": rank,
            "learning_rate": rate,
            "seed": 1,
            "accuracy": accuracy,
        }
        for rank, rate, accuracy in (
            (1, 0.1, [0.2, 0.9]),
            (1, 0.2, [0.8, 0.8]),
            (8, 0.1, [0.5, 0.5]),
            (8, 0.2, [0.4, 0.5]),
        )
    ]
    best = tool("bench/memorization").best_rates(rows_of(runs))
    assert best == {("mora", 1): 0.2, ("mora", 8): 0.1}


def test_sides_are_rounded_down_unless_asked_otherwise():
    """On a layer of SmolLM2-135M, where LoRA of rank 1 has 2,112 parameters."""
    bench = tool("bench/memorization")
    sides = {
        name: bench.adapter_of(bench.Trial(name, 1, 0.1, 1)).mora_matrix_size(576, 1536)
        for name in ("mora", "mora-unrounded")
    }
    assert sides == {"mora": 32, "mora-unrounded": 44}


def test_the_figure_has_a_curve_for_each_method(tmp_path):
    figures.draw_memorization(tmp_path)
    text = (tmp_path / "memorization.svg").read_text()
    assert all(f">{label}<" in text for label in ("LoRA", "MoRA"))


def test_ordinary_text_is_cut_into_rows(tmp_path, user):
    bench = tool("bench/memorization")
    file = tmp_path / "text.jsonl"
    line = json.dumps({"text": "the cat sat on the mat " * 50})
    file.write_text(f"{line}\n" * 100)
    assert bench.rows_of_text(user.model, file).shape == (16, 256)
    file.write_text(f"{line}\n")
    with user_error("has fewer than 4,096 tokens"):
        bench.rows_of_text(user.model, file)


def memorized(folder, user, *flags):
    """Results of two pairs on the tiny model, and what was printed."""
    toy = "--pairs 2 --batch 4 --micro_batch 2 --steps 80 --rank 4"
    files = ("--work", folder, "--base", user.model, "--json", folder / "all.json")
    done = called(words(sys.executable, TOOL, toy, *files, *flags))
    assert done.returncode == 0, done.stderr
    results = read_json(folder / "all.json")["runs"]
    for result in results:
        assert result["steps"] == [10, 20, 30, 40, 50, 60, 70, 80]
        assert len(result["accuracy"]) == len(result["loss"]) == 8
        assert result["loss"][-1] < result["loss"][0]
    return results, done.stdout


@pytest.mark.heavy
def test_two_pairs_are_memorized(tmp_path, user):
    """Every method learns; MoRA, with no more parameters, more than LoRA."""
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "the cat sat on the mat " * 2000}))
    flags = (
        "--seeds 1 --methods full@1e-2 lora@1e-2 mora@1e-2 remora@1e-2",
        "--text",
        text,
    )
    results, output = memorized(tmp_path, user, *flags)
    for result in results:
        before, after = result["perplexity"]
        assert before == results[0]["perplexity"][0] != after
    named = {result["method"]: result for result in results}
    assert set(named) == {"full", "lora", "mora", "remora"}
    assert len(results) == 4
    trained = {method: result["trained"] for method, result in named.items()}
    assert trained["mora"] == trained["remora"] <= trained["lora"] < trained["full"]
    assert named["full"]["accuracy"][-1] >= 0.9
    assert named["mora"]["accuracy"][-1] > named["lora"]["accuracy"][-1]
    assert "with 90% of each seed" in output

    # The command goes on where it was stopped: here at its end
    assert "mora-r4-0.01-1" in output
    again, printed = memorized(tmp_path, user, *flags)
    assert again == results
    assert "mora-r4-0.01-1" not in printed
