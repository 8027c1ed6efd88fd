"""Adds tokens of a domain to a tokenizer's vocabulary.

    texts -> SentencePiece (BPE) -> candidate tokens, best first
    candidate -> spelling of the tokenizer's model ("Ġterm" or "▁term") -> segmentation by the old vocabulary
    new token + one merge of two tokens that gives it, appended to the old merges
    rewritten tokenizer.json -> loaded as transformers loads it -> check that every new token is matched

Old tokens keep their ids and merges. Old merges have priority, so each new token replaces
two or more old ones.
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
_JOIN_DIVISOR = 8
"""If no candidate is one merge away, one of this many candidates gets an intermediate
token."""


@dataclass(frozen=True)
class Extension:
    """The new tokens of an extended tokenizer."""

    folder: Path
    """The extended tokenizer's files."""
    tokens: tuple[str, ...]
    """In the spelling of the vocabulary, with consecutive ids from `first_id` on."""
    first_id: int
    replaced: tuple[tuple[int, ...], ...]
    """For each new token the ids of the old tokens that it replaces."""


def bpe_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The `tokenizers.Tokenizer` of a BPE tokenizer. Raises `UserError` for other
    models."""
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, models.BPE):
        kind = type(tokenizer if backend is None else backend.model).__name__
        raise UserError(
            f"only BPE vocabularies can be extended, and this is a {kind} tokenizer"
        )
    return backend


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    candidates: Sequence[str],
    wanted: int,
    folder: Path,
) -> Extension:
    """Add `wanted` of the candidates to `tokenizer` and write it to `folder`, which must
    exist. Raises `UserError` that names --pieces if there are too few candidates, and
    for tokenizers other than BPE."""
    backend = bpe_backend(tokenizer)
    content = json.loads(backend.to_str())
    vocabulary = tokenizer.get_vocab()
    spell = _spelling_function(content, backend)
    spelled = dict.fromkeys(spell(candidate) for candidate in candidates)
    new = [token for token in spelled if token is not None and token not in vocabulary]
    first_id = largest_id(tokenizer)[1] + 1
    tokens = _add_tokens(content["model"], new, wanted, first_id)
    if len(tokens) < wanted:
        raise UserError(
            f"--pieces {wanted}: the corpus yields only {len(tokens)} tokens that this tokenizer does not have; "
            "lower --pieces, or give more text"
        )
    replaced = tuple(
        tuple(token.id for token in backend.model.tokenize(new)) for new in tokens
    )
    tokenizer.save_pretrained(folder)
    # Delete files of the old vocabulary, which transformers would also read.
    for pattern in ("*.model", "vocab.*", "merges.txt"):
        for stale in folder.glob(pattern):
            stale.unlink()
    text = json.dumps(content, ensure_ascii=False) + "\n"
    (folder / TOKENIZER_JSON).write_text(text, encoding="utf-8")
    return Extension(folder, tuple(tokens), first_id, replaced)


def check_extension(extension: Extension, model_type: str) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers loads it from the folder of a model of that type.
    Raises `UserError` if it does not have the new tokens."""
    tokenizer = load_as_of_model(extension.folder, model_type, "MODEL")
    model = tokenizer.backend_tokenizer.model
    for number, token in enumerate(extension.tokens, start=extension.first_id):
        if [match.id for match in model.tokenize(token)] != [number]:
            raise UserError(
                f"MODEL: transformers loads this tokenizer, in the folder of a {model_type!r} model, as "
                f"{type(tokenizer).__name__}, which does not know the new token {token!r}"
            )
    return tokenizer


def _spelling_function(
    content: JsonObject, backend: Tokenizer
) -> Callable[[str], str | None]:
    """A function from SentencePiece's spelling of a token to the vocabulary's. It
    returns None for white space, and for text that the tokenizer splits into words."""

    def unchanged(token: str) -> str | None:
        return token if token.strip("\u2581 \t\r\n") else None

    def byte_level(token: str) -> str | None:
        text = token.replace("\u2581", " ")
        words = backend.pre_tokenizer.pre_tokenize_str(text) if text.strip() else []
        return words[0][0] if len(words) == 1 else None

    return (
        byte_level if "ByteLevel" in json.dumps(content["pre_tokenizer"]) else unchanged
    )


def _add_tokens(
    model: JsonObject, candidates: list[str], wanted: int, first_id: int
) -> list[str]:
    """Add tokens and their merges to the model in place. Returns the added tokens.

    Each pass segments the best remaining candidates by the current merges and adds
    those with two segments, which are one merge away. If there are none, it joins the
    first two segments of the best candidates to intermediate tokens.
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
            for _, segments in distant[: 1 + len(distant) // _JOIN_DIVISOR]:
                add(segments[0] + segments[1], segments[:2])
        candidates = [token for token, _ in distant] + candidates[len(window) :]
    return added


def _segment(token: str, ranks: Mapping[tuple[str, ...], int]) -> list[str]:
    """The BPE segments of a token: joins the pair of the lowest rank first, the left
    one of equal pairs."""
    segments = list(token)
    while len(segments) > 1:
        pair_ranks = [ranks.get(pair) for pair in pairwise(segments)]
        known = [rank for rank in pair_ranks if rank is not None]
        if not known:
            break
        index = pair_ranks.index(min(known))
        segments[index : index + 2] = [segments[index] + segments[index + 1]]
    return segments
