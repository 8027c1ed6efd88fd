"""A tokenizer's vocabulary, extended with pieces of a domain: what was in it stays, at its ids and with its merges.

    texts -> SentencePiece (BPE or unigram) -> candidate pieces, best first
    candidate -> as the tokenizer's model spells it ("Ġterm" or "▁term") -> how the old pieces segment it
    BPE        a piece and the one merge that makes it of two pieces, behind all older merges
    Unigram    a piece and a score just above that of the pieces it replaces
    tokenizer.json rewritten -> reloaded as transformers would -> every piece found, every text given back

So old merges come first and text is only ever joined further: each new piece stands for two or more old ones.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

from mora_ds.data.sentencepiece import train_sentencepiece
from mora_ds.data.tokenizer import largest_id, load_tokenizer
from mora_ds.errors import UserError

TOKENIZER_JSON = "tokenizer.json"
_NORMAL = 1
_CANDIDATES_A_PIECE = 4
"""Many candidates are in the old vocabulary, or cannot be spelt in one word of its."""

_STEPPING_STONES = 8
_UNIGRAM_GAIN = 0.01


@dataclass(frozen=True)
class Extension:
    """New pieces of a tokenizer."""

    folder: Path
    """The extended tokenizer's files."""
    pieces: tuple[str, ...]
    """As the vocabulary spells them; the first has id `first_id`, the others follow."""
    first_id: int
    replaced: tuple[tuple[int, ...], ...]
    """Ids of the old pieces that each new one stands for."""


def domain_pieces(texts: Iterable[str], wanted: int, algorithm: str = "bpe") -> list[str]:
    """Candidates for `wanted` new pieces: those of a SentencePiece model of its own, best first, spaces as U+2581.

    Digits stay apart. Raises `UserError` for a corpus without text.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = train_sentencepiece(
            texts,
            512 + _CANDIDATES_A_PIECE * wanted,
            Path(folder),
            algorithm=algorithm,
            flag="--pieces",
            hard_vocab_limit=False,
            split_digits=True,
        )
        proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import
        proto.ParseFromString(path.read_bytes())
    normal = [piece for piece in proto.pieces if piece.type == _NORMAL]
    return [piece.piece for piece in sorted(normal, key=lambda piece: -piece.score)]


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerBase, candidates: Sequence[str], wanted: int, folder: Path
) -> Extension:
    """Writes `tokenizer` with `wanted` of the candidates added to `folder` (which must be there).

    Raises `UserError` naming --pieces where the candidates are too few, and for tokenizers that are neither BPE nor
    Unigram.
    """
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, (models.BPE, models.Unigram)):
        kind = type(tokenizer).__name__ if backend is None else type(backend.model).__name__
        raise UserError(f"the vocabulary of a {kind} tokenizer cannot be extended, only BPE's and Unigram's")
    content = json.loads(backend.to_str())
    spell = _speller(content, backend)
    spelt = dict.fromkeys(filter(None, map(spell, candidates)))
    first_id = largest_id(tokenizer)[1] + 1
    old: models.BPE | models.Unigram = backend.model
    vocabulary = tokenizer.get_vocab()
    spelt = {piece: None for piece in spelt if piece not in vocabulary}
    grow = _grow_bpe if isinstance(old, models.BPE) else _grow_unigram
    pieces = grow(content["model"], old, list(spelt), wanted, first_id)
    if len(pieces) < wanted:
        raise UserError(
            f"--pieces {wanted}: the corpus yields only {len(pieces)} pieces that this tokenizer does not have; "
            "lower it, or give more text"
        )
    replaced = tuple(tuple(token.id for token in old.tokenize(piece)) for piece in pieces)
    tokenizer.save_pretrained(folder)
    for stale in (*folder.glob("*.model"), *folder.glob("vocab.*"), *folder.glob("merges.txt")):
        stale.unlink()  # of the old vocabulary
    (folder / TOKENIZER_JSON).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    return Extension(folder, tuple(pieces), first_id, replaced)


def check_extension(extension: Extension, model_type: str) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers loads it from beside a model of that type.

    Raises `UserError` where that is not the extended one.
    """
    config = extension.folder / "config.json"
    config.write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    try:
        tokenizer = load_tokenizer(extension.folder, flag="MODEL")
    finally:
        config.unlink()
    model = tokenizer.backend_tokenizer.model
    for number, piece in enumerate(extension.pieces, start=extension.first_id):
        if [token.id for token in model.tokenize(piece)] != [number]:
            raise UserError(
                f"MODEL: transformers loads this tokenizer, beside a {model_type!r} model, as "
                f"{type(tokenizer).__name__}, which does not find the new piece {piece!r}"
            )
    return tokenizer


# -- spelling ----------------------------------------------------------------------------------------------------------


def _speller(content: dict[str, Any], backend: Tokenizer) -> Callable[[str], str | None]:
    """SentencePiece's spelling of a piece -> the vocabulary's; None for what is never one word there, or no word."""

    def whole(piece: str) -> str | None:
        return piece if piece.strip("\u2581 \t\r\n") else None

    def byte_level(piece: str) -> str | None:
        text = piece.replace("\u2581", " ")
        words = backend.pre_tokenizer.pre_tokenize_str(text) if text.strip() else []
        return words[0][0] if len(words) == 1 else None

    return byte_level if "ByteLevel" in json.dumps(content["pre_tokenizer"]) else whole


# -- growing -----------------------------------------------------------------------------------------------------------


def _grow_bpe(model: dict[str, Any], old: Any, candidates: list[str], wanted: int, first_id: int) -> list[str]:
    """Adds pieces to the vocabulary, and to the merges the pair that each is made of; returns them.

    Pass by pass the best candidates still needed are segmented by the merges so far: one of two parts is one merge
    away. Where none is, the first two parts of the best ones become pieces first.
    """
    del old
    vocabulary, merges = model["vocab"], model["merges"]
    ranks = {tuple(pair.split(" ") if isinstance(pair, str) else pair): rank for rank, pair in enumerate(merges)}
    as_text = bool(merges) and isinstance(merges[0], str)
    added: list[str] = []

    def add(piece: str, parts: Sequence[str] = ()) -> None:
        if piece in vocabulary or len(added) == wanted:
            return
        vocabulary[piece] = first_id + len(added)
        added.append(piece)
        if parts:
            ranks[tuple(parts)] = len(ranks)
            merges.append(" ".join(parts) if as_text else list(parts))

    while candidates and len(added) < wanted:
        before, window = len(added), candidates[: wanted - len(added)]
        far: list[tuple[str, list[str]]] = []
        for piece in window:
            if len(piece) == 1:
                add(piece)
            elif all(character in vocabulary for character in piece):
                parts = _segment(piece, ranks)
                if len(parts) == 2:
                    add(piece, parts)
                elif len(parts) > 2:
                    far.append((piece, parts))
        if len(added) == before:
            for _, parts in far[: 1 + len(far) // _STEPPING_STONES]:
                add(parts[0] + parts[1], parts[:2])
        candidates = [piece for piece, _ in far] + candidates[len(window) :]
    return added


def _segment(piece: str, ranks: Mapping[tuple[str, ...], int]) -> list[str]:
    """As BPE does: the pair of the lowest rank first, the left one of two equals."""
    parts = list(piece)
    while len(parts) > 1:
        found = [ranks.get(pair) for pair in pairwise(parts)]
        known = [rank for rank in found if rank is not None]
        if not known:
            break
        place = found.index(min(known))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _grow_unigram(model: dict[str, Any], old: Any, candidates: list[str], wanted: int, first_id: int) -> list[str]:
    vocabulary = model["vocab"]
    if first_id != len(vocabulary):
        raise UserError("a Unigram vocabulary with added tokens behind it cannot be extended: its ids are places")
    scores = dict(vocabulary)
    added = []
    for piece in candidates[:wanted]:
        parts = [token.value for token in old.tokenize(piece)]
        known = [scores[part] for part in parts if part in scores]
        vocabulary.append([piece, min(sum(known) + _UNIGRAM_GAIN, 0.0)])
        added.append(piece)
    return added
