"""The token cache: a corpus as one memory-mapped stream of tokens on disk.

    <cache_dir>/<key>/tokens.bin      uint16 or uint32 (N,): [BOS] document EOS [BOS] document EOS ...
    <cache_dir>/<key>/documents.bin   int64 (documents,): where each document ends in tokens.bin
    <cache_dir>/<key>/meta.json       counts, SHA-256 of the two files, the settings, of which <key> is a hash
    <cache_dir>/index/<hash>.json     a file's content hash (see `content_index`)

Of token files (`token_files`), which are read in place, there is an index (`token_index`)
instead of tokens.bin.

It is built once for each text and settings, in a temporary folder that is renamed at the
end. So a folder with a key as its name is complete. The temporary folder of a killed
builder is never read, and a later build removes it. If two processes build the same
cache, the first one to finish wins.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
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
)
from mora_ds.data.content_index import content_hashes, writable
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
"""Caches of up to this size (about a second of reading) are verified by their hash on
every open, larger ones by their size."""

_TEMPORARY = ".partial-"


@dataclass(frozen=True)
class TokenCache:
    """An open cache, memory-mapped: pages are read on first use."""

    folder: Path
    meta: JsonObject
    tokens: np.ndarray | TokensInPlace
    """(N,) ids of 16 or 32 bits"""
    ends: np.ndarray
    """(documents,) int64: document d is tokens[ends[d-1]:ends[d]]"""

    @classmethod
    def open(cls, folder: Path, members: Sequence[Any] = ()) -> TokenCache:
        """`members`: its token files, if they are read in place."""
        meta = json.loads((folder / META).read_text())
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
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        return len(self.ends)

    @property
    def eos_id(self) -> int:
        return self.meta["settings"]["eos_id"]


def build_cache(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    *,
    num_proc: int = 1,
    progress: bool = False,
    document_start: str = AUTO,
) -> TokenCache:
    """Open the token cache of a corpus in `cache_dir`; build it if it is missing.

    `num_proc`: number of tokenizing processes; does not change the result.
    `document_start`: as in `tokenizer.start_id`. Every document ends with the
    end-of-text token. A damaged cache is rebuilt, with a warning. Raises `UserError`
    for a file that cannot be read as text, an empty corpus or a tokenizer without
    end-of-text token, and `RunError` for a full disk.
    """
    encoder = Encoder.of(tokenizer, document_start)
    num_proc = _processes_for(corpus, tokenizer, num_proc)
    settings = _settings(corpus, encoder, content_hashes(corpus, cache_dir, num_proc))
    folder = cache_dir / _key(settings)
    if problem := damage(folder):
        if folder.exists():
            log.warning(
                f"the token cache {folder} is damaged: {problem}; rebuilding it"
            )
        _build(corpus, encoder, folder, settings, num_proc, progress)
    return TokenCache.open(folder, corpus.members)


def damage(folder: Path) -> str | None:
    """Verify the sizes and hashes of the cache in `folder`. Returns the problem, or
    None."""
    try:
        meta = json.loads((folder / META).read_text())
        settings = meta["settings"]
        if _key(settings) != folder.name:
            return f"{META} is not what was written"
        sizes = {DOCUMENTS: meta["documents"] * 8}
        if "dtypes" in meta:
            sizes[STARTS] = meta["documents"] * 8
        else:
            sizes[TOKENS] = meta["tokens"] * np.dtype(settings["dtype"]).itemsize
        is_hashed = sum(sizes.values()) <= HASHED_BYTES
        hashes = meta["sha256"] if is_hashed else dict.fromkeys(sizes)
        for name, size in sizes.items():
            if problem := file_problem(folder / name, size, hashes[name]):
                return problem
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return None


def _processes_for(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, num_proc: int
) -> int:
    """The number of tokenizing processes: 1 for small corpora, and for tokenizers with
    remote code, which cannot be pickled."""
    remote = type(tokenizer).__module__.startswith("transformers_modules")
    return 1 if remote or corpus.size_bytes() < PARALLEL_BYTES else max(num_proc, 1)


def _settings(corpus: Corpus, encoder: Encoder, hashes: list[str]) -> JsonObject:
    """Everything that determines the tokens of a cache. `hashes`: of the corpus's
    members."""
    return {
        "format": FORMAT,
        "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
        "bos_id": encoder.start_id,
        "eos_id": encoder.eos_id,
        "dtype": encoder.dtype,
        "text_column": corpus.text_column,
        "filter": None if corpus.keep is None else corpus.keep.identity,
        "contents": hashes,
    }


def _key(settings: JsonObject) -> str:
    """The name of the cache with these settings."""
    return json_digest(settings)[:32]


# -- building --------------------------------------------------------------------------


def _build(
    corpus: Corpus,
    encoder: Encoder,
    folder: Path,
    settings: JsonObject,
    num_proc: int,
    progress: bool,
) -> None:
    _remove_leftovers(folder.parent)
    # Not by `tempfile`, whose folders are private, because users may share a cache.
    temporary = folder.with_name(f"{folder.name}{_TEMPORARY}{uuid4().hex}")
    with writable(folder.parent):
        temporary.mkdir()
    try:
        with disk_errors(folder.parent), at_work(temporary):
            if corpus.is_tokenized:
                meta = write_index(corpus, encoder, temporary, num_proc)
            else:
                meta = _write(corpus, encoder, temporary, num_proc, progress)
            if not meta["documents"]:
                problem = "every document is empty"
                if corpus.keep is not None:
                    problem += f", or excluded by {corpus.keep}"
                raise UserError(f"{corpus.flag}: {problem}")
            content = json.dumps({**meta, "settings": settings}, indent=2)
            (temporary / META).write_text(content + "\n")
            fsync_tree(temporary)
            _move_into_place(temporary, folder)
    finally:
        # It still exists after a failure, or if another builder was faster.
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    corpus: Corpus, encoder: Encoder, folder: Path, num_proc: int, progress: bool
) -> JsonObject:
    """Write the tokens of all documents to `folder`. Returns the counts and hashes for
    meta.json."""
    with_text = (document for document in corpus if not document.is_empty)
    # None: tqdm shows the bar on a terminal only.
    hidden = None if progress else True
    documents = tqdm(with_text, "tokenizing", disable=hidden)
    batches = batched(documents, lambda document: len(document.text))
    hashes = {TOKENS: hashlib.sha256(), DOCUMENTS: hashlib.sha256()}
    n_tokens = 0
    n_documents = 0
    with (
        (folder / TOKENS).open("wb") as tokens_file,
        (folder / DOCUMENTS).open("wb") as ends_file,
    ):
        for tokens, ends in ordered_map(encoder, batches, num_proc):
            ends = ends + n_tokens
            tokens_file.write(tokens.data)
            ends_file.write(ends.data)
            hashes[TOKENS].update(tokens.data)
            hashes[DOCUMENTS].update(ends.data)
            n_tokens += len(tokens)
            n_documents += len(ends)
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
