"""The token cache: a corpus as one memory-mapped stream of tokens on disk, built once for the same text and settings.

    <cache_dir>/<key>/tokens.bin      uint16 or uint32 (N,): [BOS] document EOS [BOS] document EOS ...
    <cache_dir>/<key>/documents.bin   int64 (documents,): where each document ends in tokens.bin
    <cache_dir>/<key>/meta.json       counts, SHA-256 of the two files, the settings, of which <key> is a hash
    <cache_dir>/index/<hash>.json     a file's content hash and counts (see `inspection`)

A cache is written to a temporary folder and renamed, so a folder with a key as its name is complete. A killed
builder leaves a temporary folder that nobody reads, and a later build removes it. Of two builders the first one wins.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from mora_ds.common.errors import RunError, UserError
from mora_ds.common.files import at_work, disk_errors, fsync, fsync_tree, is_abandoned, sha256_file
from mora_ds.data.corpus import Corpus
from mora_ds.data.held_out import DocumentFilter
from mora_ds.data.inspection import MemberFacts, inspect_members, writable
from mora_ds.data.readers import Document, batched
from mora_ds.data.tokenizer import AUTO, Encoder, tokenizer_fingerprint
from mora_ds.data.workers import ordered_map

log = logging.getLogger(__name__)

FORMAT = 2
TOKENS = "tokens.bin"
DOCUMENTS = "documents.bin"
META = "meta.json"
PARALLEL_BYTES = 32_000_000
"""Smaller corpora are tokenised in the calling process, as starting others would take longer."""

HASHED_BYTES = 1 << 30
"""Caches of up to this size (about a second of reading) are hashed whenever they are opened to train on."""

_TEMPORARY = ".partial-"
_STALE_S = 24 * 3600


@dataclass(frozen=True)
class TokenCache:
    """An open cache. `tokens` and `ends` are memory maps: nothing is read before it is used."""

    folder: Path
    meta: dict[str, Any]
    tokens: np.ndarray
    """(N,) uint16 or uint32"""
    ends: np.ndarray
    """(documents,) int64: document d is tokens[ends[d-1]:ends[d]]"""

    @classmethod
    def open(cls, folder: Path) -> TokenCache:
        """Raises `RunError` for a cache that is missing or damaged (`build_cache` would rebuild it)."""
        if not folder.exists():
            raise RunError(f"there is no token cache {folder}: see the error of the rank that builds it")
        if problem := damage(folder):
            raise RunError(f"the token cache {folder} is damaged: {problem}; delete that folder")
        meta = json.loads((folder / META).read_text())
        tokens = np.memmap(folder / TOKENS, dtype=meta["settings"]["dtype"], mode="r")
        ends = np.memmap(folder / DOCUMENTS, dtype="<i8", mode="r")
        return cls(folder, meta, tokens, ends)

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        return len(self.ends)

    @property
    def eos_id(self) -> int:
        return int(self.meta["settings"]["eos_id"])


def build_cache(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    *,
    num_proc: int = 1,
    is_builder: bool = True,
    barrier: Callable[[], None] = lambda: None,
    progress: bool = False,
    document_start: str = AUTO,
) -> TokenCache:
    """The corpus as tokens, from `cache_dir` or built into it.

    Call it on every rank: only the one with `is_builder` (each node's local rank 0) reads and writes; all ranks pass
    `barrier` once and then open the result. `num_proc` processes tokenise; their number does not change the result.
    `document_start`: as in `tokenizer.start_id`. Every document is followed by the end-of-text token. A damaged cache
    is rebuilt, with a warning.
    Raises `UserError` for a file that cannot be read as text (before any is tokenised), an empty corpus or a tokenizer
    without end-of-text token, and `RunError` for a full disk.
    """
    encoder = Encoder.of(tokenizer, document_start)
    num_proc = _processes_for(corpus, tokenizer, num_proc)
    if not is_builder:
        barrier()
        settings = _settings(corpus, encoder, inspect_members(corpus, cache_dir, 1, False))
        return TokenCache.open(cache_dir / _key(settings))
    try:
        facts = inspect_members(corpus, cache_dir, num_proc, progress)
        settings = _settings(corpus, encoder, facts)
        folder = cache_dir / _key(settings)
        if problem := damage(folder, contents=True):
            if folder.exists():
                log.warning(
                    "the token cache %s is damaged: %s; it is rebuilt",
                    folder,
                    problem,
                )
            _build(corpus, encoder, folder, settings, facts, num_proc, progress)
    finally:
        barrier()  # also after an error: the other ranks must not wait for ever
    return TokenCache.open(folder)


def damage(folder: Path, contents: bool = False) -> str | None:
    """What is wrong with the cache in `folder`, or None.

    Compares the sizes of the files, and with `contents`, of caches of up to `HASHED_BYTES`, their hashes too.
    """
    try:
        meta = json.loads((folder / META).read_text())
        settings = meta["settings"]
        if _key(settings) != folder.name:
            return f"{META} is not what was written"
        sizes = {TOKENS: meta["tokens"] * np.dtype(settings["dtype"]).itemsize, DOCUMENTS: meta["documents"] * 8}
        for name, size in sizes.items():
            if (folder / name).stat().st_size != size:
                return f"{name} is not {size} bytes long"
        expected = {name: meta["sha256"][name] for name in sizes}
    except FileNotFoundError as error:
        return f"there is no {error.filename}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error)
    if not contents or sum(sizes.values()) > HASHED_BYTES:
        return None
    altered = (name for name in sizes if sha256_file(folder / name) != expected[name])
    return next((f"{folder / name} is not what was written" for name in altered), None)


def _processes_for(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, num_proc: int) -> int:
    """How many processes tokenise: 1 for small corpora, and for tokenizers whose class came with the model, which
    cannot be pickled."""
    remote = type(tokenizer).__module__.startswith("transformers_modules")
    return 1 if remote or corpus.size_bytes() < PARALLEL_BYTES else max(num_proc, 1)


def _settings(corpus: Corpus, encoder: Encoder, facts: list[MemberFacts]) -> dict[str, Any]:
    """Everything that decides which tokens a cache holds."""
    return {
        "format": FORMAT,
        "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
        "bos_id": encoder.start_id,
        "eos_id": encoder.eos_id,
        "dtype": encoder.dtype,
        "text_column": corpus.text_column,
        "filter": None if corpus.keep is None else corpus.keep.identity,
        "contents": [part_facts.content_hash for part_facts in facts],
    }


def _key(settings: dict[str, Any]) -> str:
    """The name of the cache with these settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


# -- building ------------------------------------------------------------------------------------------------------


def _build(
    corpus: Corpus,
    encoder: Encoder,
    folder: Path,
    settings: dict[str, Any],
    facts: list[MemberFacts],
    num_proc: int,
    progress: bool,
) -> None:
    characters = sum(part_facts.characters for part_facts in facts)
    _check_space(folder.parent, characters, encoder.dtype)
    _remove_leftovers(folder.parent)
    with writable(folder.parent):
        temporary = _temporary(folder)
    try:
        with disk_errors(folder.parent), at_work(temporary):
            hidden = None if progress else True  # None: where there is no terminal
            bar = tqdm(
                desc="tokenising",
                total=characters,
                unit="char",
                unit_scale=True,
                disable=hidden,
            )
            counts = _write(corpus, encoder, temporary, num_proc, bar)
            if not counts["documents"]:
                raise UserError(f"{corpus.flag}: {_nothing_left(corpus.keep)}")
            documents_read = sum(part_facts.documents for part_facts in facts)
            meta = {**counts, "documents_read": documents_read, "settings": settings}
            (temporary / META).write_text(json.dumps(meta, indent=2) + "\n")
            fsync_tree(temporary)
            _move_into_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # renamed already, unless the build failed


def _nothing_left(keep: DocumentFilter | None) -> str:
    if keep is None:
        return "every document is empty"
    if keep.takes_held_out:
        return f"no document falls into --held_out_share {keep.held_out_share}: raise it"
    return (
        "no document is left to train on: all are empty, held out (--held_out_share) or in --eval_files "
        "(--exclude_eval_documents)"
    )


def _write(corpus: Corpus, encoder: Encoder, folder: Path, num_proc: int, bar: tqdm) -> dict[str, Any]:
    """Writes the tokens of all documents into `folder`; returns the counts and hashes for meta.json."""
    files = {name: (folder / name).open("wb") for name in (TOKENS, DOCUMENTS)}
    hashes = {name: hashlib.sha256() for name in files}
    total = documents = 0
    try:
        for tokens, ends in ordered_map(
            encoder,
            batched(_counted(corpus, bar), lambda document: len(document.text)),
            num_proc,
        ):
            for name, data in ((TOKENS, tokens), (DOCUMENTS, ends + total)):
                files[name].write(data.data)
                hashes[name].update(data.data)
            total += len(tokens)
            documents += len(ends)
    finally:
        bar.close()
        for file in files.values():
            file.close()
    digests = {name: digest.hexdigest() for name, digest in hashes.items()}
    return {"tokens": total, "documents": documents, "sha256": digests}


def _counted(corpus: Corpus, bar: tqdm) -> Iterator[Document]:
    """The documents of the corpus that are not empty; the progress bar counts their characters."""
    for document in corpus:
        if not document.is_empty:
            bar.update(len(document.text))
            yield document


def _check_space(cache_dir: Path, characters: int, dtype: str) -> None:
    """Raises `UserError` where the disk is too full. Text has rarely more than 6 characters a token."""
    needed = characters // 6 * np.dtype(dtype).itemsize
    free = shutil.disk_usage(cache_dir).free
    if free < needed:
        raise UserError(
            f"--cache_dir {cache_dir}: the disk has {free / 2**30:.1f} GiB left, the tokens need at least "
            f"{needed / 2**30:.1f} GiB; name a folder on a larger disk"
        )


def _temporary(folder: Path) -> Path:
    """A new folder next to the cache's. Not of `tempfile`, whose folders are private: a cache may be shared."""
    temporary = folder.with_name(f"{folder.name}{_TEMPORARY}{uuid4().hex}")
    temporary.mkdir()
    return temporary


def _move_into_place(temporary: Path, folder: Path) -> None:
    """Renames the new cache. A damaged one in its place is removed; one that another builder finished first stays."""
    if folder.exists() and damage(folder, contents=True):
        trash = _temporary(folder)
        os.replace(folder, trash / "damaged")
        shutil.rmtree(trash, ignore_errors=True)
    try:
        os.rename(temporary, folder)
    except OSError:
        if damage(folder):
            raise
    fsync(folder.parent)


def _remove_leftovers(cache_dir: Path) -> None:
    """Removes the temporary folders of killed builders: at once where the file system's locks tell that the builder is
    gone, else a day after the last write."""
    for leftover in cache_dir.glob(f"*{_TEMPORARY}*"):
        with suppress(FileNotFoundError):  # another builder finishes, and renames it, at the same time
            newest = max(path.stat().st_mtime for path in (leftover, *leftover.glob("*")))
            if is_abandoned(leftover) or newest < time.time() - _STALE_S:
                shutil.rmtree(leftover, ignore_errors=True)
