"""Files of singular vectors: their contents, and what is reported where they are missing or damaged."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from mora_ds.adapters.ops import singular_vectors
from mora_ds.common.errors import RunError, UserError
from mora_ds.models.svd import OVERSAMPLED, Wanted, leading_vectors
from mora_ds.remora.ledger import VECTORS_FILE, Ledger
from tests.helpers.operators import random
from tests.helpers.singular_vectors import MODULE, register_vectors


def test_vectors_are_those_of_the_weight(tmp_path: Path) -> None:
    weight = random(9, 13)
    name = register_vectors(weight, 9, tmp_path)
    left, right = singular_vectors.read(name, MODULE, 9)
    values = torch.linalg.svdvals(weight.float().double())
    assert_close(left.double() @ weight @ right.double().T, torch.diag(values), rtol=1e-6, atol=1e-6)
    assert (right.gather(1, right.abs().argmax(dim=1, keepdim=True)) > 0).all(), "the sign is fixed"
    assert singular_vectors.norm(name, MODULE) == pytest.approx(weight.norm().item(), rel=1e-6)
    assert torch.equal(singular_vectors.read(name, MODULE, 4)[0], left[:4])


def test_a_weight_too_large_for_lapack_is_decomposed_by_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mora_ds.models.svd.EXACT_NUMBERS", 0)
    count = 4
    side = 2 * OVERSAMPLED + 40
    values = torch.cat((torch.tensor([9.0, 7.0, 5.0, 3.0]), torch.full((side - 4,), 0.01))).double()
    left, _ = torch.linalg.qr(random(side, side))
    right, _ = torch.linalg.qr(random(side, side, seed=1))
    wanted = Wanted("w", False, side, side, count)
    assert not wanted.is_exact and replace(wanted, count=side // 2).is_exact
    state = torch.get_rng_state()
    found_left, found_right = leading_vectors(left * values @ right.T, wanted, MODULE)
    assert torch.equal(torch.get_rng_state(), state), "the run's random numbers are as they were"
    assert torch.equal(found_left, leading_vectors(left * values @ right.T, wanted, MODULE)[0])
    signs = (found_right.double() @ right[:, :count]).diagonal().sign()
    assert_close(found_right.double(), (right[:, :count] * signs).T, rtol=1e-4, atol=1e-4)
    assert_close(found_left.double(), (left[:, :count] * signs).T, rtol=1e-4, atol=1e-4)


def test_missing_and_damaged_vectors_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="feedfeedfeedfeed is missing"):
        singular_vectors.read("feedfeedfeedfeed", MODULE, 1)
    name = register_vectors(random(6, 8), 3, tmp_path)
    with pytest.raises(UserError, match=r"holds 3 of layer's 6 singular vectors, not 4"):
        singular_vectors.read(name, MODULE, 4)
    with pytest.raises(UserError, match="no singular vectors of other"):
        singular_vectors.read(name, "other", 1)
    broken = random(4, 4)
    broken[1, 2] = float("nan")
    with pytest.raises(UserError, match="w has NaN or infinite values"):
        register_vectors(broken, 2, tmp_path)
    path = singular_vectors.path_of(name)
    path.write_bytes(path.read_bytes()[:20])
    singular_vectors.register("0" * 16, path)
    with pytest.raises(UserError, match="truncated or damaged"):
        singular_vectors.read("0" * 16, MODULE, 1)


def test_vectors_outlive_a_checkpoint_that_was_looked_into(tmp_path: Path) -> None:
    """A checkpoint is opened while its run goes on, and deleted as the run keeps only newer ones."""
    weight = random(6, 5)
    name = register_vectors(weight, 5, tmp_path)
    ledger = Ledger.create(tmp_path / "ledger", "base", singular_vectors.path_of(name))
    Ledger.open(tmp_path / "ledger")
    ledger.copy_to(tmp_path / "checkpoint")
    Ledger.open(tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "checkpoint")
    assert singular_vectors.norm(name, MODULE) == pytest.approx(weight.norm().item(), rel=1e-6)
    assert singular_vectors.path_of(name) == tmp_path / "ledger" / VECTORS_FILE
    shutil.rmtree(tmp_path / "ledger")
    assert singular_vectors.read(name, MODULE, 5)[0].shape == (5, 6), "an adapter in memory needs its folder no more"
