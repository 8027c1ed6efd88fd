"""A damaged token cache or index entry is noticed, named and built again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mora_ds.data import build_cache, cache, inspection, load_corpus, load_tokenizer
from tests.helpers.damage import HARMS, flip
from tests.helpers.jobs import Playground
from tests.helpers.outcome import tree


@pytest.fixture
def build(user: Playground, tmp_path: Path) -> Callable[[], Any]:
    """Builds or opens a cache."""
    tokenizer = load_tokenizer(user.model)
    return lambda: build_cache(load_corpus([str(user.train)]), tokenizer, tmp_path / "cache")


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "meta.json"])
def test_a_damaged_cache_is_named_and_built_anew(
    build: Callable[[], Any], caplog: pytest.LogCaptureFixture, name: str, harm: str
) -> None:
    built = build()
    contents = tree(built.folder)
    for where in (0.02, 0.4, 0.97) if harm == "flip" else (0.0,):
        flip(built.folder / name, where) if harm == "flip" else HARMS[harm](built.folder / name)
        assert build().folder == built.folder and tree(built.folder) == contents
    assert caplog.messages and all(f"the token cache {built.folder} is damaged" in line for line in caplog.messages)
    caplog.clear()
    assert build().folder == built.folder and not caplog.messages


def test_a_large_cache_is_read_through_once_it_was_written_to(
    build: Callable[[], Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build()
    read: list[Path] = []
    monkeypatch.setattr(cache, "HASHED_EACH_TIME_BYTES", 0)
    monkeypatch.setattr(cache, "sha256_file", lambda path: read.append(path) or "not that")
    build()
    assert not read and not caplog.messages
    monkeypatch.undo()
    monkeypatch.setattr(cache, "HASHED_EACH_TIME_BYTES", 0)
    tokens = built.folder / "tokens.bin"
    written = tokens.stat().st_mtime_ns
    flip(tokens)
    os.utime(tokens, ns=(written, written + 10**9))  # a file system's clock may not have ticked in between
    build()
    assert len(caplog.messages) == 1 and "tokens.bin is not what was written" in caplog.messages[0]


@pytest.mark.parametrize("where", [0.1, 0.3, 0.6, 0.9])
def test_a_damaged_entry_of_the_index_is_not_believed(build: Callable[[], Any], where: float) -> None:
    """It would name another cache, and with it another run."""
    built = build()
    (entry,) = (built.folder.parent / "index").iterdir()
    content = entry.read_text()
    flip(entry, where)
    assert inspection._recall(entry) is None
    assert build().folder == built.folder and entry.read_text() == content
