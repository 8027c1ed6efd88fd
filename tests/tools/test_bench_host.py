"""tools/bench/host.py at its smallest: a line for each engine, ratios to the first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers.pages import ROOT
from tools.bench import host


def test_a_small_table(tmp_path: Path) -> None:
    out = tmp_path / "host.json"
    flags = ("--layers", "2", "--steps", "2", "--json", str(out))
    subprocess.run([sys.executable, "tools/bench/host.py", *flags], cwd=ROOT, check=True)
    titles, *rows = json.loads(out.read_text(encoding="utf-8"))["tables"]["host"]
    assert titles == ["engine", "ms a step", "to ZeRO 1"]
    assert [row[0] for row in rows] == list(host.ENGINES)
    assert rows[0][2] == "1.00" and all(float(row[1]) > 0 for row in rows)
