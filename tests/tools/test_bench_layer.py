"""tools/bench/layer.py: its tables, and the update as the reference computes it."""

import pytest
import torch

from mora_ds.adapters.ops.mora import OperatorSpec, delta_weight
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from mora_ds.common.files import read_json
from tests.helpers.tools import call
from tools.bench.layer import reference_update


def test_every_layer_has_a_row(tmp_path):
    threads = torch.get_num_threads()
    try:
        call(
            "bench/layer", "--shapes 12x8 --seconds 0 --json", tmp_path / "layers.json"
        )
    finally:
        torch.set_num_threads(threads)
    titles, *rows = read_json(tmp_path / "layers.json")["tables"]["layers"]
    assert [row[:2] for row in rows] == [
        [f"12 x 8, {tokens}, {dtype}", operator]
        for dtype in ("float32", "bfloat16")
        for tokens in (256, 2048)
        for operator in ("rotate r=8", "share r=64")
    ]
    assert all(len(row) == len(titles) for row in rows)


@pytest.mark.parametrize("shape", [(8, 12), (12, 40), (16, 16)])
@pytest.mark.parametrize("kind", [OperatorKind.ROTATE, OperatorKind.SHARE])
def test_the_reference_computes_the_same_update(kind, shape):
    """But for rotation of more inputs than outputs, of which it drops what is too much."""
    spec = OperatorSpec(kind, *shape, 8, Grouping.PLAIN, seed=1)
    mora_matrix = torch.randn(8, 8)
    x = torch.randn(3, spec.d_in)
    update = reference_update(spec, mora_matrix, x)
    torch.testing.assert_close(update, x @ delta_weight(spec, mora_matrix).T)
