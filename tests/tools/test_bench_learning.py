"""tools/bench/learning.py: what it refuses, and which rate it calls the best."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mora_ds.common.errors import UserError
from tests.helpers.tools import call, tool


def test_bad_flags_are_named_before_anything_runs(tmp_path: Path) -> None:
    cases = (
        (["--methods", "loar"], "Did you mean 'lora'?"),
        (["--methods", "lora@fast"], "'fast' is no learning rate"),
        (["--steps", "20"], "more than 20"),
    )
    for flags, message in cases:
        with pytest.raises(UserError, match=re.escape(message)):
            call("bench/learning", "--work", tmp_path / "work", *flags)
    assert not (tmp_path / "work").exists()


def test_of_rates_that_learn_alike_the_one_that_forgets_least_is_best() -> None:
    bench = tool("bench/learning")
    rows = [
        bench.Row("lora", 1e-3, 10, code=(250.0, 252.0), prose=(90.0, 90.0)),
        bench.Row("lora", 1e-2, 10, code=(201.0, 203.0), prose=(100.0, 102.0)),
        bench.Row("lora", 3e-2, 10, code=(201.0, 200.0), prose=(130.0, 131.0)),
        bench.Row("full", 1e-3, 99, code=(150.0,), prose=(99.0,)),
    ]
    assert [(row.method, row.rate) for row in bench._best(rows)] == [("lora", 1e-2), ("full", 1e-3)]
    assert bench._rate(rows[1], (1e-3, 1e-2, 3e-2)) == "0.01" and bench._rate(rows[2], (1e-2, 3e-2)) == "0.03*"
    assert bench._rate(rows[1], (1e-2,)) == "0.01"
