"""The demo corpora: equal bytes on every call, held-out modules in neither training set,
limits on sizes.
"""

import ast
import json
from pathlib import Path

import pytest

from mora_ds.data import demo_corpus, domain_documents, write_demo_corpus
from tests.helpers.errors import user_error


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_demo_corpus(folder, 10**9, 10**9, 10**9)
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sources(path):
    return {row["source"] for row in rows(path)}


def test_a_module_is_held_out_of_both_or_of_neither(written):
    train, held_out = (
        sources(written / f"general_{kind}.jsonl")
        | sources(written / f"domain_{kind}.jsonl")
        for kind in ("train", "eval")
    )
    assert not train & held_out
    assert 0.02 < len(held_out) / len(train | held_out) < 0.09
    assert {"json.decoder", "topic:assert"} <= train | held_out


def test_no_held_out_prose_is_trained_on(written):
    held_out, trained = (
        {
            paragraph
            for row in rows(written / name)
            for paragraph in demo_corpus.paragraphs_of(row["text"])
        }
        for name in ("general_eval.jsonl", "general_train.jsonl")
    )
    assert held_out
    assert not held_out & trained


def test_code_is_the_library_as_it_stands():
    documents = {document.source: document.text for document in domain_documents()}
    for module in (json, ast):
        assert (
            documents[module.__name__]
            == Path(module.__file__ or "").read_bytes().decode()
        )
    names = {name for source in documents for name in source.split(".")}
    assert not names & {
        "test",
        "tests",
        "idlelib",
        "encodings",
        "pydoc_data",
        "site-packages",
    }
    assert not any(source.startswith("_sysconfigdata") for source in documents)


def test_docstrings_are_dedented_and_in_order():
    source = 'def later(): "b"\nclass A:\n    """First.\n\n    second\n        indented\n    """\n'
    source += '    def f(self): "c"\n'
    assert demo_corpus.docstrings_of(ast.parse('"""Top."""\n' + source)) == [
        "Top.",
        "b",
        "First.\n\nsecond\n    indented",
        "c",
    ]


def test_limits_hold_and_the_same_bytes_come_again(written, tmp_path):
    limits = {"general_bytes": 200_000, "domain_bytes": 300_000, "eval_bytes": 30_000}
    for name in "ab":
        write_demo_corpus(tmp_path / name, **limits)
    sizes = {}
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        assert sources(path) <= sources(written / path.name)
        sizes[path.stem] = sum(len(row["text"].encode()) for row in rows(path))
    for corpus in ("general", "domain"):
        limit = limits[f"{corpus}_bytes"]
        assert limit - 10_000 < sizes[f"{corpus}_train"] <= limit
        assert 0 < sizes[f"{corpus}_eval"] <= 30_000


def test_a_python_without_its_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_corpus.sysconfig, "get_path", lambda _: str(tmp_path))
    demo_corpus.library_modules.cache_clear()
    with user_error(r"sources of the standard library.*--train_files"):
        write_demo_corpus(tmp_path, 10**9, 10**9, 10**9)
    demo_corpus.library_modules.cache_clear()
