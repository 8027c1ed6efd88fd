"""The benchmark of the shared base, and what it must find: one base a node after merges, and a merge's time shared."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tools.bench import node_base


@pytest.mark.heavy
def test_a_node_holds_one_base_after_three_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "found.json"
    sizes = ["--ranks", "2", "4", "--width", "1024", "--layers", "2", "--cycles", "3", "--repeat", "1"]
    monkeypatch.setattr(sys, "argv", ["node_base.py", "--folder", str(tmp_path / "work"), *sizes, "--json", str(out)])
    node_base.main()
    titles, *rows = json.loads(out.read_text())["tables"]["node_base"]
    assert titles[:4] == ["processes", "--node_base", "before merges", "after merges"]
    for processes, choice, before, after, _, ratio in rows:
        if choice == "private":
            assert float(after) > 0.8 * int(processes), "every process has a base of its own"
        else:
            assert float(before) <= 1.05 and float(after) <= 1.05
            assert float(ratio) <= (0.5 if processes == "4" else 0.7), "CPU time, which processes share cores for"
