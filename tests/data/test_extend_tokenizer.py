"""`mora-ds extend-vocab`: real SentencePiece settings, round trips, rows that start as
means, heads of every kind.
"""

import argparse
import inspect
import json
import random
import re
import subprocess
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any, cast

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from mora_ds.common.errors import RunError
from mora_ds.common.files import read_json
from mora_ds.data import (
    Extension,
    load_corpus,
    load_tokenizer,
    train_sentencepiece,
)
from mora_ds.models import vocabulary
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.vocabulary import (
    EXTENSION_JSON,
    extend_vocabulary,
    extended_table,
    first_new_row,
)
from tests.helpers.damage import change_json
from tests.helpers.errors import user_error
from tests.helpers.models import tiny_model
from tests.helpers.tables import parsed
from tests.helpers.texts import json_lines

GENERAL = [text.strip()[:1500] for _, text in sorted(topics.items())]
SOURCES = [
    Path(module.__file__ or "").read_text()
    for module in (argparse, subprocess, random, inspect)
]
DOMAIN = [
    source[start : start + 1500].strip() + "\n"
    for source in SOURCES
    for start in range(0, 30_000, 1500)
]
PLAIN = [
    "The quick brown fox.",
    "two  spaces ",
    "def f(self):\n    return self._x\n",
    "naïve Ελλ 漢字 😀",
    "42 3.14",
]
PROBES = [*PLAIN, " leading", "", " ", "  hypothetical  "]

LLAMA = parsed("""
{model_type: bpe, vocab_size: 700, byte_fallback: true, split_digits: true, add_dummy_prefix: true,
 allow_whitespace_only_pieces: true, remove_extra_whitespaces: false, normalization_rule_name: identity,
 character_coverage: 0.9995, num_threads: 1, minloglevel: 2}
""")
"""The trainer_spec and normalizer_spec of Llama's and Mistral's tokenizer.model."""


def spm(folder, settings):
    folder.mkdir(parents=True, exist_ok=True)
    sentences = (line for text in GENERAL for line in text.splitlines() if line.strip())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_prefix=str(folder / "tokenizer"), **settings
    )
    (folder / "tokenizer.vocab").unlink()
    return folder / "tokenizer.model"


def llama_folder(folder):
    """A model folder as Llama 2's and Mistral's: tokenizer.model, tokenizer_config.json,
    config.json, weights.
    """
    spm(folder, LLAMA)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False})
    )
    tiny_model("llama", vocab_size=700).save_pretrained(folder)
    return folder


def folder_trained_here(folder):
    load_tokenizer(
        train_sentencepiece(GENERAL, 700, folder / "trained")
    ).save_pretrained(folder)
    tiny_model("llama", vocab_size=700).save_pretrained(folder)
    return folder


def byte_level_folder(folder, **model):
    """A model like GPT-2, Llama 3 and SmolLM: byte-level BPE, tied head. `model`:
    changes of its config."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(GENERAL, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>"
    ).save_pretrained(folder)
    tiny_model(
        "llama", **{"vocab_size": 640, "tie_word_embeddings": True, **model}
    ).save_pretrained(folder)
    return folder


def domain(folder):
    path = folder / "domain.jsonl"
    path.write_text(json_lines(DOMAIN))
    return load_corpus([str(path)], flag="--corpus")


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "make_folder", [llama_folder, folder_trained_here, byte_level_folder]
)
def test_an_extended_model(tmp_path, make_folder):
    folder = make_folder(tmp_path / "model")
    out = tmp_path / "extended"
    written, measured = extend_vocabulary(folder, domain(tmp_path), 150, out)
    size = sum(len(text.encode()) for text in DOMAIN)
    assert f"tokens per byte, on {size:,} bytes of the corpus: " in measured
    change = re.search(r"\((-[0-9.]+)%\)$", measured)
    assert float(change[1]) < -7

    old = AutoTokenizer.from_pretrained(folder)
    new = AutoTokenizer.from_pretrained(out)
    extension = read_json(out / EXTENSION_JSON)
    first = extension["first_row"]
    pieces = extension["pieces"]
    assert len(pieces) == 150
    assert new.convert_tokens_to_ids(pieces) == list(range(first, first + 150))
    assert {
        token: new.get_vocab()[token] for token in old.get_vocab()
    } == old.get_vocab()
    used = set()
    for text in [
        *(PLAIN if make_folder is llama_folder else PROBES),
        *DOMAIN,
        *GENERAL[:20],
    ]:
        assert new.decode(ids(new, text)) == text == old.decode(ids(old, text)), text
        assert len(ids(new, text)) <= len(ids(old, text))
        used |= set(ids(new, text))
    assert len(used & set(range(first, first + 150))) > 75
    assert not list(out.glob("*.model")), "that is the old vocabulary"

    before, after = (
        AutoModelForCausalLM.from_pretrained(path) for path in (folder, out)
    )
    rows = after.get_input_embeddings().num_embeddings
    assert written.endswith(
        f"150 new tokens, {before.get_input_embeddings().num_embeddings:,} -> {rows:,} rows"
    )
    assert rows % 64 == 0
    assert first + 150 <= rows < max(first + 150, 640) + 64
    tied = before.config.tie_word_embeddings
    assert (
        tied
        == (make_folder is byte_level_folder)
        == (after.lm_head.weight is after.get_input_embeddings().weight)
    )
    for name, weight in after.state_dict().items():
        was = before.state_dict()[name]
        assert torch.equal(
            weight[: min(first, len(was))], was[: min(first, len(was))]
        ), name
        if len(weight) == rows:
            old_ids = [
                token.id for token in old.backend_tokenizer.model.tokenize(pieces[40])
            ]
            assert len(old_ids) > 1
            assert torch.allclose(weight[first + 40], was[old_ids].mean(dim=0))


def test_what_cannot_be_extended_is_refused(tmp_path, out):
    folder = byte_level_folder(tmp_path / "model")
    few = tmp_path / "few.txt"
    few.write_text("some few words of text, some words\n" * 3)
    with user_error(r"--pieces 5000: the corpus yields only \d+ tokens"):
        extend_vocabulary(folder, load_corpus([str(few)], flag="--corpus"), 5000, out)
    unigram = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)]))
    )
    unigram.save_pretrained(folder)
    texts = SimpleNamespace(texts=lambda: pytest.fail("the corpus was read"))
    with user_error(
        "only BPE vocabularies can be extended, and this is a Unigram tokenizer"
    ):
        extend_vocabulary(folder, cast(Any, texts), 1, out)
    assert not out.exists()


class Letters:
    """A tokenizer with a token a letter, which loses the letters of `lost`."""

    def __init__(self, lost=""):
        self.lost = lost

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {
            "input_ids": [ord(letter) for letter in text if letter not in self.lost]
        }

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_a_text_that_only_the_old_tokenizer_keeps_is_an_error():
    full = Letters()
    lossy = Letters("é")
    worse = Letters("éa")
    compare = vocabulary.compare_tokenizers
    assert compare(full, full, ["aé", "b"]) == (3 / 4, 3 / 4, 4)
    assert compare(lossy, worse, ["aé", "b"]) == (2 / 4, 1 / 4, 4), (
        "the old one has lost of it too"
    )
    with pytest.raises(RunError, match="does not decode to the same text: 'aé'"):
        compare(full, lossy, ["b", "aé"])


# -- rows ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored, new, expected", [(640, 40, 640), (640, 41, 704), (700, 10, 704)]
)
def test_rows_are_a_multiple_of_64_and_never_fewer_than_before(
    tmp_path, stored, new, expected
):
    """The tokenizer has 600 tokens."""
    folder = byte_level_folder(tmp_path / "model", vocab_size=stored)
    lines = extend_vocabulary(folder, domain(tmp_path), new, tmp_path / "out")
    assert f": {new} new tokens, {stored} -> {expected} rows" in lines[0]
    assert first_new_row(tmp_path / "out") == 600
    assert read_json(tmp_path / "out/config.json")["vocab_size"] == expected


def extension_of(folder):
    return Extension(folder, ("ab", "abc"), 6, ((0, 1), (0, 1, 2)))


def test_new_rows_are_means_of_the_rows_that_they_replace(tmp_path):
    """Rows 6 and 7 of the table have no token, and count for no mean."""
    table = torch.arange(24.0).view(8, 3).square().bfloat16()
    table[6:] = 1e6
    result = extended_table(table, extension_of(tmp_path), 10)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result[:6], table[:6])
    for row, old in ((6, [0, 1]), (7, [0, 1, 2]), (8, range(6)), (9, range(6))):
        assert torch.equal(
            result[row], table[list(old)].float().mean(dim=0).bfloat16()
        ), row
    bias = torch.arange(8.0)
    assert extended_table(bias, extension_of(tmp_path), 9).tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        0.5,
        1,
        2.5,
    ]


def test_each_tensor_keeps_its_dtype_and_the_config_the_embeddings(tmp_path, out):
    """The config may contain the text model's own config, and the head may have a
    bias."""
    folder = tmp_path / "model"
    out.mkdir()
    settings = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(
        "phi", **settings, num_attention_heads=2, bos_token_id=1, eos_token_id=2
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        folder
    )
    base = BaseCheckpoint.open(folder)
    keys, rows = vocabulary.vocabulary_keys(base, config, False)
    assert (keys, rows) == (
        {"model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"},
        8,
    )
    written = read_json(folder / "config.json")
    (folder / "config.json").write_text(
        json.dumps({"text_config": written, "dtype": "float32", "vocab_size": 3})
    )
    tokenizer_folder = tmp_path / "tokenizer"
    tokenizer_folder.mkdir()
    (tokenizer_folder / "tokenizer.json").write_text("{}")
    vocabulary.write_extended(base, out, keys, extension_of(tokenizer_folder), 64)
    changed = read_json(out / "config.json")
    assert changed["text_config"]["vocab_size"] == 64
    assert changed["vocab_size"] == 3
    assert changed["dtype"] == changed["text_config"]["dtype"] == "bfloat16"
    assert (out / "tokenizer.json").read_text() == "{}"
    extended = BaseCheckpoint.open(out)
    for key in base.keys():  # noqa: SIM118  (no mapping)
        shape, dtype = base.shape_dtype(key)
        assert extended.shape_dtype(key) == (
            (64, *shape[1:]) if key in keys else shape,
            dtype,
        )
    assert torch.equal(
        extended.read("lm_head.bias")[6],
        base.read("lm_head.bias")[:2].float().mean().bfloat16(),
    )


def test_a_copy_of_a_tied_head_grows_too(tmp_path):
    """Files may hold lm_head.weight though it is tied."""
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    save_file(
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    keys, rows = vocabulary.vocabulary_keys(
        BaseCheckpoint.open(tmp_path), model.config, False
    )
    assert (keys, rows) == ({"model.embed_tokens.weight", "lm_head.weight"}, 128)


def test_vocabularies_that_cannot_grow_are_refused(tmp_path, monkeypatch):
    small = byte_level_folder(tmp_path / "small", vocab_size=599)
    with user_error("the tokenizer does not fit the model"):
        extend_vocabulary(small, domain(tmp_path), 10, tmp_path / "out")
    make = vocabulary.make_model
    folder = byte_level_folder(tmp_path / "model")
    config = (folder / "config.json").read_text()
    change_json(
        folder / "config.json",
        lambda content: content.update(quantization_config={"quant_method": "fp8"}),
    )
    with user_error("MODEL: .*model has quantized weights; give the unquantized model"):
        extend_vocabulary(folder, domain(tmp_path), 10, tmp_path / "out")
    (folder / "config.json").write_text(config)
    for name, module, words in (
        ("lm_head", torch.nn.Linear(32, 641), r"\(the head\)"),
        ("by_token", torch.nn.Embedding(640, 4), r"\(by_token\)"),
        (
            "model.embed_tokens",
            torch.nn.EmbeddingBag(640, 32),
            "a EmbeddingBag and a Linear",
        ),
        ("lm_head", torch.nn.LayerNorm(1), "a Embedding and a LayerNorm"),
    ):

        def changed(*arguments, name=name, module=module, **more):
            model = make(*arguments, **more)
            model.set_submodule(name, module)
            return model

        monkeypatch.setattr(vocabulary, "make_model", changed)
        with user_error(words):
            extend_vocabulary(folder, domain(tmp_path), 10, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_embeddings_that_are_scaled_when_they_are_read_can_grow():
    """Gemma's: their rows are only averaged and copied."""
    model = tiny_model("gemma2")
    assert type(model.get_input_embeddings()).forward is not torch.nn.Embedding.forward
    assert vocabulary.embedding_and_head(model)[0].num_embeddings == 128


def test_the_record_of_new_rows_is_checked(tmp_path):
    with user_error("was not written by mora-ds extend-vocab"):
        first_new_row(tmp_path)
    for content, words in (
        ('{"format": 2, "first_row": 3}', "has format 2"),
        ('{"format": 6}', "is damaged"),
        ('{"format": 6, "first_row": "x"}', "is damaged"),
    ):
        (tmp_path / EXTENSION_JSON).write_text(content)
        with user_error(f"{EXTENSION_JSON} {words}"):
            first_new_row(tmp_path)
