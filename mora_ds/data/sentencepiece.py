"""Trains SentencePiece models, and turns any `.model` file into a transformers tokenizer with the same ids.

    texts -> runs of lines -> SentencePiece's trainer -> tokenizer.model
    tokenizer.model -> tokenizers.Tokenizer -> PreTrainedTokenizerFast

The wrapped tokenizer repeats what SentencePiece does, stage by stage:

    normalise    the model's own character map; repeated spaces removed, a leading space added, spaces -> U+2581
    split        user-defined symbols are never split
    merge        every pair that makes a token, ranked by the token's score
    fall back    characters that are not in the vocabulary become their UTF-8 bytes

Documents are plain text: "</s>" in a document is four characters, as in SentencePiece, not the end-of-text token.
(SentencePiece calls the entries of a vocabulary pieces; so do the fields of its protocol buffers.)
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mora_ds.common.errors import UserError

MODEL_FILE = "tokenizer.model"
_SPECIAL_TOKENS = 4  # <unk> <s> </s> <pad>, ids 0 to 3 of a tokenizer trained here

_SPACE = "\u2581"
_PRIVATE_USE = 0x10F000
"""First of the private-use characters that stand for user-defined symbols while text is normalised."""

_LINE_BYTES = 4096
_SAMPLE_BYTES = 128 << 20
"""Of a larger corpus a fixed random sample of about this size is trained on."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_BPE = 2
_TEST_TEXTS = (
    "Hello world. This is a test, isn't it?",
    " one leading space",
    "  two  inner  and trailing  ",
    "def f(x):\n    if x:\n\treturn x  # tab\r\n\n\nprint(f(1))\n",
    "café naïve Ελληνικά русский 漢字 かな 한국어 العربية 😀 é \u00a0 \u2028 \ufb01",
    "0123456789 3.14e-10 [{(<a href='x'>&amp;</a>)}] foo_bar __init__ CamelCase $%^*|~`\\",
    "\n",
    "",
    " ",
)


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    folder: Path,
    *,
    flag: str = "--train_tokenizer_vocab",
    **settings: Any,
) -> Path:
    """Trains a SentencePiece model (BPE) on `texts`; returns the path `folder`/tokenizer.model.

    `settings`: further settings of SentencePiece's trainer. Nothing is normalised (indentation, tabs and line ends are
    tokens like any other), and characters that are not in the vocabulary fall back to bytes, so decoding gives back
    every text. The same texts give the same file. Raises `UserError`, which names `flag`, where the corpus does not
    yield that many tokens.
    """
    smallest = 256 + _SPECIAL_TOKENS + 1
    if vocab_size < smallest:
        raise UserError(f"{flag} must be at least {smallest} (256 bytes and the special tokens)")
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
            num_threads=1,  # sums of floats over threads would make the result depend on their number
            minloglevel=2,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            **settings,
        )
    except RuntimeError as error:
        raise _training_error(f"{flag} {vocab_size}", str(error)) from error
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MODEL_FILE
    path.write_bytes(model.getvalue())
    return path


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Runs of complete lines of up to about `_LINE_BYTES` bytes; the trainer would drop anything much longer."""
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


def _training_error(flag: str, message: str) -> UserError:
    if limit := re.search(r"too high .*<= (\d+)", message):
        return UserError(f"{flag}: the training text yields only {limit[1]} tokens; lower it, or give more text")
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(f"{flag}: the characters of the training text alone need {needed[1]} tokens; raise it")
    if "sentences_.empty()" in message:
        return UserError(f"{flag}: there is no text to train a tokenizer on (--train_files)")
    return UserError(f"{flag}: SentencePiece cannot train on this text: {message}")


# -- a .model file as a transformers tokenizer ---------------------------------------------------------------------


def wrap_sentencepiece(path: Path) -> PreTrainedTokenizerFast:
    """The SentencePiece model as a tokenizer that `save_pretrained` and `AutoTokenizer.from_pretrained` preserve.

    BOS is put before a text when the model defines one. Raises `UserError` for a file that is no model, or one whose
    ids cannot be reproduced (checked on `_TEST_TEXTS`).
    """
    proto = _read_model(path)
    tokenizer = Tokenizer(_bpe_model(proto))
    tokenizer.normalizer = _normalizer(proto)
    if symbols := _user_symbols(proto):
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, symbols))), behavior="isolated")
    tokenizer.decoder = _decoder(proto)
    special = [piece.piece for piece in proto.pieces if piece.type in (_CONTROL, _UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    names = _special_tokens(proto)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        add_bos_token="bos_token" in names,
        add_eos_token=False,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        **names,
    )
    _compare(path, proto, wrapped)
    return wrapped


def vocabulary_by_score(path: Path) -> list[str]:
    """The tokens of a SentencePiece model that text can become, the best-scored first, spaces as U+2581."""
    normal = [piece for piece in _parse(path).pieces if piece.type == _NORMAL]
    return [piece.piece for piece in sorted(normal, key=lambda piece: -piece.score)]


def _parse(path: Path) -> Any:
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import
    try:
        proto.ParseFromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise UserError(f"--tokenizer_name {path} is no SentencePiece model: {error}") from error
    return proto


def _read_model(path: Path) -> Any:
    proto = _parse(path)
    if not proto.pieces:
        raise UserError(f"--tokenizer_name {path} is no SentencePiece model: it has no vocabulary")
    odd = proto.trainer_spec.treat_whitespace_as_suffix or any(piece.type == _UNUSED for piece in proto.pieces)
    if odd or proto.trainer_spec.model_type != _BPE:
        raise _not_reproduced(path, "only BPE models without unused tokens or space suffixes are supported")
    return proto


def _not_reproduced(path: Path, why: str) -> UserError:
    return UserError(
        f"--tokenizer_name {path}: a transformers tokenizer cannot reproduce this SentencePiece model: {why}; "
        "give the folder of the tokenizer's transformers version instead"
    )


def _special_tokens(proto: Any) -> dict[str, str]:
    spec = proto.trainer_spec
    ids = {"unk_token": spec.unk_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id, "pad_token": spec.pad_id}
    return {name: proto.pieces[number].piece for name, number in ids.items() if 0 <= number < len(proto.pieces)}


def _bpe_model(proto: Any) -> models.BPE:
    """A BPE model with the same merges: SentencePiece joins the two neighbours whose union scores best, however the
    union is split. Only normal tokens merge."""
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    merges = []
    for piece, score in normal.items():
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [(-score, left, right) for left, right in halves if left in normal and right in normal]
    merges.sort(key=lambda merge: (merge[0], merge[1] + merge[2]))
    return models.BPE(
        vocab={piece.piece: number for number, piece in enumerate(proto.pieces)},
        merges=[(left, right) for _, left, right in merges],
        unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
        ignore_merges=any(piece.type == _USER_DEFINED for piece in proto.pieces),
    )


def _normalizer(proto: Any) -> normalizers.Normalizer:
    """SentencePiece's normalisation. User-defined symbols (a line end, say) pass the character map as private-use
    characters, so that it does not change them."""
    spec = proto.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        hidden = {symbol: chr(_PRIVATE_USE + number) for number, symbol in enumerate(_user_symbols(proto))}
        steps += [normalizers.Replace(symbol, stand_in) for symbol, stand_in in hidden.items()]
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
        steps += [normalizers.Replace(stand_in, symbol) for symbol, stand_in in hidden.items()]
    if spec.remove_extra_whitespaces:  # spaces only: line ends and tabs stay
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _user_symbols(proto: Any) -> list[str]:
    """User-defined symbols, the longest first, which is the order in which they are matched."""
    return sorted((piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED), key=len, reverse=True)


def _decoder(proto: Any) -> decoders.Decoder:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    spec = proto.normalizer_spec
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)


def _compare(path: Path, proto: Any, wrapped: PreTrainedTokenizerFast) -> None:
    """Raises `UserError` where the tokenizer gives other ids than SentencePiece."""
    original = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    for text in _TEST_TEXTS:
        if wrapped.encode(text, add_special_tokens=False) != original.encode(text):
            raise _not_reproduced(path, f"the ids differ on {text!r}")
