"""tools/bench/learning.py: what it refuses, which rate it calls the best, and that a finished run is not repeated."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mora_ds.common.errors import UserError
from tests.helpers.tools import call, tool

BAD = (
    (["--methods", "loar"], "Did you mean 'lora'?"),
    (["--methods", "lora@fast"], "'fast' is no learning rate"),
    (["--steps", "0"], "at least 1"),
    (["--base", "MODEL"], "belong together"),
    (["--base", "gone", "--new", "a", "b", "--old", "c", "d"], "there is no gone"),
    (["--methods_file", "gone.yaml"], "gone.yaml"),
)


@pytest.mark.parametrize("flags, message", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_flags_are_named_before_anything_runs(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        call("bench/learning", "--work", tmp_path / "work", *flags)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "method, message",
    [("{rates: []}", "positive rates"), ("{rates: [1], replay: 1.5}", "shares"), ("{rates: [1], cycle: 2}", "cycle")],
)
def test_bad_methods_are_named_with_their_file(tmp_path: Path, method: str, message: str) -> None:
    path = tmp_path / "methods.yaml"
    path.write_text(f"settings: {{}}\nmethods: {{own: {method}}}\n")
    with pytest.raises(UserError, match=f"methods.yaml.*{message}"):
        call("bench/learning", "--work", tmp_path / "work", "--methods_file", path)


def test_of_rates_that_learn_alike_the_one_that_forgets_least_is_best() -> None:
    bench = tool("bench/learning")
    rows = [
        bench.Row("lora", 1e-3, 10, new={1: 250.0, 2: 252.0}, old={1: 90.0, 2: 90.0}),
        bench.Row("lora", 1e-2, 10, new={1: 201.0, 2: 203.0}, old={1: 100.0, 2: 102.0}),
        bench.Row("lora", 3e-2, 10, new={1: 201.0, 2: 200.0}, old={1: 130.0, 2: 131.0}),
        bench.Row("full", 1e-3, 99, new={1: 101.0}, old={1: 99.0}),
        bench.Row("mora-rotate", 1e-2, 9, new={1: 176.0, 2: 300.0}, old={1: 99.0, 2: 99.0}),
    ]
    assert [(row.method, row.rate) for row in bench._best(rows)][:2] == [("lora", 1e-2), ("full", 1e-3)]
    assert bench._rate(rows[1], (1e-3, 1e-2, 3e-2)) == "0.01" and bench._rate(rows[2], (1e-2, 3e-2)) == "0.03*"
    assert bench._rate(rows[1], (1e-2,)) == "0.01"
    shown = {row.method: row for row in rows[1:] if row.rate != 3e-2}
    assert bench._gap(rows[4], shown) == "25%", "of the one seed that all three have"
    assert bench._gap(rows[1], shown) == "-" and bench._gap(rows[4], {}) == "-"


def test_a_finished_run_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, ran = tool("bench/learning"), list[dict[str, Any]]()

    def pretend(settings: dict[str, Any], log: Path) -> None:
        folder = Path(settings["output_dir"])
        folder.mkdir()
        ran.append(settings)
        found = {"new": 100.0 + settings["seed"] + 1e4 * abs(settings["learning_rate"] - 1e-2), "old": 200.0}
        (folder / "summary.json").write_text(json.dumps({"trainable_params": 7, "perplexity_after": found}))
        rows = [{"step": 10, "loss": 5.0}, {"step": 20, "eval": found}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(bench, "pretrain_alone", pretend)
    for name in ("model", "a", "b", "c", "d"):
        (tmp_path / name).touch()
    texts = ["--base", tmp_path / "model", "--new", tmp_path / "a", tmp_path / "b"]
    texts += ["--old", tmp_path / "c", tmp_path / "d", "--work", tmp_path / "work", "--json", tmp_path / "all.json"]
    flags = ["--methods", "lora", "relora@0.01", "--steps", 40, "--seeds", 2, "--sweep_seeds", 1, "--jobs", 1]
    call("bench/learning", *texts, *flags)
    assert [each["learning_rate"] for each in ran] == [3e-3, 1e-2, 3e-2, 1e-2, 1e-2, 1e-2]
    assert [each.get("merge_every") for each in ran] == [None, None, None, 10, None, 10]
    found = json.loads((tmp_path / "all.json").read_text())
    assert len(found["runs"]) == 6 and str(tmp_path) not in json.dumps(found["runs"])
    assert found["runs"][0]["curve"] == [{"step": 20, "new": pytest.approx(171.0), "old": 200.0}]
    assert found["tables"]["learning"][1][:5] == ["lora", "7", "0.01", "2", "101.5"]
    call("bench/learning", *texts, *flags)
    assert len(ran) == 6
    call("bench/learning", *texts, *flags, "--rank", 4)
    assert len(ran) == 12
    for folder in (tmp_path / "work" / "results").glob("r8-40-relora-*"):
        folder.unlink()
    call("bench/learning", *texts, *flags)
    assert len(ran) == 14
