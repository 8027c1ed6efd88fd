"""Trains SentencePiece models and converts them to transformers tokenizers with the same
ids.

    texts -> groups of lines -> SentencePiece's trainer -> tokenizer.model
    the model -> tokenizers.Tokenizer -> PreTrainedTokenizerFast -> tokenizer.json

The converted tokenizer has the stages of SentencePiece:

    normalize    spaces -> U+2581
    merge        every pair that makes a token, ranked by the token's score
    fall back    characters that are not in the vocabulary become their UTF-8 bytes

Documents are plain text: "</s>" in a document is four characters, as in SentencePiece,
not the end-of-text token. (SentencePiece and its protocol buffers call the entries of a
vocabulary pieces.)
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from mora_ds.common.errors import UserError

MODEL_FILE = "tokenizer.model"
_SPECIAL_TOKENS = ("unk_token", "bos_token", "eos_token", "pad_token")
"""Ids 0 to 3 of a tokenizer trained here."""

_SPACE = "\u2581"
_LINE_BYTES = 4096
_SAMPLE_BYTES = 128 << 20
"""A larger corpus is reduced to a fixed random sample of about this size."""

_NORMAL = 1
"""The type of tokens of text, in contrast to special tokens and bytes."""

_CANDIDATES_PER_TOKEN = 4
"""More than 1, because many candidates are old tokens, or several words for the
tokenizer."""


def train_sentencepiece(texts: Iterable[str], vocab_size: int, folder: Path) -> Path:
    """Train a SentencePiece model (BPE) on `texts` and write it to `folder`, as
    tokenizer.model and as a transformers tokenizer with the same ids. Returns the
    folder.

    Deterministic. Raises `UserError` if the corpus yields fewer tokens.
    """
    model = _trained(texts, vocab_size, "--train_tokenizer_vocab")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL_FILE).write_bytes(model)
    _as_transformers(_parsed(model)).save_pretrained(folder)
    return folder


def candidate_tokens(texts: Iterable[str], wanted: int) -> list[str]:
    """Candidates for `wanted` new tokens: the normal tokens of a SentencePiece model
    trained on `texts`, best score first. Spaces are U+2581; digits are separate tokens.
    Raises `UserError` for a corpus without text."""
    size = 512 + _CANDIDATES_PER_TOKEN * wanted
    model = _trained(texts, size, "--pieces", hard_vocab_limit=False, split_digits=True)
    pieces = _parsed(model).pieces
    normal = [piece for piece in pieces if piece.type == _NORMAL]
    return [piece.piece for piece in sorted(normal, key=lambda piece: -piece.score)]


def _trained(
    texts: Iterable[str], vocab_size: int, flag: str, **settings: Any
) -> bytes:
    """Train a model and return its file. Text is not normalized (indentation, tabs and
    line ends are kept), and unknown characters fall back to bytes, so decoding restores
    every text."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            max_sentence_length=4 * _LINE_BYTES,
            input_sentence_size=max(_SAMPLE_BYTES // _LINE_BYTES, 101),
            shuffle_input_sentence=False,
            # With threads the float sums would depend on their number.
            num_threads=1,
            minloglevel=2,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            **settings,
        )
    # ValueError: a number beyond 31 bits.
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{flag} {vocab_size}: SentencePiece cannot train on this text: {error}"
        ) from error
    return model.getvalue()


def _parsed(model: bytes) -> Any:
    return sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]  # made at import


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Groups of lines of up to about `_LINE_BYTES`, because the trainer drops far longer
    sentences."""
    for text in texts:
        start = 0
        while start < len(text):
            end = start + _LINE_BYTES
            if end < len(text):
                end = text.rfind("\n", start, end) + 1 or end
            sentence = text[start:end]
            if sentence.strip("\r\n"):
                yield sentence
            start = end


# -- the model as a transformers tokenizer ---------------------------------------------


def _as_transformers(proto: Any) -> PreTrainedTokenizerFast:
    """The model as a transformers tokenizer, which saving and loading does not change.
    It puts BOS before texts."""
    tokenizer = Tokenizer(_bpe_model(proto))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokens = [piece.piece for piece in proto.pieces[: len(_SPECIAL_TOKENS)]]
    names = dict(zip(_SPECIAL_TOKENS, tokens, strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in tokens]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        add_bos_token=True,
        add_eos_token=False,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        **names,
    )


def _bpe_model(proto: Any) -> models.BPE:
    """A BPE model with the same merges: SentencePiece joins the two neighbors whose
    union has the best score, however the union is split. Only normal tokens merge."""
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    scores = {
        piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL
    }
    return models.BPE(
        vocab=ids,
        merges=generate_merges({token: ids[token] for token in scores}, scores),
        unk_token=proto.pieces[0].piece,
        fuse_unk=True,
        byte_fallback=True,
    )
