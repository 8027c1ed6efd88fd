"""The token cache by parts: a file of its own or several small ones. What one part would
have, whatever the parts; what was built before a kill stays.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mora_ds.common.errors import RunError
from mora_ds.data import (
    Corpus,
    PackedDataset,
    build_cache,
    cache,
    load_corpus,
    load_tokenizer,
)
from mora_ds.data.remote_files import RemoteFile, RemoteMember
from mora_ds.data.workers import ordered_map
from tests.helpers.errors import user_error
from tests.helpers.texts import json_lines

TEXTS = [f"document {number}: " + "some words " * (number % 7) for number in range(90)]
FILES = 6


@pytest.fixture
def files(tmp_path):
    """Six files, of which one has only empty documents."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(FILES):
        texts = ["", ""] if number == 2 else TEXTS[number::FILES]
        (folder / f"{number}.jsonl").write_text(json_lines(texts))
    return folder


@pytest.fixture
def build(files, tokenizer, tmp_path):
    return lambda place="cache", **settings: build_cache(
        load_corpus([str(files)]), tokenizer, tmp_path / place, **settings
    )


@pytest.fixture
def by_file(monkeypatch):
    monkeypatch.setattr(cache, "SMALL_BYTES", 0)


@pytest.fixture
def built(monkeypatch):
    """The files of the parts that are built, in this process."""
    names = []
    build_part = cache._build

    def noted(*arguments):
        names.extend(Path(member.label).name for member in arguments[-1].corpus.members)
        return build_part(*arguments)

    monkeypatch.setattr(cache, "_build", noted)
    return names


def blocks(opened, seq_len, mask=True):
    data = PackedDataset(opened, seq_len, document_mask=mask)
    return [data.block(index) for index in range(data.n_blocks)]


def assert_same_blocks(one, another):
    for seq_len in (3, 16, 500):
        pairs = zip(blocks(one, seq_len), blocks(another, seq_len), strict=True)
        for mine, other in pairs:
            for key in mine:
                assert np.array_equal(mine[key], other[key]), (seq_len, key)


def test_parts_give_the_batches_of_one(build, monkeypatch):
    single = build("single")
    assert isinstance(single, cache.TokenCache)
    monkeypatch.setattr(cache, "SMALL_BYTES", 0)
    joined = build()
    assert len(joined.parts) == FILES - 1, "the empty file has no tokens"
    assert joined.key == single.key
    assert (joined.n_tokens, joined.n_documents) == (
        single.n_tokens,
        single.n_documents,
    )
    assert joined.eos_id == single.eos_id
    assert_same_blocks(joined, single)


def test_a_file_that_is_added_or_changed_is_tokenized_alone(
    build, by_file, built, files, tokenizer
):
    build()
    assert built == [f"{number}.jsonl" for number in range(FILES)]
    (files / "1b.jsonl").write_text(json_lines(["one more"]))
    os.utime(files / "4.jsonl")
    build()
    assert built[FILES:] == ["1b.jsonl"]
    (files / "3.jsonl").write_text(json_lines(["another text"]))
    (files / "5.jsonl").unlink()
    build()
    assert built[FILES + 1 :] == ["3.jsonl"]
    assert_same_blocks(build(), build("anew"))


def test_a_damaged_part_is_built_anew_alone(build, by_file, built, caplog):
    joined = build()
    del built[:]
    (joined.parts[3].folder / "tokens.bin").write_bytes(b"damage")
    assert_same_blocks(build(), build("anew"))
    assert built[0] == "4.jsonl"
    assert len(built) == 1 + FILES
    assert f"the token cache {joined.parts[3].folder} is damaged" in caplog.text


def test_a_build_that_fails_continues_where_it_was(build, by_file, built, files):
    broken = files / "4.jsonl"
    content = broken.read_text()
    broken.write_text('{"text": "fine"}\n{"text": 3}\n')
    with user_error(r"4\.jsonl, line 2"):
        build()
    broken.write_text(content)
    del built[:]
    assert_same_blocks(build(), build("anew"))
    assert built[: len(built) - FILES] == ["4.jsonl", "5.jsonl"]


def parts_of(files):
    """Of (size, hash) of each file."""
    sizes, hashes = zip(*files, strict=True)
    members = (RemoteMember(RemoteFile("", size, ""), "text") for size in sizes)
    return [hashes[part] for part in cache._parts(Corpus(tuple(members)), hashes)]


def test_small_files_share_parts_that_one_more_file_does_not_shift():
    numbers = np.random.RandomState(0)
    small = [(9, numbers.bytes(8).hex()) for _ in range(3000)]
    large = (cache.SMALL_BYTES, "large")
    parts = parts_of([*small[:1500], large, *small[1500:]])
    assert [name for part in parts for name in part] == [
        content_hash for _, content_hash in (*small[:1500], large, *small[1500:])
    ]
    assert ("large",) in parts
    assert 5 < len(parts) < 40
    more = parts_of([*small[:700], (9, "ff"), *small[700:1500], large, *small[1500:]])
    assert len(set(more) - set(parts)) == 1


# -- processes -------------------------------------------------------------------------


def end_at_3(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.heavy(seconds=30)
def test_a_worker_that_is_killed_names_its_file():
    with pytest.raises(RunError, match=r"killed at file 3, .*--preprocessing_workers"):
        list(ordered_map(end_at_3, range(9), 2, lambda number: f"file {number}"))


@pytest.mark.heavy(seconds=30)
@pytest.mark.parametrize("workers", [2, 3])
def test_workers_that_read_their_own_files_give_the_same(
    build, by_file, monkeypatch, workers
):
    one = build("one")
    monkeypatch.setattr(cache, "PARALLEL_BYTES", 0)
    several = build("several", num_proc=workers)
    for mine, other in zip(several.parts, one.parts, strict=True):
        assert mine.folder.name == other.folder.name
        for name in ("tokens.bin", "documents.bin", "meta.json"):
            content = (mine.folder / name).read_bytes()
            assert content == (other.folder / name).read_bytes()


BUILDER = """
import sys
from mora_ds.data import build_cache, cache, load_corpus, load_tokenizer
from pathlib import Path
cache.SMALL_BYTES = 0
cache.PARALLEL_BYTES = 0
if __name__ == "__main__":
    text, tokenizer, folder = sys.argv[1:]
    build_cache(load_corpus([text]), load_tokenizer(tokenizer), Path(folder), num_proc=2)
"""


@pytest.mark.heavy(seconds=60)
def test_a_build_that_is_killed_loses_a_file_a_worker(user, tmp_path, monkeypatch):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(12):
        (text / f"{number}.jsonl").write_text(
            json_lines(f"document {number} {line} " * 40 for line in range(800))
        )
    program = tmp_path / "builder.py"
    program.write_text(BUILDER)
    folder = tmp_path / "cache"
    builder = subprocess.Popen([sys.executable, program, text, user.model, folder])
    metas = "[0-9a-f]*[0-9a-f]/meta.json"

    def done():
        found = [path for path in folder.glob(metas) if "partial" not in str(path)]
        return {path: path.stat().st_mtime_ns for path in found}

    deadline = time.monotonic() + 200
    while len(done()) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    builder.kill()
    builder.wait()
    before = done()
    assert 4 <= len(before) < 12, "killed in the middle"
    monkeypatch.setattr(cache, "SMALL_BYTES", 0)
    corpus = load_corpus([str(text)])
    tokenizer = load_tokenizer(user.model)
    resumed = build_cache(corpus, tokenizer, folder)
    assert done().items() >= before.items(), "what was built stays"
    assert len(done()) == 12
    monkeypatch.setattr(cache, "SMALL_BYTES", 1 << 40)
    single = build_cache(corpus, tokenizer, tmp_path / "single")
    assert json.loads((single.folder / "meta.json").read_text())["documents"] == 9_600
    assert resumed.n_tokens == single.n_tokens
    assert np.array_equal(
        resumed.window(0, single.n_tokens)[0], single.window(0, single.n_tokens)[0]
    )
