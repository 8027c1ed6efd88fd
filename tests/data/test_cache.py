"""The token cache: built once, completely or not at all, equal for any number of processes,
new for new contents.
"""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mora_ds.common.files import at_work
from mora_ds.config.data import DataArguments
from mora_ds.data import (
    DocumentFilter,
    build_cache,
    cache,
    load_corpus,
    load_tokenizer,
    readers,
    train_sentencepiece,
)
from mora_ds.data.cache import damage
from mora_ds.train.data import cached
from tests.helpers.errors import user_error
from tests.helpers.tools import called

TEXTS = [
    f"document {number}: " + "some words and more words\n" * (number % 7)
    for number in range(40)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(
        train_sentencepiece(TEXTS, 300, tmp_path_factory.mktemp("tokenizer"))
    )


@pytest.fixture
def files(tmp_path):
    for name, texts in (("a.jsonl", TEXTS[:25]), ("b.jsonl", [*TEXTS[25:], ""])):
        (tmp_path / name).write_text(
            "".join(
                json.dumps({"text": text, "body": text + "!"}) + "\n" for text in texts
            )
        )
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


@pytest.fixture
def build(tokenizer, tmp_path):
    """Builds or opens the cache of these files."""
    return lambda files, **settings: build_cache(
        load_corpus(files), tokenizer, tmp_path / "cache", **settings
    )


def folders(cache_dir):
    return sorted(path.name for path in cache_dir.iterdir() if path.name != "index")


def forbid_building(monkeypatch):
    def build(*_):
        raise AssertionError("built although it was there")

    monkeypatch.setattr(cache, "_build", build)


def test_documents_between_bos_and_eos(
    files,
    build,
    tokenizer,
    monkeypatch,
):
    monkeypatch.setattr(readers, "BATCH_CHARACTERS", 300)
    built = build(files)
    wanted = [
        [1, *tokenizer.encode(text, add_special_tokens=False), 2] for text in TEXTS
    ]
    assert built.tokens.tolist() == [token for document in wanted for token in document]
    assert (
        built.ends.tolist()
        == np.cumsum([len(document) for document in wanted]).tolist()
    )
    assert built.tokens.dtype == np.uint16
    assert built.ends.dtype == np.int64
    assert (built.n_documents, built.eos_id, built.meta["documents"]) == (40, 2, 40)
    assert not damage(built.folder)
    without = build(files, document_start="none")
    assert without.n_tokens == built.n_tokens - 40
    assert without.tokens[0] != 1


def test_ids_that_two_bytes_do_not_hold_take_four(
    files, build, tokenizer, tmp_path, monkeypatch
):
    narrow = build(files)
    monkeypatch.setattr("mora_ds.data.tokenizer.largest_id", lambda _: ("x", 65_536))
    wide = build_cache(load_corpus(files), tokenizer, tmp_path / "wide")
    assert wide.tokens.dtype == np.uint32
    assert wide.tokens.tolist() == narrow.tokens.tolist()


def test_a_long_file_is_one_document(
    build,
    tokenizer,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(readers, "CHUNK_CHARACTERS", 100)
    text = "some words\n" * 100
    (tmp_path / "a.txt").write_text(text)
    built = build([str(tmp_path / "a.txt")])
    assert built.ends.tolist() == [built.n_tokens]
    assert tokenizer.decode(built.tokens[1:-1]) == text
    assert built.tokens.tolist().count(1) == built.tokens.tolist().count(2) == 1


def test_any_number_of_processes_gives_the_same(
    files, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(cache, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(readers, "BATCH_CHARACTERS", 100)
    one, two = (
        build_cache(load_corpus(files), tokenizer, tmp_path / str(n), num_proc=n)
        for n in (1, 2)
    )
    assert one.meta == two.meta
    assert one.folder.name == two.folder.name
    assert one.tokens.tobytes() == two.tokens.tobytes()
    assert one.ends.tobytes() == two.ends.tobytes()


def test_errors_of_worker_processes_arrive_and_leave_nothing(
    build, tmp_path, monkeypatch
):
    monkeypatch.setattr(cache, "PARALLEL_BYTES", 0)
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    with user_error(r"--train_files: .*a\.jsonl, line 2: field 'text' holds int"):
        build([str(tmp_path / "*.jsonl")], num_proc=2)
    assert folders(tmp_path / "cache") == []


@pytest.mark.heavy
def test_worker_processes_end_with_a_caller_that_is_killed(tmp_path):
    program = tmp_path / "caller.py"
    program.write_text(
        "import os, signal, itertools\n"
        "from mora_ds.data.workers import ordered_map\n"
        "def work(item): return os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    results = ordered_map(work, itertools.count(), 2, str)\n"
        "    print(next(results), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # Their pipe ends when the last of them has: `run` would wait for one that lives on.
    ended = called([sys.executable, program], timeout=60)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert ended.stdout.strip().isdigit(), ended.stderr


def test_the_second_call_only_opens(
    files,
    build,
    tokenizer,
    tmp_path,
    monkeypatch,
):
    built = build(files)
    forbid_building(monkeypatch)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = build_cache(
        load_corpus(files), load_tokenizer(tmp_path / "saved"), tmp_path / "cache"
    )
    assert again.folder == built.folder
    os.utime(files[0])  # touched, not changed: read again, but not tokenized
    copied = [
        shutil.copy(file, Path(file).with_suffix(".copy.jsonl")) for file in files
    ]
    for same in (files, copied):
        assert build([str(path) for path in same]).folder == built.folder


def test_contents_order_and_settings_each_make_a_new_key(
    files, build, tokenizer, tmp_path
):
    def key(patterns, tokens=tokenizer, keep=None, **settings):
        corpus = replace(load_corpus(patterns, **settings), keep=keep)
        return build_cache(corpus, tokens, tmp_path / "cache").folder.name

    keys = [
        key(files),
        key(files[::-1]),
        key(files[:1]),
        key(files, text_column="body"),
        key(files, keep=DocumentFilter(0.5)),
        key(files, keep=DocumentFilter(0.5, takes_held_out=True)),
    ]
    keys.append(build(files, document_start="none").folder.name)
    another_tokenizer = load_tokenizer(train_sentencepiece(TEXTS, 290, tmp_path))
    keys.append(key(files, another_tokenizer))
    changed = Path(files[0]).read_text().replace("document 0", "document X")
    Path(files[0]).write_text(changed)
    keys.append(key(files))
    assert len(set(keys)) == len(keys) == len(folders(tmp_path / "cache"))


def test_killed_while_writing_leaves_nothing_that_is_used(
    files,
    build,
    tokenizer,
    tmp_path,
    monkeypatch,
):
    """A kill leaves the partial folder as it is: so does this stand-in for the last write
    and for the clean-up.
    """
    good = build_cache(load_corpus(files), tokenizer, tmp_path / "good")
    cache_dir = tmp_path / "cache"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "fsync_tree", killed)
        patch.setattr(cache.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            build(files)
    (leftover,) = folders(cache_dir)
    assert ".partial-" in leftover
    assert (cache_dir / leftover / "meta.json").exists()
    with at_work(cache_dir / leftover):  # as a builder that is alive
        built = build(files)
    assert built.meta == good.meta
    assert folders(cache_dir) == sorted([built.folder.name, leftover])
    build(files[:1])
    assert leftover not in folders(cache_dir)


def test_of_two_builders_at_once_the_first_wins(files, build, tmp_path, monkeypatch):
    """Two nodes with one shared folder: the other one finishes just before this one
    renames.
    """
    sync = cache.fsync_tree
    theirs = []

    def late(folder):
        sync(folder)
        if not theirs:
            theirs.append(None)
            theirs[0] = build(files)

    monkeypatch.setattr(cache, "fsync_tree", late)
    mine = build(files)
    assert mine.meta == theirs[0].meta
    assert folders(tmp_path / "cache") == [mine.folder.name]


def test_an_empty_corpus_is_refused(build, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    with user_error("--train_files: every document is empty"):
        build([str(tmp_path / "a.jsonl")])


def test_an_empty_variable_names_no_cache_folder(
    files, tokenizer, tmp_path, monkeypatch
):
    data = DataArguments()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    built = cached(load_corpus(files), tokenizer, data, progress=False)
    assert built.folder.parent == tmp_path / ".cache/mora_ds/tokens"
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody5/cache")
    with user_error("--cache_dir"):
        cached(load_corpus(files), tokenizer, data, progress=False)
