"""A tokenizer that several files use."""

from __future__ import annotations

from typing import Any

import pytest

from mora_ds.data import load_tokenizer
from tests.helpers.jobs import Playground


@pytest.fixture(scope="module")
def tokenizer(user: Playground) -> Any:
    return load_tokenizer(user.model)
