"""A tokenizer that several files use."""

import pytest

from mora_ds.data import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(user):
    return load_tokenizer(user.model)
