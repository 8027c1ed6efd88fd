"""The benchmark of one rank among many: every phase runs, and what must not grow with the
ranks does not.
"""

import pytest

from mora_ds.common.files import read_json
from tests.helpers.tools import call
from tools.bench import scale
from tools.bench.measuring import llama_config


@pytest.mark.heavy
def test_every_phase_of_four_and_of_sixteen_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "MODELS", {"tiny": (llama_config(64, 2, 512, 64), 4, 2)})
    out = tmp_path / "found.json"
    call(
        "bench/scale",
        "--models tiny --ranks 4 16 --json",
        out,
        "--folder",
        tmp_path / "work",
    )
    tables = read_json(out)["tables"]
    titles, *rows = tables["phases"]
    records = [dict(zip(titles, row, strict=True)) for row in rows]
    for phase in scale.PHASES:
        ranks = {row["ranks"] for row in records if row["phase"] == phase}
        assert ranks == {"4", "16"}, phase
    assert {row["setting"] for row in records} == {path.name for path in scale.CONFIGS}
    titles, *lines = tables["CPU seconds"]
    assert titles == ["phase", "tiny, 4 ranks", "tiny, 16 ranks"]
    assert all(float(cell) >= 0 for cell in lines[0][1:])
    for row in records:
        if row["phase"] == "resume":
            assert int(row["files"]) <= 2, "its own shard, and the table on rank 0"
    files = {
        (row["ranks"], row["rank"], row["setting"]): row["files"]
        for row in records
        if row["phase"] == "save"
    }
    for (ranks, rank, setting), count in files.items():
        # A save opens no more files where there are more ranks
        assert count == files["4", rank, setting], ranks
