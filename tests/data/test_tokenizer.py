"""Tokenizers that are trained, wrapped and saved give exactly SentencePiece's ids;
unsuitable ones are refused.
"""

import io
import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer, GPT2Config, LlamaConfig

from mora_ds.common.errors import UserError
from mora_ds.data import (
    adds_bos,
    check_vocabulary,
    load_tokenizer,
    train_sentencepiece,
)
from mora_ds.data.tokenizer import Encoder, end_of_text_id, tokenizer_fingerprint
from tests.helpers.errors import user_error
from tests.helpers.outcome import tree

SOURCES = [
    Path(module.__file__ or "").read_text() for module in (json, random, io, pytest)
]
AWKWARD = [
    "",
    " ",
    "\n",
    "a",
    " leading",
    "   three spaces  inside and trailing  ",
    "\tdef f(x):\n\t\treturn x\n",
    "class A:\n    def b(self):\n        if self.c:\n            return [1,  2]\n\n\n",
    "\r\nwindows\r\n",
    "naïve café, 漢字かな交じり文, Ελλάδα, русский, עברית, 👩‍👩‍👧 é",
    "\x00\x01\x7f \u00a0\u2028\ufeff\uffff \ufb01 \u2581literal",
    "<s> </s> <pad> <unk> <0x0A> </s></s>",
    "x" * 300 + " " * 300 + "\n" * 50,
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_sentencepiece(SOURCES, 600, tmp_path_factory.mktemp("trained"))


def fuzz(count):
    """Random slices of code, and random strings over an alphabet that provokes ties and
    byte fallback.
    """
    generator = random.Random(0)
    alphabet = [
        *"  \n\t.,()aaaeeesstt_=<>/sx0",
        "é",
        "漢",
        "😀",
        "self",
        "    ",
        "\n\n",
    ]
    strings = [
        "".join(generator.choices(alphabet, k=generator.randrange(1, 80)))
        for _ in range(count)
    ]
    for source in generator.choices(SOURCES, k=count):
        start = generator.randrange(len(source))
        strings.append(source[start : start + generator.randrange(400)])
    return strings


def test_ids_are_those_of_sentencepiece_and_survive_saving(trained, tmp_path):
    original = sentencepiece.SentencePieceProcessor(
        model_file=str(trained / "tokenizer.model")
    )
    wrapped = load_tokenizer(trained)
    wrapped.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in AWKWARD + SOURCES + fuzz(400):
        ids = original.encode(text)
        assert wrapped.encode(text, add_special_tokens=False) == ids
        assert again.encode(text, add_special_tokens=False) == ids
        assert wrapped.encode(text) == again.encode(text) == [original.bos_id(), *ids]
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(wrapped)


def test_no_character_is_normalized(trained):
    wrapped = load_tokenizer(trained)
    for text in AWKWARD + SOURCES:
        ids = wrapped.encode(text, add_special_tokens=False)
        assert wrapped.unk_token_id not in ids
        # SentencePiece's own sign for a space
        assert wrapped.decode(ids) == text.replace("\u2581", " ")


def test_trained_tokenizer_has_special_ids_and_indentations(trained):
    wrapped = load_tokenizer(trained)
    names = (
        wrapped.unk_token_id,
        wrapped.bos_token_id,
        wrapped.eos_token_id,
        wrapped.pad_token_id,
    )
    assert names == (0, 1, 2, 3)
    assert len(wrapped) == wrapped.vocab_size == 600
    assert len(wrapped.encode(" " * 8, add_special_tokens=False)) == 1
    assert adds_bos(wrapped)
    assert end_of_text_id(wrapped) == 2


@pytest.mark.parametrize("config", [LlamaConfig(), GPT2Config()])
def test_tokenizer_saved_next_to_a_model_config_loads_unchanged(
    trained, tmp_path, config
):
    wrapped = load_tokenizer(trained)
    config.save_pretrained(tmp_path)
    wrapped.save_pretrained(tmp_path)
    shutil.copy(trained / "tokenizer.model", tmp_path)
    again = load_tokenizer(tmp_path)
    assert all(again.encode(text) == wrapped.encode(text) for text in AWKWARD)


def test_training_is_deterministic(tmp_path, monkeypatch):
    first, second = (
        train_sentencepiece(iter(SOURCES), 400, tmp_path / name) for name in "ab"
    )
    assert tree(first) == tree(second)
    monkeypatch.setattr("mora_ds.data.sentencepiece._SAMPLE_BYTES", 1)
    small, again = (train_sentencepiece(SOURCES, 400, tmp_path / name) for name in "cd")
    assert tree(small) == tree(again)


def test_vocabulary_must_fit_the_model(trained):
    wrapped = load_tokenizer(trained)
    check_vocabulary(wrapped, 600)
    with user_error(
        r"does not fit the model.*id 599, the model has embeddings for ids 0 to 598"
    ):
        check_vocabulary(wrapped, 599)
    wrapped.add_tokens(["<added>"])
    with user_error("'<added>' has id 600"):
        check_vocabulary(wrapped, 600)


@pytest.mark.parametrize("largest, dtype", [(65_535, "<u2"), (65_536, "<u4")])
def test_the_largest_id_decides_how_many_bytes_an_id_has(
    trained, monkeypatch, largest, dtype
):
    monkeypatch.setattr("mora_ds.data.tokenizer.largest_id", lambda _: ("x", largest))
    assert Encoder.of(load_tokenizer(trained)).dtype == dtype


@pytest.mark.parametrize(
    "texts, size, said",
    [
        (
            ["small corpus"],
            5000,
            r"--train_tokenizer_vocab 5000: .* too high .* set it to a value <= \d+",
        ),
        (
            SOURCES,
            270,
            r"--train_tokenizer_vocab 270: .* smaller than required_chars. 270 vs \d+",
        ),
        (["\n\n"], 1000, r"--train_tokenizer_vocab 1000: .*sentences_.empty"),
    ],
)
def test_vocabulary_sizes_that_cannot_be(tmp_path, texts, size, said):
    with user_error(said):
        train_sentencepiece(texts, size, tmp_path)


def test_a_broken_corpus_stops_the_training_with_its_own_error(tmp_path):
    def texts():
        yield "fine"
        raise UserError("--train_files: a.txt, line 3: not UTF-8")

    with user_error("line 3: not UTF-8"):
        train_sentencepiece(texts(), 300, tmp_path)
