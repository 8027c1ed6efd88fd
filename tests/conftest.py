"""Before any test imports torch: one thread a process (the distributed tests start several), the CPU accelerator."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.helpers.jobs import Playground

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Playground:
    """What a user has: a model, a tokenizer, files. Each file of tests has its own."""
    from tests.helpers.jobs import playground  # not above: it imports torch

    return playground(tmp_path_factory.mktemp("user"))
