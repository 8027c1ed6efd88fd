"""tools/bench/options.py: what it refuses, the texts it is made of, and that every method is a run's valid flags."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from mora_ds.common.errors import UserError
from mora_ds.config.arguments import from_flat
from mora_ds.config.validate import validate
from tests.helpers.tools import call, tool


def test_bad_flags_are_named_before_anything_runs(tmp_path: Path) -> None:
    for flags, message in (
        (["--methods", "subspaces"], "Did you mean 'subspace'?"),
        (["--architectures", "llama", "mamba"], "unknown --architectures 'mamba'"),
        (["--steps", "10"], "more than 10"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            call("bench/options", "--work", tmp_path / "work", *flags)
    assert not (tmp_path / "work").exists()


def test_no_document_is_trained_and_evaluated_on(tmp_path: Path) -> None:
    texts = tool("bench/domain_texts")
    texts._write(tmp_path, "unicode", islice(texts._unicode(), 60))
    train, held = (
        [json.loads(line)["text"] for line in (tmp_path / f"unicode_{side}.jsonl").read_text().splitlines()]
        for side in ("train", "eval")
    )
    assert len(train) == 57 and len(held) == 3 and not set(train) & set(held)
    assert "0041;LATIN CAPITAL LETTER A;Lu;" in train[0] or "0041;LATIN CAPITAL LETTER A;Lu;" in train[1]


@pytest.mark.parametrize("method", list(tool("bench/options").METHODS))
def test_every_method_makes_a_valid_run(method: str) -> None:
    flags: dict[str, Any] = tool("bench/options").METHODS[method]
    extra = {"trainable_budget": "10000"} if method == "budget" else {}
    common = {"model_name_or_path": "model", "train_files": ["code=a.jsonl:1", "law=b.jsonl:1"], "mora_rank": 8}
    validate(from_flat({**common, **flags, **extra}))
