"""A bank that several files use."""

from __future__ import annotations

import pytest

from mora_ds.adapters.config import MoRAConfig
from tests.helpers.banks import CYCLES, Bench, bench


@pytest.fixture(scope="module")
def rotating(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Adapters of 0, 1 and 3 merged cycles."""
    made = bench(tmp_path_factory.mktemp("rotating"))
    for seed, (name, cycles) in enumerate(CYCLES.items()):
        made.add(name, MoRAConfig(rank=3, seed=seed), cycles, scale=0.05)
    return made
