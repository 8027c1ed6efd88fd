"""tools/bench/layer.py: its tables."""

import torch

from mora_ds.common.files import read_json
from tests.helpers.tools import call

TOY = (
    "--shapes",
    "12x8",
    "--tokens",
    5,
    "--operators",
    "rotate:1",
    "share:2",
    "--dtypes",
    "float32",
    "--seconds",
    0,
)


def found(tmp_path):
    threads = torch.get_num_threads()
    try:
        call("bench/layer", *TOY, "--json", tmp_path / "found.json")
    finally:
        torch.set_num_threads(threads)
    tables = read_json(tmp_path / "found.json")["tables"]
    return tables


def test_every_layer_has_a_row(tmp_path):
    titles, *rows = found(tmp_path)["layers"]
    assert [row[:2] for row in rows] == [
        ["12 x 8, 5, float32", name] for name in ("rotate r=1", "share r=2")
    ]
    assert all(len(row) == len(titles) for row in rows)
