"""tools/bench/attention.py at its smallest: both ways give the same, and the table has a line for each case."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.tools import call, tool


def test_a_small_table(tmp_path: Path) -> None:
    out = tmp_path / "attention.json"
    call(
        "bench/attention", "--seq_len", 64, "--heads", 2, "--shared", 1, "--head_size", 8, "--window", 16,
        "--means", 0, 12, "--repeats", 1, "--json", out,
    )  # fmt: skip
    (table,) = json.loads(out.read_text(encoding="utf-8"))["tables"].values()
    rows = table[1:]
    assert len(rows) == 4 and all(float(row[-1]) < 1e-5 for row in rows)


def test_positions_restart_at_documents() -> None:
    positions = tool("bench/attention").positions_of(3, 200, 20)
    begins = positions == 0
    assert begins[:, 0].all() and begins.sum() > 12
    assert ((positions.diff(dim=1) == 1) | begins[:, 1:]).all()
