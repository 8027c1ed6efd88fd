"""A tokenizer that several files use."""

from typing import Any

import pytest

from mora_ds.data import load_tokenizer
from tests.helpers.jobs import Playground


@pytest.fixture(scope="module")
def tokenizer(user: Playground) -> Any:
    return load_tokenizer(user.model)
