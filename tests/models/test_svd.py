"""Leading singular vectors: of a base's weights, and of a matrix that is too large to be
decomposed exactly.
"""

from types import SimpleNamespace
from typing import Any

import torch

from mora_ds.models.svd import OVERSAMPLED, from_base_weights, leading_vectors
from tests.helpers.models import alone
from tests.helpers.operators import random


def test_a_weight_of_the_base_is_decomposed_in_fp64_as_outputs_by_inputs():
    stored = random(3, 5).bfloat16()
    spec = SimpleNamespace(weight_name=lambda name: f"{name}.weight")
    layer: Any = SimpleNamespace(spec=spec, device="cpu", transposed=True)
    base: Any = SimpleNamespace(read={"stored": stored}.__getitem__)
    ranks: Any = SimpleNamespace(**vars(alone()), sum=lambda tensor: tensor)
    keys = {"a.weight": "stored"}
    seen = []

    def work(name, layer, weight):
        seen.append(weight)
        return weight[:1]

    computed = from_base_weights(
        {"a": layer}, base, keys, ranks, lambda _: (1, 3), work
    )
    assert seen[0].dtype is torch.float64
    assert torch.equal(seen[0], stored.double().T)
    assert torch.equal(computed["a"], stored.float().T[:1])


def test_a_matrix_too_large_for_lapack_is_decomposed_by_iteration(monkeypatch):
    count = 4
    side = 2 * OVERSAMPLED + 40
    values = torch.cat(
        (torch.tensor([9.0, 7.0, 5.0, 3.0]), torch.full((side - count,), 0.01))
    ).double()
    left, _ = torch.linalg.qr(random(side, side))
    right, _ = torch.linalg.qr(random(side, side, seed=1))
    matrix = left * values @ right.T
    left_exact, exact = leading_vectors(matrix, count, "layer")
    spanned = left_exact @ matrix @ exact.T
    torch.testing.assert_close(spanned, values[:count].diag())
    signs = (exact @ right[:, :count]).diagonal().sign()
    torch.testing.assert_close(exact, (right[:, :count] * signs).T)
    assert (exact.gather(1, exact.abs().argmax(dim=1, keepdim=True)) > 0).all()
    monkeypatch.setattr("mora_ds.models.svd.EXACT_NUMBERS", 0)
    state = torch.get_rng_state()
    left_iterated, iterated = leading_vectors(matrix, count, "layer")
    assert torch.equal(torch.get_rng_state(), state), (
        "the run's random numbers are as they were"
    )
    assert torch.equal(iterated, leading_vectors(matrix, count, "layer")[1])
    assert not torch.equal(iterated, exact.float()), "by iteration"
    torch.testing.assert_close(iterated.double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(left_iterated.double(), left_exact, rtol=1e-4, atol=1e-4)
    _, most = leading_vectors(matrix, side // 2, "layer")
    assert most.dtype is torch.float64, "most of the vectors are needed: exact"
