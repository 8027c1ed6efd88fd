"""tools/bench_memorization.py, as small as it gets: every method learns on one engine, and what it prints is right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import REPOSITORY, Playground

TOOL = REPOSITORY / "tools" / "bench_memorization.py"


def bench(*flags: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, flags)], capture_output=True, text=True)


def test_bad_flags_are_named_before_anything_runs(tmp_path: Path) -> None:
    for flags, message in (
        (("--methods", "loar"), "Did you mean 'lora'?"),
        (("--batch", 7, "--micro_batch", 2), "--batch 7 is no multiple"),
    ):
        done = bench("--work", tmp_path / "work", *flags)
        assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "work").exists()


@pytest.mark.heavy
def test_two_pairs_are_known_by_heart(tmp_path: Path, user: Playground) -> None:
    flags = ["--work", tmp_path, "--base", user.model, "--pairs", 2, "--batch", 4, "--micro_batch", 2, "--steps", 120]
    flags += ["--every", 30, "--seeds", 1, "--rates", 1e-2, "--cycles", 2, "--rank", 4, "--probe", 2]
    done = bench(*flags)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert {each["method"] for each in results} == {"full", "lora", "mora", "remora"} and len(results) == 4
    trained = {each["method"]: each["trained"] for each in results}
    assert trained["mora"] == trained["remora"] <= trained["lora"] < trained["full"]
    for each in results:
        assert each["steps"] == [30, 60, 90, 120] and len(each["accuracy"]) == len(each["loss"]) == 4
        assert each["loss"][-1] < each["loss"][0]
    best = max(each["accuracy"][-1] for each in results if each["method"] == "full")
    assert best >= 0.9
    assert "steps to 90%" in done.stdout and (tmp_path / "tensorboard" / "mora").is_dir()
