"""tools/prepare_corpus.py: which documents are kept and held out, and that the trainer maps the folder."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mora_ds.common.errors import UserError
from mora_ds.data import (
    Filters,
    PackedDataset,
    build_cache,
    canonical_digest,
    is_held_out,
    load_corpus,
    load_tokenizer,
    prepare_corpus,
    readers,
    train_sentencepiece,
)
from mora_ds.data import cache as cache_module
from mora_ds.data.dedup import NUM_PERM, SHINGLE_WORDS, CanonicalHash, NearDuplicates, signature
from tests.helpers.jobs import REPOSITORY, Playground, losses, run

WORDS = [f"{a}{b}" for a in ("mor", "lex", "tar", "pin", "sol", "ven") for b in ("a", "en", "it", "os", "um", "y")]
HELD = 20.0


def document(seed: int, words: int = 60) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words)) + "\n"


def write_lines(path: Path, texts: list[str]) -> Path:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return load_tokenizer(train_sentencepiece([document(i) for i in range(50)], 330, folder))


def texts_of(split: Path, tokenizer) -> list[str]:
    """Every document of a prepared split, decoded."""
    corpus = load_corpus([str(split)])
    cache = build_cache(corpus, tokenizer, split.parent / "unused")
    starts = [0, *cache.ends[:-1]]
    return [
        tokenizer.decode(cache.tokens[a:b], skip_special_tokens=True) for a, b in zip(starts, cache.ends, strict=True)
    ]


def test_every_kind_of_file_is_read_and_no_held_out_document_is_trained_on(tmp_path: Path, tokenizer) -> None:
    documents = [document(i) for i in range(120)]
    files = [write_lines(tmp_path / "a.jsonl", documents[:40]), write_lines(tmp_path / "b.jsonl.gz", documents[40:80])]
    pyarrow.parquet.write_table(pyarrow.table({"text": documents[80:119]}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text(documents[119])
    again = [documents[5].upper().replace(" ", "  "), documents[45], "", "short"]
    files += [tmp_path / "c.parquet", tmp_path / "d.txt", write_lines(tmp_path / "e.jsonl", again)]
    corpus = load_corpus([str(path) for path in files])
    out = tmp_path / "prepared"
    filters = Filters(min_characters=10, near_duplicates=0, held_out_percent=HELD)
    report = prepare_corpus(corpus, tokenizer, out, filters)

    assert report.read == 124 and report.dropped == {"exact duplicate": 2, "too short": 2}
    held = [text for text in documents if is_held_out(text, HELD)]
    assert 10 < len(held) < 40
    assert texts_of(out / "train", tokenizer) == [text for text in documents if text not in held]
    assert texts_of(out / "held_out", tokenizer) == held
    assert [json.loads(line)["text"] for line in (out / "held_out.jsonl").read_text().splitlines()] == held
    trained = {canonical_digest(text) for text in texts_of(out / "train", tokenizer)}
    assert not trained & {canonical_digest(text) for text in held}
    split = json.loads((out / "prepared.json").read_text())["report"]["splits"]["held_out"]
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in held)
    nbytes = len("".join(held).encode())
    assert (split["documents"], split["tokens"], split["text_bytes"]) == (len(held), tokens, nbytes)
    assert split["tokens_per_byte"] == tokens / nbytes
    assert report.scripts == {"LATIN": sum(map(str.isalpha, "".join(documents)))}


def test_the_side_of_a_document_is_a_function_of_its_text_alone() -> None:
    documents = [document(i) for i in range(4000)]
    sides = [is_held_out(text, 5.0) for text in documents]
    assert 140 < sum(sides) < 260
    assert sides == [is_held_out(f"  {text.upper()} ", 5.0) for text in documents]
    assert all(is_held_out(text, 9.0) for text, held in zip(documents, sides, strict=True) if held)


def test_a_text_has_one_hash_however_it_is_cut() -> None:
    text = "Die  Straße \n\n ist lang.\n\tUnd breit "
    for cuts in [(5, 6, 13), (4, 14, 15), (1, 2, 3), (0, 7, 20)]:
        canonical = CanonicalHash()
        for start, end in zip((0, *cuts), (*cuts, len(text)), strict=True):
            canonical.add(text[start:end])
        assert canonical.digest() == canonical_digest(text) == canonical_digest("die straße ist lang. und breit")
    assert canonical_digest("ab c") != canonical_digest("a bc")


def jaccard(one: str, other: str) -> float:
    first, second = (
        {tuple(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}
        for words in (re.findall(r"\w+", text) for text in (one, other))
    )
    return len(first & second) / len(first | second)


def test_near_duplicates_are_those_of_the_exact_jaccard_similarity(tmp_path: Path, tokenizer) -> None:
    originals = [document(i, words=300) for i in range(12)]
    copies = []
    for number, text in enumerate(originals):
        words = text.split()
        for place in range(number):  # 0 to 11 words changed, each in five runs
            words[place * 25 + 7] = "altered"
        copies.append(" ".join(words) + " .")
    similar = [jaccard(*pair) for pair in zip(originals, copies, strict=True)]
    assert max(similar) == 1 and min(similar) < 0.7
    estimates = [
        np.count_nonzero(signature(one) == signature(other)) / NUM_PERM
        for one, other in zip(originals, copies, strict=True)
    ]
    assert max(abs(a - b) for a, b in zip(estimates, similar, strict=True)) < 0.15  # 3 standard deviations and more

    corpus = load_corpus([str(write_lines(tmp_path / "a.jsonl", [*originals, *copies]))])
    report = prepare_corpus(corpus, tokenizer, tmp_path / "out", Filters(near_duplicates=0.8, held_out_percent=0))
    assert report.dropped == {"near duplicate": sum(each >= 0.8 for each in estimates)}
    assert report.dropped.total() >= 4
    kept = texts_of(tmp_path / "out" / "train", tokenizer)
    assert kept[: len(originals)] == originals  # the first of each stays

    index = NearDuplicates(0.8)
    assert [index.seen(signature(text)) for text in ("one two", "one two", "two one")] == [False, True, False]


def folder_hash(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_the_number_of_processes_changes_nothing(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = load_corpus([str(write_lines(tmp_path / "a.jsonl", [document(i % 90) for i in range(120)]))])
    monkeypatch.setattr(cache_module, "PARALLEL_BYTES", 0)
    monkeypatch.setattr("mora_ds.data.readers.BATCH_CHARACTERS", 4000)
    filters = Filters(held_out_percent=HELD)
    for processes in (1, 2):
        prepare_corpus(corpus, tokenizer, tmp_path / str(processes), filters, num_proc=processes)
    assert folder_hash(tmp_path / "1") == folder_hash(tmp_path / "2")


def test_a_document_in_chunks_is_one_document(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text files longer than a chunk are kept, held out or dropped, exactly as if they were read in one chunk."""
    long = ["\n".join(document(100 * i + j).strip() for j in range(9)) + "\n" for i in range(12)]
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate([*long, long[0].replace("\n", "\n\n"), long[3]]):
        (folder / f"{i:02}.txt").write_text(text)
    whole = write_lines(tmp_path / "whole.jsonl", long)
    filters = Filters(near_duplicates=0, held_out_percent=40)
    monkeypatch.setattr(readers, "CHUNK_CHARACTERS", 500)
    chunked = prepare_corpus(load_corpus([str(folder)]), tokenizer, tmp_path / "pieces", filters)
    lines = prepare_corpus(load_corpus([str(whole)]), tokenizer, tmp_path / "lines", filters)
    assert chunked.dropped == {"exact duplicate": 2} and chunked.read == 14 and not lines.dropped
    held = [text for text in long if is_held_out(text, 40)]
    assert 0 < len(held) < 12
    for split, wanted in (("train", [text for text in long if text not in held]), ("held_out", held)):
        assert texts_of(tmp_path / "pieces" / split, tokenizer) == wanted
        assert chunked.splits[split].text_bytes == lines.splits[split].text_bytes
    assert (tmp_path / "pieces/held_out.jsonl").read_bytes() == (tmp_path / "lines/held_out.jsonl").read_bytes()
    near = prepare_corpus(load_corpus([str(folder)]), tokenizer, tmp_path / "near", Filters(near_duplicates=0.9))
    assert near.dropped == {"exact duplicate": 2}


def test_the_trainer_maps_the_folder_as_it_is(tmp_path: Path, user: Playground) -> None:
    """Two ranks, no token cache, the losses of a run that tokenises the same documents itself."""
    tokenizer = load_tokenizer(user.model)
    out = tmp_path / "prepared"
    prepare_corpus(load_corpus([str(user.train)]), tokenizer, out, Filters(near_duplicates=0, held_out_percent=10))
    kept = write_lines(tmp_path / "kept.jsonl", texts_of(out / "train", tokenizer))
    held = f"held={out / 'held_out'}"
    mapped = ["--train_files", out, "--eval_files", held, "--cache_dir", tmp_path / "cache", "--max_steps", 3]
    run(2, user.flags(tmp_path / "a", *mapped))
    assert not (tmp_path / "cache").exists()
    run(2, user.flags(tmp_path / "b", *mapped, "--train_files", kept, "--eval_files", f"held={out}/held_out.jsonl"))
    assert losses(tmp_path / "a").tolist() == losses(tmp_path / "b").tolist()
    before = [json.loads((tmp_path / each / "summary.json").read_text())["perplexity_before"] for each in "ab"]
    assert before[0] == before[1] and set(before[0]) == {"held"}


@pytest.mark.gloo
def test_prepared_folders_are_sources_and_replay(tmp_path: Path, user: Playground) -> None:
    """With the batches of the same text."""
    tokenizer, filters = load_tokenizer(user.model), Filters(near_duplicates=0, min_characters=0, held_out_percent=0)
    half = user.train.read_text(encoding="utf-8").splitlines(keepends=True)[::2]
    old = tmp_path / "old.jsonl"
    old.write_text("".join(half), encoding="utf-8")
    for name, text in (("new", user.train), ("old", old)):
        prepare_corpus(load_corpus([str(text)]), tokenizer, tmp_path / "prepared" / name, filters)
    for out, new, replayed in (
        ("a", tmp_path / "prepared" / "new", tmp_path / "prepared" / "old"),
        ("b", user.train, old),
    ):
        run(1, user.flags(tmp_path / out, "--train_files", f"new={new}:1", "--replay", f"old={replayed}:0.25"))
    assert losses(tmp_path / "a").tolist() == losses(tmp_path / "b").tolist()


def test_what_is_mapped_is_refused_where_it_does_not_fit(tmp_path: Path, tokenizer) -> None:
    files = [str(write_lines(tmp_path / "a.jsonl", [document(i) for i in range(40)]))]
    out = tmp_path / "prepared"
    prepare_corpus(load_corpus(files), tokenizer, out, Filters(near_duplicates=0, held_out_percent=0))
    corpus = load_corpus([str(out)])
    assert PackedDataset(build_cache(corpus, tokenizer, tmp_path / "cache"), 16).n_blocks > 10
    other = load_tokenizer(train_sentencepiece([document(i) for i in range(50)], 340, tmp_path / "other"))
    with pytest.raises(UserError, match=r"tokens of another tokenizer .*prepare it again with --tokenizer"):
        build_cache(corpus, other, tmp_path / "cache")
    with pytest.raises(UserError, match="must be named alone"):
        load_corpus([str(out), *files])
    with pytest.raises(UserError, match="holds tokens, not text"):
        list(corpus.texts())
    with pytest.raises(UserError, match=r"--eval_files: .* no document in its split 'held_out'"):
        load_corpus([str(out / "held_out")], flag="--eval_files")
    tokens = next((out / "train").glob("*/tokens.bin"))
    data = bytearray(tokens.read_bytes())
    data[7] ^= 1
    tokens.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged: .*tokens.bin is not what was written; prepare it again"):
        build_cache(corpus, tokenizer, tmp_path / "cache")
    shutil.rmtree(tokens.parent)
    with pytest.raises(UserError, match=r"damaged: there is no .*meta.json; prepare it again"):
        build_cache(corpus, tokenizer, tmp_path / "cache")


def refusal(*flags: object) -> str:
    command = [sys.executable, str(REPOSITORY / "tools" / "prepare_corpus.py"), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_bad_input_is_named_and_nothing_is_left(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    good = [json.dumps({"text": document(i)}) for i in range(3)]
    out = tmp_path / "out"

    def prepare(*lines: str, filters: Filters = Filters(near_duplicates=0)) -> None:  # noqa: B008
        (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
        prepare_corpus(load_corpus([str(tmp_path / "a.jsonl")], flag="--files"), tokenizer, out, filters)

    prepare(*good)
    before = folder_hash(out)
    for lines, message in (
        ((*good, '{"body": "x", "id": 1}'), r"--files: .*a.jsonl, line 4: no field 'text'; there are: body, id"),
        ((*good, '{"text": "x"'), r"--files: .*a.jsonl, line 4, column \d+: broken JSON"),
        (('{"text": ""}', '{"text": "  "}'), r"--files: nothing is left to train on: .*dropped"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(*lines, filters=Filters(min_characters=3, near_duplicates=0))
        assert folder_hash(out) == before and sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UserError, match=r"needs the package datasketch: pip install -e '.\[corpus\]'"):
        prepare(*good, filters=Filters())
    for bad, message in (
        ({"near_duplicates": 1.5}, "--near_duplicates"),
        ({"held_out_percent": 100}, "--held_out"),
        ({"min_characters": 9, "max_characters": 5}, "--max_characters 5 is below"),
    ):
        monkeypatch.undo()
        with pytest.raises(UserError, match=message):
            prepare(*good, filters=Filters(**bad))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    flags = ("--files", tmp_path / "a.jsonl", "--tokenizer", tmp_path / "tokenizer", "--output", out)
    assert "exists already" in refusal(*flags)
