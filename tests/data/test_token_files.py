"""Token files of other tools: the same batches as from their documents as text, read in
place, and an error that names what is wrong with a file.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mora_ds.common import fetched
from mora_ds.data import (
    DocumentFilter,
    Mixture,
    PackedDataset,
    build_cache,
    load_corpus,
    load_tokenizer,
    token_files,
)
from tests.helpers.damage import HARMS
from tests.helpers.errors import user_error
from tests.helpers.jobs import curve, run
from tests.helpers.resume import assert_one_run
from tests.helpers.texts import json_lines
from tests.helpers.token_files import (
    KINDS,
    tokens_of,
    write_megatron_index,
    write_tokens,
)

T = 16


@pytest.fixture
def texts(user):
    return user.texts()


@pytest.fixture
def write(tokenizer, texts, tmp_path):
    """Writes the documents of the user's text, in three files of one kind."""

    def write(kind, folder=tmp_path / "tokens", dtype="<u2"):
        folder.mkdir(exist_ok=True)
        documents = tokens_of(tokenizer, texts)
        parts = {"a": slice(9), "b": slice(9, 10), "c": slice(10, None)}
        for name, part in parts.items():
            write_tokens(folder, kind, documents[part], name, dtype)
        return f"{folder}/*.{kind}"

    return write


@pytest.fixture
def build(tokenizer, tmp_path):
    """Builds or opens the cache of these files."""

    def build(pattern, keep=None, **settings):
        corpus = replace(load_corpus([str(pattern)]), keep=keep)
        return build_cache(corpus, tokenizer, tmp_path / "cache", **settings)

    return build


@pytest.fixture
def of_text(texts, tmp_path, build):
    """The cache of the same documents as JSON lines."""
    (tmp_path / "text.jsonl").write_text(json_lines(texts))
    return lambda **settings: build(tmp_path / "text.jsonl", **settings)


def assert_same(one, another):
    assert one.ends.tolist() == another.ends.tolist()
    assert one.tokens[0 : len(one.tokens)].tolist() == another.tokens[:].tolist()


# -- the same batches ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_those_of_the_documents_as_text(
    write, build, of_text, kind, monkeypatch
):
    """In a mixture with a share, over three epochs: also across borders of files, and of
    what is checked at once."""
    monkeypatch.setattr(token_files, "CHUNK", 50)

    def mixture(cache):
        sources = {
            "a": PackedDataset(cache, T, "3/a"),
            "b": PackedDataset(of_text(document_start="none"), T, "3/b"),
        }
        return Mixture(sources, [(0, (0.7, 0.3))], [None, None], T, 12)

    in_place = build(write(kind))
    assert_same(in_place, of_text())
    one = mixture(in_place)
    another = mixture(of_text())
    for step in range(3 * one.sources[0].n_blocks // 8):
        for key, value in one.batch(step, slice(3, 9)).items():
            if key != "documents":
                assert torch.equal(value, another.batch(step, slice(3, 9))[key])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_documents_are_held_out(write, build, of_text, kind):
    """On both sides: it is their text that decides."""
    pattern = write(kind)
    for keep in (DocumentFilter(0.4), DocumentFilter(0.4, takes_held_out=True)):
        held = build(pattern, keep)
        assert 3 < held.n_documents < 60
        assert_same(held, of_text(keep=keep))


@pytest.mark.parametrize("kind", ["bin", "ds"])
def test_tokens_of_32_bits(write, build, of_text, kind):
    assert_same(build(write(kind, dtype="<i4")), of_text())


@pytest.mark.parametrize("kind", KINDS)
def test_token_files_at_a_url_are_read_from_copies(
    write, build, of_text, kind, tmp_path, monkeypatch
):
    """Of them and of their indices alone, in a folder whose name looks like a pattern."""
    monkeypatch.setattr(fetched, "_cache", tmp_path / "node[1]")
    pattern = write(kind)
    other = tmp_path / f"tokens/other/x.{kind}"
    other.parent.mkdir()
    other.touch()
    built = build(f"file://{pattern}")
    assert_same(built, of_text())
    copies = {Path(file.filename) for file in built.tokens.files}
    assert copies == set((tmp_path / "node[1]").rglob(f"*.{kind}"))
    with user_error("no file matches"):
        load_corpus([f"file://{tmp_path}/tokens/nothing*.{kind}"])


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_not_copied(write, build, tmp_path, kind):
    built = build(write(kind))
    names = sorted(path.name for path in built.folder.iterdir())
    assert names == ["documents.bin", "meta.json", "starts.bin"]
    mapped = {file.filename for file in built.tokens.files}
    assert mapped == set((tmp_path / "tokens").glob(f"*.{kind}"))
    build(write(kind))  # opens it


def test_a_sequence_of_megatron_is_no_document(tokenizer, texts, tmp_path, build):
    """A document of several sequences is one; one without tokens is none."""
    documents = tokens_of(tokenizer, texts[:4])
    path = write_tokens(tmp_path, "bin", documents)
    lengths = [len(documents[0]) - 3, 3, len(documents[1]), 0, *map(len, documents[2:])]
    borders = [0, 2, 3, 4, 5, 6]
    write_megatron_index(tmp_path / "a.idx", lengths, "<u2", documents=borders)
    expected = np.cumsum(list(map(len, documents)))
    assert build(path).ends.tolist() == expected.tolist()


def test_a_file_begins_with_its_own_first_token(tmp_path, build):
    """Which is that of every file where documents have a start token."""
    for name, document in (("a", [5, 6, 2]), ("b", [7, 2]), ("c", [8, 9, 2])):
        write_tokens(tmp_path, "npy", [document], name)
    built = build(tmp_path / "*.npy", document_start="none")
    assert built.tokens[:].tolist() == [5, 6, 2, 7, 2, 8, 9, 2]


def test_another_index_is_another_cache(tmp_path, build):
    """Also of the same tokens in the same file."""
    path = write_tokens(tmp_path, "ds", [[1, 5, 2, 1, 7, 2]])
    times = path.stat()
    assert build(path).n_documents == 1
    write_tokens(tmp_path, "ds", [[1, 5, 2], [1, 7, 2]])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert build(path).n_documents == 2


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_index_is_written_anew(write, build, of_text, harm, caplog):
    built = build(write("ds"))
    HARMS[harm](built.folder / "starts.bin")
    assert_same(build(write("ds")), of_text())
    assert f"the token cache {built.folder} is damaged" in caplog.text


# -- complete runs ---------------------------------------------------------------------


@pytest.mark.heavy
def test_a_run_on_token_files_is_the_run_on_their_text(user, write, tmp_path):
    """Replayed and held out, stopped and resumed, on two ranks."""
    pattern = write("bin")

    def flags(folder, *batch, files=pattern):
        more = f"--save_steps 2 --replay old={files}:0.25 --held_out_share 0.1"
        return user.flags(folder, "--train_files", files, more, *batch)

    assert_one_run(flags, tmp_path)
    rows = "--per_device_train_batch_size 4"
    run(1, flags(tmp_path / "text", rows, files=user.train))
    assert curve(tmp_path / "text") == curve(tmp_path / "reference")


# -- what is wrong ---------------------------------------------------------------------

IDS = [[1, 5, 6, 2], [1, 7, 2], [1, 8, 9, 10, 2]]
"""Documents of 12 tokens; 1 and 2 are the start and the end-of-text."""
NOT_THE_END = (
    "documents do not end with the last of 12 tokens: the file is truncated, or"
)
MEGATRON_HEADER = "read if it is of version 1 and dtype code 4 .* not "
WRONG_INDEX = {
    "version": ({"version": 2}, MEGATRON_HEADER + "2 and 8"),
    "dtype": ({"code": 5}, MEGATRON_HEADER + "1 and 5"),
    "width": ({"code": 4}, "ids up to 589832 in uint32"),
    "outside": ({"documents": [0, 1, 9, 3]}, "a.bin is damaged: IndexError"),
    "backward": ({"documents": [0, 2, 1, 3]}, NOT_THE_END),
    "missing": ({"documents": [0, 1, 2]}, NOT_THE_END),
    "ds outside": ([4, 99, 12], NOT_THE_END),
    "ds backward": ([7, 4, 12], NOT_THE_END),
    "ds other width": ([4, 7, 11], "2.18182 bytes for each of the tokens in .*.index"),
    "ds inside": ([3, 7, 12], "documents must end with token 2 .*, not 6 as at 2"),
}


@pytest.mark.parametrize("name", WRONG_INDEX)
def test_what_is_wrong_with_an_index_is_named(tmp_path, build, name):
    changes, message = WRONG_INDEX[name]
    if isinstance(changes, dict):
        path = write_tokens(tmp_path, "bin", IDS)
        lengths = np.array(list(map(len, IDS)))
        write_megatron_index(tmp_path / "a.idx", lengths, "<u2", **changes)
    else:
        path = write_tokens(tmp_path, "ds", IDS)
        (tmp_path / "a.ds.index").write_bytes(np.array(changes, "<u8").tobytes())
    with user_error(message):
        build(path)


WRONG_IDS = {
    "vocabulary": (
        [*IDS, [1, 60_000, 2]],
        "ids up to 60000 in uint16, the tokenizer has",
    ),
    "end-of-text": (
        [[1, 5, 3, 2], [1, 3]],
        "documents must end with token 2 .*, not 3",
    ),
    "start": (
        [[1, 5, 2], [5, 2]],
        "begin, without --document_start none, with token 1",
    ),
}


@pytest.mark.parametrize("name", WRONG_IDS)
def test_tokens_of_another_tokenizer_are_named(tmp_path, build, name):
    documents, message = WRONG_IDS[name]
    path = write_tokens(tmp_path, "bin", documents)
    with user_error(message):
        build(path)
    if name == "start":
        assert build(path, document_start="none").n_documents == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_named(tmp_path, build, kind):
    """By a byte and by a token; so is a truncated index."""
    path = write_tokens(tmp_path, kind, IDS)
    files = [path, path.with_suffix(".idx"), tmp_path / "a.ds.index"]
    for file in filter(Path.exists, files):
        content = file.read_bytes()
        for cut in (1, 2, len(content)):
            file.write_bytes(content[:-cut])
            with user_error(rf"a\.{kind}(: | is damaged: )"):
                build(path)
        file.write_bytes(content)
    assert build(path).n_documents == 3


@pytest.mark.parametrize("kind, index", [("bin", "a.idx"), ("ds", "a.ds.index")])
def test_an_index_that_is_too_large_is_not_read(tmp_path, kind, index):
    path = write_tokens(tmp_path, kind, IDS)
    os.truncate(tmp_path / index, 2**40)
    with user_error(rf"{index} is larger than the index of so few tokens can be"):
        load_corpus([str(path)]).members[0].documents(None)


def test_the_tokenizers_last_id_is_taken_and_the_next_one_is_not(tmp_path, build):
    build(write_tokens(tmp_path, "npy", [*IDS, [1, 399, 2]]))
    path = write_tokens(tmp_path, "npy", [*IDS, [1, 400, 2]])
    with user_error("a.npy: ids up to 400 in uint16, the tokenizer has 0 to 399"):
        build(path)


def test_ids_of_32_bits_are_not_read_as_twice_as_many(tmp_path, build):
    path = write_tokens(tmp_path, "npy", IDS, dtype="<i4")
    with user_error("a.npy: ids up to 10 in uint16, the tokenizer has 0 to 399 in <u2"):
        build(path)


def test_the_header_of_numpy_is_no_tokens(tmp_path, build):
    np.save(tmp_path / "a.npy", np.concatenate(IDS).astype("<u2"))
    with user_error("a.npy: numpy.save wrote it; write ids alone"):
        build(tmp_path / "a.npy")


def test_names_that_lead_to_no_token_file(tmp_path):
    path = write_tokens(tmp_path, "bin", IDS)
    (tmp_path / "a.txt").write_text("text")
    with user_error("a.idx belongs to a token file: name the .bin or .ds alone"):
        load_corpus([str(tmp_path / "a.idx")])
    with user_error("text and token files cannot be one source"):
        load_corpus([str(tmp_path / "a.txt"), str(path)])
    (text,) = load_corpus([str(tmp_path)]).members
    assert text.path.name == "a.txt", "a folder means its text"
    with user_error("a.bin holds tokens: it is no text for --streaming, nor to train"):
        list(load_corpus([str(path)]).texts())
    (tmp_path / "a.idx").unlink()
    with user_error(f"its index {tmp_path}/a.idx is missing"):
        load_corpus([str(path)])


# -- the tools' own writers ------------------------------------------------------------


@pytest.mark.heavy
def test_files_that_megatron_writes(tokenizer, texts, tmp_path, build, of_text):
    indexed = pytest.importorskip(
        "megatron.core.datasets.indexed_dataset", reason="needs the extra test"
    )
    path = tmp_path / "a.bin"
    builder = indexed.IndexedDatasetBuilder(str(path), dtype=np.uint16)
    for document in tokens_of(tokenizer, texts):
        builder.add_document(document, [2, len(document) - 2])
    builder.finalize(str(tmp_path / "a.idx"))
    assert_same(build(path), of_text())


@pytest.mark.heavy
def test_files_that_datatrove_writes(user, texts, tmp_path, build, of_text):
    """Of its own pipeline, from the text on."""
    pytest.importorskip("datatrove", reason="needs the extra test")
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer

    tokenizer = load_tokenizer(user.model)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    step = DocumentTokenizer(
        str(tmp_path / "tokens"),
        tokenizer_name_or_path=str(tmp_path / "tokenizer.json"),
        eos_token=tokenizer.eos_token,
        shuffle_documents=False,
    )
    documents = (Document(text, str(number)) for number, text in enumerate(texts))
    step.run(documents, rank=0, world_size=1)
    (path,) = (tmp_path / "tokens").glob("*.ds")
    assert_same(build(path, document_start="none"), of_text(document_start="none"))
