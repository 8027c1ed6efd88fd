"""A domain's tokens, added to a tokenizer's vocabulary.

    texts -> SentencePiece (BPE) -> candidate tokens, best first
    candidate -> as the tokenizer's model spells it ("Ġterm" or "▁term") -> how the old vocabulary segments it
    a token, and the one merge that makes it of two tokens, after all older merges
    tokenizer.json rewritten -> loaded as transformers would -> every new token is matched

Old tokens keep their ids and merges. Old merges come first and text is only ever joined
further: each new token stands for two or more old ones.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

from mora_ds.common.errors import UserError
from mora_ds.common.files import JsonObject
from mora_ds.data.tokenizer import largest_id, load_as_of_model

TOKENIZER_JSON = "tokenizer.json"
_INTERMEDIATE_SHARE = 8
"""One in so many of the candidates gets an intermediate token where none is within
reach."""


@dataclass(frozen=True)
class Extension:
    """The new tokens of an extended tokenizer."""

    folder: Path
    """The extended tokenizer's files."""
    tokens: tuple[str, ...]
    """As the vocabulary spells them; the first has id `first_id`, the others follow."""
    first_id: int
    replaced: tuple[tuple[int, ...], ...]
    """The ids of the old tokens that each new one stands for."""


def bpe_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer behind `tokenizer`, whose model is BPE. Raises `UserError` for
    others."""
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, models.BPE):
        kind = type(tokenizer if backend is None else backend.model).__name__
        raise UserError(
            f"the vocabulary of a {kind} tokenizer cannot be extended, only BPE's"
        )
    return backend


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    candidates: Sequence[str],
    wanted: int,
    folder: Path,
) -> Extension:
    """Write `tokenizer`, with `wanted` of the candidates added, into `folder`, which
    must exist. Raises `UserError`, which names --pieces, where the candidates are too
    few, and for tokenizers that are not BPE."""
    backend = bpe_backend(tokenizer)
    content = json.loads(backend.to_str())
    vocabulary = tokenizer.get_vocab()
    spell = _speller(content, backend)
    spelt = dict.fromkeys(spell(candidate) for candidate in candidates)
    new = [token for token in spelt if token is not None and token not in vocabulary]
    first_id = largest_id(tokenizer)[1] + 1
    tokens = _grow(content["model"], new, wanted, first_id)
    if len(tokens) < wanted:
        raise UserError(
            f"--pieces {wanted}: the corpus yields only {len(tokens)} tokens that this tokenizer does not have; "
            "lower it, or give more text"
        )
    replaced = tuple(
        tuple(token.id for token in backend.model.tokenize(new)) for new in tokens
    )
    tokenizer.save_pretrained(folder)
    # Files of the old vocabulary, which transformers would read too.
    for pattern in ("*.model", "vocab.*", "merges.txt"):
        for stale in folder.glob(pattern):
            stale.unlink()
    text = json.dumps(content, ensure_ascii=False) + "\n"
    (folder / TOKENIZER_JSON).write_text(text, encoding="utf-8")
    return Extension(folder, tuple(tokens), first_id, replaced)


def check_extension(extension: Extension, model_type: str) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers loads it from the folder of a model of that type.
    Raises `UserError` where that is not the extended one."""
    tokenizer = load_as_of_model(extension.folder, model_type, "MODEL")
    model = tokenizer.backend_tokenizer.model
    for number, token in enumerate(extension.tokens, start=extension.first_id):
        if [match.id for match in model.tokenize(token)] != [number]:
            raise UserError(
                f"MODEL: transformers loads this tokenizer, in the folder of a {model_type!r} model, as "
                f"{type(tokenizer).__name__}, which does not know the new token {token!r}"
            )
    return tokenizer


def _speller(content: JsonObject, backend: Tokenizer) -> Callable[[str], str | None]:
    """A function from SentencePiece's spelling of a token to the vocabulary's; None for
    white space, and for what the tokenizer never treats as one word."""

    def unchanged(token: str) -> str | None:
        return token if token.strip("\u2581 \t\r\n") else None

    def byte_level(token: str) -> str | None:
        text = token.replace("\u2581", " ")
        words = backend.pre_tokenizer.pre_tokenize_str(text) if text.strip() else []
        return words[0][0] if len(words) == 1 else None

    return (
        byte_level if "ByteLevel" in json.dumps(content["pre_tokenizer"]) else unchanged
    )


def _grow(
    model: JsonObject, candidates: list[str], wanted: int, first_id: int
) -> list[str]:
    """Add tokens to the vocabulary, and to the merges the pair that each is made of.
    Returns the tokens.

    In each pass the best candidates still needed are segmented by the merges so far.
    One of two parts is one merge away and is added. Where there is none, the first two
    parts of the best candidates are joined to a token first.
    """
    vocabulary = model["vocab"]
    merges = model["merges"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
    added: list[str] = []

    def add(token: str, segments: Sequence[str] = ()) -> None:
        if token in vocabulary or len(added) == wanted:
            return
        vocabulary[token] = first_id + len(added)
        added.append(token)
        if segments:
            ranks[tuple(segments)] = len(ranks)
            merges.append(list(segments))

    while candidates and len(added) < wanted:
        before = len(added)
        window = candidates[: wanted - len(added)]
        distant: list[tuple[str, list[str]]] = []
        for token in window:
            if len(token) == 1:
                add(token)
            elif all(character in vocabulary for character in token):
                segments = _segment(token, ranks)
                if len(segments) == 2:
                    add(token, segments)
                elif len(segments) > 2:
                    distant.append((token, segments))
        if len(added) == before:
            for _, segments in distant[: 1 + len(distant) // _INTERMEDIATE_SHARE]:
                add(segments[0] + segments[1], segments[:2])
        candidates = [token for token, _ in distant] + candidates[len(window) :]
    return added


def _segment(token: str, ranks: Mapping[tuple[str, ...], int]) -> list[str]:
    """The parts that BPE makes of a token: the pair of the lowest rank is joined first,
    of two equal ones the left."""
    segments = list(token)
    while len(segments) > 1:
        pair_ranks = [ranks.get(pair) for pair in pairwise(segments)]
        known = [rank for rank in pair_ranks if rank is not None]
        if not known:
            break
        index = pair_ranks.index(min(known))
        segments[index : index + 2] = [segments[index] + segments[index + 1]]
    return segments
