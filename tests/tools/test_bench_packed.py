"""tools/bench/delta_scale.py and token_bias.py evaluate as a training run does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.jobs import Playground, run
from tests.helpers.tools import call

pytestmark = pytest.mark.heavy


def test_the_ends_of_the_scale_are_before_and_after_the_run(user: Playground, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = run(1, user.flags(out, "--merge_every", 3, "--restart_warmup_steps", 1, "--eval_steps", 3))
    call("bench/delta_scale", out, "--scales", 0, 0.5, 1, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    start, middle, end = ({name: row[name] for name in ("old", "new")} for row in found["scales"])
    names = {"held": "old", "short": "new"}
    before, after = (
        {names[key]: value for key, value in summary[f"perplexity_{when}"].items()} for when in ("before", "after")
    )
    assert start == pytest.approx(before, rel=1e-5) and end == pytest.approx(after, rel=1e-5)
    assert min(start["old"], end["old"]) < middle["old"] < max(start["old"], end["old"])
    assert [row["step"] for row in found["steps"]] == [0, 3, 6]
    assert [row["old"] for row in found["steps"]] == pytest.approx(
        [before["old"], found["steps"][1]["old"], after["old"]]
    )


def test_a_bias_for_each_token_learns_how_often_tokens_come(user: Playground, tmp_path: Path) -> None:
    base = run(1, user.flags(tmp_path / "none", "--adapter", "none"))["perplexity_after"]
    found = {}
    for rate in (1e-9, 0.3):
        settings = {
            "model_name_or_path": str(user.model), "train_files": [str(user.train)], "seq_len": 32, "seed": 1,
            "eval_files": [f"old={user.other}", f"new={user.held}"], "cache_dir": str(user.root / "cache"),
            "learning_rate": rate, "max_steps": 8, "eval_steps": 4, "warmup_steps": 1, "logging_steps": 2,
            "lr_scheduler_type": "cosine", "min_lr_ratio": 0.1, "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4, "output_dir": str(tmp_path / f"{rate}"),
        }  # fmt: skip
        call("bench/token_bias", "--settings", json.dumps(settings))
        summary = json.loads((tmp_path / f"{rate}" / "summary.json").read_text())
        found[rate] = summary["perplexity_after"]["new"]
        lines = (tmp_path / f"{rate}" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines if "eval" in line] == [4, 8]
    assert found[1e-9] == pytest.approx(base["held"], rel=1e-5), "no bias: the base"
    assert found[0.3] < 0.9 * base["held"]
