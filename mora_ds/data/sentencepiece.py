"""SentencePiece models: trained, and turned into transformers tokenizers of the same
ids.

    texts -> runs of lines -> SentencePiece's trainer -> tokenizer.model
    the model -> tokenizers.Tokenizer -> PreTrainedTokenizerFast -> tokenizer.json

The wrapped tokenizer repeats what SentencePiece does, stage by stage:

    normalise    spaces -> U+2581
    merge        every pair that makes a token, ranked by the token's score
    fall back    characters that are not in the vocabulary become their UTF-8 bytes

Documents are plain text: "</s>" in a document is four characters, as in SentencePiece,
not the end-of-text token. (SentencePiece calls the entries of a vocabulary pieces; so
do the fields of its protocol buffers.)
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
"""Of a larger corpus a fixed random sample of about this size is trained on."""

_NORMAL = 1
"""The type of the pieces that text can become, bytes apart."""

_CANDIDATES_A_TOKEN = 4
"""Many candidates are old tokens, or more than one word for the tokenizer."""


def train_sentencepiece(texts: Iterable[str], vocab_size: int, folder: Path) -> Path:
    """Train a SentencePiece model (BPE) on `texts`, and write it into `folder`: as
    tokenizer.model, and as a transformers tokenizer with the same ids. Returns the
    folder.

    The same texts give the same files. Raises `UserError` where the corpus does not
    yield that many tokens.
    """
    model = _trained(texts, vocab_size, "--train_tokenizer_vocab")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL_FILE).write_bytes(model)
    _as_transformers(_parsed(model)).save_pretrained(folder)
    return folder


def candidate_tokens(texts: Iterable[str], wanted: int) -> list[str]:
    """Candidates for `wanted` new tokens: what text can become of the vocabulary of a
    SentencePiece model trained on `texts`, the best-scored first. Spaces are U+2581;
    digits stay apart. Raises `UserError` for a corpus without text."""
    size = 512 + _CANDIDATES_A_TOKEN * wanted
    model = _trained(texts, size, "--pieces", hard_vocab_limit=False, split_digits=True)
    pieces = _parsed(model).pieces
    normal = [piece for piece in pieces if piece.type == _NORMAL]
    return [piece.piece for piece in sorted(normal, key=lambda piece: -piece.score)]


def _trained(
    texts: Iterable[str], vocab_size: int, flag: str, **settings: Any
) -> bytes:
    """The trained model. Nothing is normalised (indentation, tabs and line ends are
    tokens like any other), and characters that are not in the vocabulary fall back to
    bytes, so decoding gives back every text."""
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
            # Sums of floats over threads would make the result depend on their number.
            num_threads=1,
            minloglevel=2,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            **settings,
        )
    # ValueError: for a number beyond 31 bits.
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{flag} {vocab_size}: SentencePiece cannot train on this text: {error}"
        ) from error
    return model.getvalue()


def _parsed(model: bytes) -> Any:
    return sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]  # made at import


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Runs of lines of up to about `_LINE_BYTES`: the trainer would drop far longer
    ones."""
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
    """A tokenizer that stays the same when it is saved and loaded. BOS is put before
    texts."""
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
    """A BPE model with the same merges: SentencePiece joins the two neighbours whose
    union scores best, however the union is split. Only normal tokens merge."""
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
