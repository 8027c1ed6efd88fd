"""tools/bench_learning.py: what it refuses, and which rate it calls the best."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.jobs import REPOSITORY

TOOL = REPOSITORY / "tools" / "bench_learning.py"


def tool() -> Any:
    spec = importlib.util.spec_from_file_location("bench_learning", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_learning"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_bad_flags_are_named_before_anything_runs(tmp_path: Path) -> None:
    for flags, message in ((["--methods", "loar"], "Did you mean 'lora'?"), (["--steps", "20"], "more than 20")):
        command = [sys.executable, str(TOOL), "--work", str(tmp_path / "work"), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "work").exists()


def test_of_rates_that_learn_alike_the_one_that_forgets_least_is_best() -> None:
    bench = tool()
    rows = [
        bench.Row("lora", 1e-3, 10, code=(250.0, 252.0), prose=(90.0, 90.0)),
        bench.Row("lora", 1e-2, 10, code=(201.0, 203.0), prose=(100.0, 102.0)),
        bench.Row("lora", 3e-2, 10, code=(201.0, 200.0), prose=(130.0, 131.0)),
        bench.Row("full", 1e-3, 99, code=(150.0,), prose=(99.0,)),
    ]
    assert [(row.method, row.rate) for row in bench._best(rows)] == [("lora", 1e-2), ("full", 1e-3)]
    assert bench._rate(rows[1], (1e-3, 1e-2, 3e-2)) == "0.01" and bench._rate(rows[2], (1e-2, 3e-2)) == "0.03*"
