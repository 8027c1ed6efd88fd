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
    monkeypatch.setattr(scale, "STORED", "tiny")
    monkeypatch.setattr(scale, "CYCLES", (1, 2))
    monkeypatch.setattr(scale, "ADAPTED", (14,))
    out = tmp_path / "found.json"
    call("bench/scale", "--ranks 4 16 --json", out, "--folder", tmp_path)
    tables = read_json(out)["tables"]
    _, *by_cycle = tables["CPU seconds of a merge and a replay"]
    assert [line[:3] for line in by_cycle] == [
        ["14", ranks, cycle] for ranks in "12" for cycle in "12"
    ]
    titles, *seconds = tables["CPU seconds"]
    assert titles == ["phase", "tiny, 4 ranks", "tiny, 16 ranks"]
    assert all(float(cell) >= 0 for _, *cells in seconds for cell in cells)
    lines = [name.split(", ") for name, *_ in seconds]
    assert {phase for phase, _, _ in lines} == set(scale.PHASES)
    assert {setting for _, setting, _ in lines} == {path.name for path in scale.CONFIGS}
    for name, of_4, of_16 in tables["files"][1:]:
        if name.startswith("resume"):
            assert max(int(of_4), int(of_16)) <= 2, (
                "its own shard, and the table on rank 0"
            )
        if name.startswith("save"):
            assert of_4 == of_16, "a save opens more files where there are more ranks"
