"""tools/extend_vocab.py: real SentencePiece settings, round trips, rows that start as means, heads of every kind."""

from __future__ import annotations

import argparse
import inspect
import json
import random
import subprocess
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mora_ds.common.errors import UserError
from mora_ds.data import candidate_tokens, extend_tokenizer, load_corpus, load_tokenizer
from mora_ds.data.sentencepiece import train_sentencepiece, wrap_sentencepiece
from mora_ds.models.vocabulary import EXTENSION_JSON, extend_vocabulary
from tests.helpers.models import tiny_model

GENERAL = [text.strip()[:1500] for _, text in sorted(topics.items())]
SOURCES = [Path(each.__file__ or "").read_text(encoding="utf-8") for each in (argparse, subprocess, random, inspect)]
DOMAIN = [source[start : start + 1500].strip() + "\n" for source in SOURCES for start in range(0, 30_000, 1500)]
PLAIN = ["The quick brown fox.", "two  spaces ", "def f(self):\n    return self._x\n", "naïve Ελλ 漢字 😀", "42 3.14"]
PROBES = [*PLAIN, " leading", "", " ", "  hypothetical  "]

LLAMA = {
    "model_type": "bpe", "vocab_size": 700, "byte_fallback": True, "split_digits": True, "add_dummy_prefix": True,
    "allow_whitespace_only_pieces": True, "remove_extra_whitespaces": False, "normalization_rule_name": "identity",
    "character_coverage": 0.9995, "num_threads": 1, "minloglevel": 2,
}  # fmt: skip
"""As Llama's and Mistral's tokenizer.model say of themselves (their trainer_spec and normalizer_spec)."""

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "mistral, with control symbols of its own": ("mistral", {**LLAMA, "user_defined_symbols": ["[INST]", "[/INST]"]}),
}


def spm(folder: Path, settings: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    sentences = (line for text in GENERAL for line in text.splitlines() if line.strip())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_prefix=str(folder / "tokenizer"), **settings
    )
    (folder / "tokenizer.vocab").unlink()
    return folder / "tokenizer.model"


def family_folder(folder: Path, family: str) -> Path:
    """A model folder as these families' are: tokenizer.model, tokenizer_config.json, config.json, weights."""
    model_type, settings = FAMILIES[family]
    spm(folder, settings)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False}))
    tiny_model(model_type, vocab_size=700).save_pretrained(folder)
    return folder


def byte_level_folder(folder: Path) -> Path:
    """As GPT-2's, Llama 3's and SmolLM's: byte-level BPE, tied head."""
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
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(folder)
    tiny_model("llama", vocab_size=640, tie_word_embeddings=True).save_pretrained(folder)
    return folder


def domain(folder: Path) -> Any:
    path = folder / "domain.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOMAIN))
    return load_corpus([str(path)], flag="--corpus")


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_own_models_load_and_round_trip(tmp_path: Path, family: str) -> None:
    folder = family_folder(tmp_path / "model", family)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer).__name__ == {"llama": "LlamaTokenizer", "mistral": "TokenizersBackend"}[family.split(",")[0]]
    for text in [*PLAIN, *DOMAIN[:20]]:  # (transformers' class drops a leading space; the next line's does not)
        assert ids(tokenizer, text) == processor.encode(text), text
        assert tokenizer.decode(ids(tokenizer, text)) == text
    if "user_defined_symbols" in FAMILIES[family][1]:
        text = "[INST]Go on.[/INST]"
        assert ids(tokenizer, text) == processor.encode(text)
        assert set(tokenizer.convert_tokens_to_ids(["[INST]", "[/INST]"])) < set(ids(tokenizer, text))
    wrapped = load_tokenizer(folder / "tokenizer.model")
    for text in [*PROBES, *DOMAIN[:20]]:
        assert ids(wrapped, text) == processor.encode(text), text
        assert wrapped.decode(ids(wrapped, text)) == text


@pytest.mark.parametrize("family", [*FAMILIES, "byte-level"])
def test_an_extended_model(tmp_path: Path, family: str) -> None:
    folder = tmp_path / "model"
    folder = byte_level_folder(folder) if family == "byte-level" else family_folder(folder, family)
    out = tmp_path / "extended"
    report = extend_vocabulary(folder, domain(tmp_path), 150, out)
    assert report.held_out and report.tokens_per_byte[1] < 0.93 * report.tokens_per_byte[0]

    old, new = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(out)
    extension = json.loads((out / EXTENSION_JSON).read_text())
    first, pieces = extension["first_row"], extension["pieces"]
    assert len(pieces) == 150 and new.convert_tokens_to_ids(pieces) == list(range(first, first + 150))
    assert {token: new.get_vocab()[token] for token in old.get_vocab()} == old.get_vocab()
    used = set()
    for text in [*(PROBES if family == "byte-level" else PLAIN), *DOMAIN, *GENERAL[:20]]:
        assert new.decode(ids(new, text)) == text == old.decode(ids(old, text)), text
        assert len(ids(new, text)) <= len(ids(old, text))
        used |= set(ids(new, text))
    assert len(used & set(range(first, first + 150))) > 75
    assert not list(out.glob("*.model")), "that is the old vocabulary"

    before, after = (AutoModelForCausalLM.from_pretrained(each) for each in (folder, out))
    rows = after.get_input_embeddings().num_embeddings
    assert rows == report.vocabulary[1] and rows % 64 == 0 and first + 150 <= rows < max(first + 150, 640) + 64
    tied = before.config.tie_word_embeddings
    assert tied == (family == "byte-level") == (after.lm_head.weight is after.get_input_embeddings().weight)
    for name, weight in after.state_dict().items():
        was = before.state_dict()[name]
        assert torch.equal(weight[: min(first, len(was))], was[: min(first, len(was))]), name
        if len(weight) == rows:
            for row, piece in enumerate(pieces[:40], start=first):
                old_ids = [token.id for token in old.backend_tokenizer.model.tokenize(piece)]
                assert len(old_ids) > 1 and torch.allclose(weight[row], was[old_ids].mean(dim=0))
            mean = was[:first].mean(dim=0)
            assert torch.allclose(
                weight[max(first + 150, len(was)) :], mean.expand(rows, -1)[max(first + 150, len(was)) :]
            )


def test_text_without_new_pieces_keeps_its_logits(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "model")
    extend_vocabulary(folder, domain(tmp_path), 40, tmp_path / "out")
    before, after = (AutoModelForCausalLM.from_pretrained(each) for each in (folder, tmp_path / "out"))
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(before(tokens).logits[..., :560], after(tokens).logits[..., :560])


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_sentencepiece_models_trained_here(tmp_path: Path, algorithm: str) -> None:
    """Both algorithms, wrapped: they round-trip, grow, and are the same after saving and loading."""
    path = train_sentencepiece(GENERAL, 600, tmp_path / "spm", algorithm=algorithm)
    old = wrap_sentencepiece(path)
    candidates = candidate_tokens(DOMAIN, 80, algorithm)
    (tmp_path / "out").mkdir()
    extension = extend_tokenizer(old, candidates, 80, tmp_path / "out")
    new = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert extension.first_id == 600 and len(new) == 680
    lengths = [[len(ids(each, text)) for each in (old, new)] for text in DOMAIN]
    assert sum(after for _, after in lengths) < 0.97 * sum(before for before, _ in lengths)
    for text in [*PROBES, *DOMAIN[:20]]:
        assert new.decode(ids(new, text)) == text == old.decode(ids(old, text))


def test_what_cannot_be_extended_is_refused(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "model")
    out = tmp_path / "out"
    few = tmp_path / "few.txt"
    few.write_text("some few words of text, some words\n" * 3)
    with pytest.raises(UserError, match=r"--pieces 5000: the corpus yields only \d+ tokens"):
        extend_vocabulary(folder, load_corpus([str(few)], flag="--corpus"), 5000, out)
    with pytest.raises(UserError, match="--pieces must be at least 1"):
        extend_vocabulary(folder, domain(tmp_path), 0, out)
    assert not out.exists()


class NoHead(torch.nn.Module):
    """Stands in for a head that is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))


def test_a_head_neither_tied_nor_linear_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = family_folder(tmp_path / "model", "llama")
    kind = type(tiny_model("llama"))
    for head, words in ((None, "it has none"), (NoHead(), "it is a NoHead")):
        monkeypatch.setattr(kind, "get_output_embeddings", lambda self, head=head: head)
        with pytest.raises(UserError, match=f"neither tied to the embeddings nor a linear layer .{words}"):
            extend_vocabulary(folder, domain(tmp_path), 10, tmp_path / "out")
    assert not (tmp_path / "out").exists()
