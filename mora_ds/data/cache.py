"""The token cache: each part of a corpus as a memory-mapped stream of tokens on disk.

    <cache_dir>/<key>/tokens.bin      uint16 or uint32 (N,): [BOS] document EOS [BOS] document EOS ...
    <cache_dir>/<key>/documents.bin   int64 (documents,): where each document ends in tokens.bin
    <cache_dir>/<key>/meta.json       counts, SHA-256 of the two files, the settings, of which <key> is a hash
    <cache_dir>/index/<hash>.json     a file's content hash (see `content_index`)

Of token files (`token_files`), which are read in place, there is an index (`token_index`)
instead of tokens.bin.

A part is a file, or several small ones (`_parts`). It is built once for each text and
settings, in a temporary folder that is renamed at the end. So a folder with a key as its
name is complete: a build that is killed continues with the next part, and a file that is
added to a corpus is tokenized alone. The temporary folder of a killed builder is never
read, and a later build removes it. If two processes build the same part, the first one
to finish wins.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from mora_ds.common.errors import UserError
from mora_ds.common.files import (
    JsonObject,
    at_work,
    disk_errors,
    file_problem,
    fsync,
    fsync_tree,
    is_abandoned,
    json_digest,
    read_json,
    writable,
)
from mora_ds.data.content_index import content_hashes
from mora_ds.data.corpus import Corpus
from mora_ds.data.readers import batched
from mora_ds.data.token_files import TokenFile
from mora_ds.data.token_index import DOCUMENTS, STARTS, TokensInPlace, write_index
from mora_ds.data.tokenizer import AUTO, Encoder, tokenizer_fingerprint
from mora_ds.data.workers import ordered_map

log = logging.getLogger(__name__)

FORMAT = 2
TOKENS = "tokens.bin"
META = "meta.json"
PARALLEL_BYTES = 32_000_000
"""Smaller corpora are tokenized in this process, because starting workers takes
longer."""

HASHED_BYTES = 1 << 30
"""A cache of up to this size (about a second of reading) is verified by its hash on every
open, a larger one by its size. The parts of a corpus share it equally."""

SMALL_BYTES = 1 << 20
"""Smaller files are no part of their own: to write and open one takes longer than to
tokenize them."""

OPEN_PARTS = 1 << 13
"""Parts of all corpora that are mapped at once; Linux allows a process 65,530 mappings."""

_TEMPORARY = ".partial-"


@dataclass(frozen=True)
class TokenCache:
    """The open cache of a part, memory-mapped: pages are read on first use."""

    folder: Path
    meta: JsonObject
    tokens: np.ndarray | TokensInPlace
    """(N,) ids of 16 or 32 bits"""
    ends: np.ndarray
    """(documents,) int64: document d is tokens[ends[d-1]:ends[d]]"""

    @classmethod
    def open(cls, folder: Path, members: Sequence[Any] = ()) -> TokenCache:
        """`members`: its token files, if they are read in place."""
        meta = read_json(folder / META)
        ends = np.memmap(folder / DOCUMENTS, dtype="<i8", mode="r")
        tokens: np.ndarray | TokensInPlace
        if "dtypes" in meta:
            starts = np.memmap(folder / STARTS, dtype="<i8", mode="r")
            files = map(TokenFile.tokens, members, meta["dtypes"])
            tokens = TokensInPlace(list(files), starts, ends)
        else:
            dtype = meta["settings"]["dtype"]
            tokens = np.memmap(folder / TOKENS, dtype=dtype, mode="r")
        return cls(folder, meta, tokens, ends)

    @property
    def key(self) -> str:
        """An identity of the tokens."""
        return self.folder.name

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        return len(self.ends)

    @property
    def eos_id(self) -> int:
        return self.meta["settings"]["eos_id"]

    def window(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, ends): the tokens from `start` to `stop` or the end, and where
        documents end in them, both int64."""
        tokens = self.tokens[start:stop].astype(np.int64)
        first, last = np.searchsorted(self.ends, (start + 1, stop + 1))
        return tokens, np.asarray(self.ends[first:last], dtype=np.int64) - start


@dataclass(frozen=True, eq=False)
class JoinedCache:
    """The caches of several parts, one after another. A part is opened when it is read
    first, and may be closed again."""

    folder: Path
    """The folder of all caches."""
    key: str
    """As of the cache of a single part that has all the files."""
    parts: Sequence[_Part]
    """None of them without documents."""
    metas: Sequence[JsonObject]

    @cached_property
    def borders(self) -> np.ndarray:
        """(parts + 1,): the first token of each part, then N."""
        return np.cumsum([0, *(meta["tokens"] for meta in self.metas)])

    @property
    def n_tokens(self) -> int:
        return int(self.borders[-1])

    @property
    def n_documents(self) -> int:
        return sum(meta["documents"] for meta in self.metas)

    @property
    def eos_id(self) -> int:
        return self.metas[0]["settings"]["eos_id"]

    def window(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """As of `TokenCache`."""
        stop = min(stop, self.n_tokens)
        first = int(np.searchsorted(self.borders, start, side="right")) - 1
        last = int(np.searchsorted(self.borders, stop))
        tokens = []
        ends = []
        for number in range(first, last):
            border = int(self.borders[number])
            cache = _opened(self, number)
            part, part_ends = cache.window(max(start - border, 0), stop - border)
            tokens.append(part)
            ends.append(part_ends + max(border - start, 0))
        return np.concatenate(tokens), np.concatenate(ends)


@lru_cache(maxsize=OPEN_PARTS)
def _opened(cache: JoinedCache, number: int) -> TokenCache:
    part = cache.parts[number]
    return TokenCache.open(part.folder, part.corpus.members)


def build_cache(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    *,
    num_proc: int = 1,
    progress: bool = False,
    document_start: str = AUTO,
) -> TokenCache | JoinedCache:
    """Open the token cache of a corpus in `cache_dir`; build the parts that are missing.

    `num_proc`: number of processes that read and tokenize; does not change the result.
    `document_start`: as in `tokenizer.start_id`. Every document ends with the
    end-of-text token. A damaged part is rebuilt, with a warning. Raises `UserError`
    for a file that cannot be read as text, an empty corpus or a tokenizer without
    end-of-text token, and `RunError` for a full disk and for a process that is killed,
    with its file.
    """
    encoder = Encoder.of(tokenizer, document_start)
    hashes = content_hashes(corpus, cache_dir, num_proc)
    settings = _settings(corpus, encoder)
    parts = [
        _Part(
            replace(corpus, members=corpus.members[part]),
            {**settings, "contents": hashes[part]},
            cache_dir,
        )
        for part in _parts(corpus, hashes)
    ]
    missing = _missing(parts)
    if missing:
        _remove_leftovers(cache_dir)
        _build_all(missing, encoder, num_proc, progress)
    metas = [read_json(part.folder / META) for part in parts]
    if not any(meta["documents"] for meta in metas):
        excluded = "" if corpus.keep is None else f", or excluded by {corpus.keep}"
        raise UserError(f"{corpus.flag}: every document is empty{excluded}")
    if len(parts) == 1:
        return TokenCache.open(parts[0].folder, corpus.members)
    filled = [number for number, meta in enumerate(metas) if meta["documents"]]
    return JoinedCache(
        cache_dir,
        _key({**settings, "contents": hashes}),
        [parts[number] for number in filled],
        [metas[number] for number in filled],
    )


def damage(folder: Path, hashed_bytes: int = HASHED_BYTES) -> str | None:
    """Verify the sizes of the cache in `folder`, and its hashes if it has at most
    `hashed_bytes`. Returns the problem, or None."""
    try:
        meta = read_json(folder / META)
        settings = meta["settings"]
        if _key(settings) != folder.name:
            return f"{META} is not what was written"
        sizes = {DOCUMENTS: meta["documents"] * 8}
        if "dtypes" in meta:
            sizes[STARTS] = meta["documents"] * 8
        else:
            sizes[TOKENS] = meta["tokens"] * np.dtype(settings["dtype"]).itemsize
        is_hashed = sum(sizes.values()) <= hashed_bytes
        hashes = meta["sha256"] if is_hashed else dict.fromkeys(sizes)
        for name, size in sizes.items():
            if problem := file_problem(folder / name, size, hashes[name]):
                return problem
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return None


# -- parts -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Consecutive files of a corpus, whose tokens are in one folder."""

    corpus: Corpus
    """With these files alone."""
    settings: JsonObject
    """Everything that determines the tokens."""
    cache_dir: Path

    @cached_property
    def folder(self) -> Path:
        return self.cache_dir / _key(self.settings)


def _parts(corpus: Corpus, hashes: Sequence[str]) -> list[slice]:
    """The members of each part: a large file, or consecutive small ones up to one whose
    hash begins with 00, 256 on average. So a new file changes one part, wherever it is
    added."""
    borders = {0, len(corpus.members)}
    for number, member in enumerate(corpus.members):
        is_large = member.size_bytes() >= SMALL_BYTES
        if is_large:
            borders.add(number)
        if is_large or hashes[number].startswith("00"):
            borders.add(number + 1)
    return [slice(first, last) for first, last in pairwise(sorted(borders))]


def _settings(corpus: Corpus, encoder: Encoder) -> JsonObject:
    """Everything that determines the tokens of a cache, apart from the contents."""
    return {
        "format": FORMAT,
        "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
        "bos_id": encoder.start_id,
        "eos_id": encoder.eos_id,
        "dtype": encoder.dtype,
        "text_column": corpus.text_column,
        "filter": None if corpus.keep is None else corpus.keep.identity,
    }


def _key(settings: JsonObject) -> str:
    """The name of the cache with these settings."""
    return json_digest(settings)[:32]


def _missing(parts: Sequence[_Part]) -> list[_Part]:
    """The parts to build, each once. Damaged ones are named."""
    missing = {}
    for part in parts:
        if problem := damage(part.folder, HASHED_BYTES // len(parts)):
            missing[part.folder] = part
            if part.folder.exists():
                log.warning(
                    f"the token cache {part.folder} is damaged: {problem}; rebuilding it"
                )
    return list(missing.values())


# -- building --------------------------------------------------------------------------


def _build_all(
    missing: Sequence[_Part], encoder: Encoder, num_proc: int, progress: bool
) -> None:
    """Build all parts. Each process reads and tokenizes its own, but those that would
    take one of them longest, whose documents are split over all."""
    sizes = {part.folder: part.corpus.size_bytes() for part in missing}
    total = sum(sizes.values())
    # Tokenizers with remote code cannot be pickled
    remote = type(encoder.tokenizer).__module__.startswith("transformers_modules")
    if remote or total < PARALLEL_BYTES:
        num_proc = 1
    alone = []
    # None: tqdm shows the bar on a terminal only.
    hidden = None if progress else True
    with tqdm(desc="tokenizing", unit=" documents", disable=hidden) as bar:
        for part in missing:
            if num_proc > 1 and sizes[part.folder] * num_proc <= total:
                alone.append(part)
            else:
                _build(encoder, num_proc, bar.update, part)
        alone.sort(key=lambda part: sizes[part.folder], reverse=True)
        build = partial(_build, encoder, 1, None)
        for documents in ordered_map(build, alone, num_proc, lambda part: part.corpus):
            bar.update(documents)


def _build(
    encoder: Encoder,
    num_proc: int,
    advance: Callable[[int], object] | None,
    part: _Part,
) -> int:
    """Build the cache of a part. Returns its number of documents. `advance`: called with
    the number of documents of each batch."""
    folder = part.folder
    # Not by `tempfile`, whose folders are private, because users may share a cache.
    temporary = folder.with_name(f"{folder.name}{_TEMPORARY}{uuid4().hex}")
    with writable("--cache_dir", folder.parent):
        temporary.mkdir()
    try:
        with disk_errors(folder.parent), at_work(temporary):
            if part.corpus.is_tokenized:
                meta = write_index(part.corpus, encoder, temporary, num_proc)
            else:
                meta = _write(part.corpus, encoder, temporary, num_proc, advance)
            content = json.dumps({**meta, "settings": part.settings}, indent=2)
            (temporary / META).write_text(content + "\n")
            fsync_tree(temporary)
            _move_into_place(temporary, folder)
    finally:
        # It still exists after a failure, or if another builder was faster.
        shutil.rmtree(temporary, ignore_errors=True)
    return int(meta["documents"])


def _write(
    corpus: Corpus,
    encoder: Encoder,
    folder: Path,
    num_proc: int,
    advance: Callable[[int], object] | None,
) -> JsonObject:
    """Write the tokens of all documents to `folder`. Returns the counts and hashes for
    meta.json."""
    with_text = (document for document in corpus if not document.is_empty)
    batches = batched(with_text, lambda document: len(document.text))
    hashes = {TOKENS: hashlib.sha256(), DOCUMENTS: hashlib.sha256()}
    n_tokens = 0
    n_documents = 0
    with (
        (folder / TOKENS).open("wb") as tokens_file,
        (folder / DOCUMENTS).open("wb") as ends_file,
    ):
        for tokens, ends in ordered_map(encoder, batches, num_proc, lambda _: corpus):
            ends = ends + n_tokens
            tokens_file.write(tokens.data)
            ends_file.write(ends.data)
            hashes[TOKENS].update(tokens.data)
            hashes[DOCUMENTS].update(ends.data)
            n_tokens += len(tokens)
            n_documents += len(ends)
            if advance is not None:
                advance(len(ends))
    digests = {name: digest.hexdigest() for name, digest in hashes.items()}
    return {"tokens": n_tokens, "documents": n_documents, "sha256": digests}


def _move_into_place(temporary: Path, folder: Path) -> None:
    """Rename the new cache to `folder`. Replaces a damaged cache there, and keeps a
    valid one of a faster builder."""
    if folder.exists() and damage(folder):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if problem := damage(folder):
            raise UserError(
                f"{folder} is damaged: {problem}; delete it by hand, as it cannot be replaced: {error.strerror}"
            ) from error
    fsync(folder.parent)


def _remove_leftovers(cache_dir: Path) -> None:
    """Remove the temporary folders of killed builders, which no longer hold a file
    lock."""
    for leftover in cache_dir.glob(f"*{_TEMPORARY}*"):
        # Another builder may rename its folder at the same time.
        with suppress(FileNotFoundError):
            if is_abandoned(leftover):
                shutil.rmtree(leftover, ignore_errors=True)
