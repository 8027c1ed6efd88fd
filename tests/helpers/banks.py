"""A base with adapters, and the merged models that a bank of them is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mora_ds.adapters.config import AdapterConfig
from mora_ds.deploy.bank import AdapterBank
from tests.helpers.adapters import Maker, Updates, merge
from tests.helpers.models import tiny_model

CYCLES = {"none": 0, "one": 1, "three": 3}
"""Adapter -> merged cycles."""


@dataclass
class Bench:
    """A base with adapters, and plain transformers to hold them against."""

    folder: Path
    maker: Maker
    updates: dict[str, Updates]

    def open(self, **settings: Any) -> AdapterBank:
        return AdapterBank.open(self.folder / "base", self.folder / "bank", **settings)

    def add(self, name: str, config: AdapterConfig, cycles: int = 0, **more: Any) -> None:
        self.updates[name] = self.maker.write(self.folder / "bank" / name, config, cycles, **more)

    def merged(self, name: str | None) -> Any:
        """A plain model with all squares of an adapter merged; the same one every time."""
        model = self.maker.model.eval()
        weights = self.maker.weights
        for weight, original in weights.items():
            model.get_parameter(weight).data.copy_(original)
        merge(model, weights, {} if name is None else self.updates[name])
        return model


def bench(folder: Path, family: str = "llama", **changes: Any) -> Bench:
    return Bench(folder, Maker(tiny_model(family, **changes), folder / "base"), {})


@torch.no_grad()
def logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    return model(input_ids=ids, use_cache=False, **more).logits


def check_rows(made: Bench, bank: AdapterBank, names: list[str | None], ids: Tensor) -> None:
    """Each row is its adapter's, and no two adapters' are alike."""
    with bank.use(names):
        found = logits(bank.model, ids)
    expected = {name: logits(made.merged(name), ids) for name in dict.fromkeys(names)}
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], expected[name][row], rtol=0, atol=1e-5)
        for other in set(expected) - {name}:
            assert (found[row] - expected[other][row]).abs().max() > 1e-3
