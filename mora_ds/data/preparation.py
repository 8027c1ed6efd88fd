"""Text files -> a prepared folder: filtered, without duplicates, split, tokenised. One pass, any size.

    documents -> batches -> (workers: tokens, hash, signature, scripts) -> in order: keep or drop, train or held out

What is in memory at a time: a few batches a process, 32 bytes a document for exact duplicates (about 100 with Python's
own), about 5 KB a document for near ones. Tokens and text stream to disk; a document that comes in pieces is written
piece by piece and taken back when its end shows that it is not wanted.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from mora_ds.data.cache import cache_settings, processes_for
from mora_ds.data.corpus import Corpus
from mora_ds.data.dedup import Canonical, NearDuplicates, canonical_digest, is_held_out, signature
from mora_ds.data.prepared import HELD_OUT, PREPARED_JSON, TRAIN
from mora_ds.data.readers import Document
from mora_ds.data.split_writer import SplitWriter
from mora_ds.data.tokenizer import Encoder
from mora_ds.data.workers import ordered_map
from mora_ds.errors import UserError
from mora_ds.files import atomic_folder


def count_scripts(text: str) -> Counter[str]:
    """Script (LATIN, GREEK, CJK, HIRAGANA, ...) -> letters of it in `text`; digits, signs and spaces are none."""
    found: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if script := _script(character):
            found[script] += count
    return found


@lru_cache(maxsize=1 << 17)
def _script(character: str) -> str:
    return unicodedata.name(character, "OTHER").split()[0].split("-")[0] if character.isalpha() else ""


_BATCH_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class Filters:
    """Which documents are wanted, and where they go."""

    min_characters: int = 1
    max_characters: int = 0
    """0 for no limit."""
    near_duplicates: float = 0.8
    """Similarity from which on a document is dropped as one seen before; 0: only exact duplicates are."""
    held_out_percent: float = 1.0

    def __post_init__(self) -> None:
        if self.min_characters < 0 or self.max_characters < 0:
            raise UserError("--min_characters and --max_characters must not be negative")
        if 0 < self.max_characters < self.min_characters:
            raise UserError(f"--max_characters {self.max_characters} is below --min_characters {self.min_characters}")
        if not 0 <= self.held_out_percent < 100:
            raise UserError(f"--held_out must be a percentage from 0 to below 100, got {self.held_out_percent}")


@dataclass
class SplitReport:
    """What one split holds. `tokens` are those of the text, without the marks between documents."""

    documents: int = 0
    tokens: int = 0
    characters: int = 0
    text_bytes: int = 0

    @property
    def tokens_per_byte(self) -> float:
        return self.tokens / self.text_bytes if self.text_bytes else 0.0


@dataclass
class PreparationReport:
    """What became of the documents that were read."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Why -> how many: "too short", "too long", "exact duplicate", "near duplicate"."""
    splits: dict[str, SplitReport] = field(default_factory=lambda: {TRAIN: SplitReport(), HELD_OUT: SplitReport()})
    scripts: Counter[str] = field(default_factory=Counter)
    """Letters of each script in what was kept."""

    def to_dict(self) -> dict[str, Any]:
        splits = {name: {**asdict(each), "tokens_per_byte": each.tokens_per_byte} for name, each in self.splits.items()}
        dropped, scripts = dict(self.dropped.most_common()), dict(self.scripts.most_common())
        return {"read": self.read, "dropped": dropped, "splits": splits, "scripts": scripts}

    def lines(self) -> list[str]:
        """For humans."""
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())
        lines = [f"read {self.read:,} documents; dropped {dropped or 'none'}"]
        lines += [
            f"{name:<9} {each.documents:>10,} documents {each.tokens:>14,} tokens {each.text_bytes:>15,} bytes "
            f"{each.tokens_per_byte:.4f} tokens a byte"
            for name, each in self.splits.items()
        ]
        letters = sum(self.scripts.values())
        shares = [f"{script} {count / letters:.2%}" for script, count in self.scripts.most_common(8)]
        return [*lines, f"scripts   {', '.join(shares) or 'no letters'}"]


def prepare_corpus(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    filters: Filters,
    *,
    num_proc: int = 1,
    progress: bool = False,
) -> PreparationReport:
    """Writes the folder `output`, whole or not at all; what stood there is replaced.

    The first of several equal documents is kept; which side it is on is a function of its text alone (`is_held_out`).
    The same files give the same bytes, however many processes read them. Raises `UserError` for a file that cannot be
    read (naming the record), a corpus of which nothing is left, and where `datasketch` is missing; `RunError` for a
    full disk.
    """
    encoder = Encoder.of(tokenizer)
    judge = _Judge(filters)
    worker = _Worker(encoder, filters.near_duplicates > 0, filters.held_out_percent)
    num_proc = processes_for(corpus, tokenizer, num_proc)
    with atomic_folder(output.absolute()) as folder, SplitWriter(folder, encoder.dtype) as writer:
        with tqdm(desc="preparing", total=corpus.size_bytes(), unit="B", unit_scale=True, disable=not progress) as bar:
            for batch in ordered_map(worker, _batches(corpus, bar), num_proc):
                for piece in batch:
                    _take(piece, judge, writer)
        report = judge.report
        if not report.splits[TRAIN].documents:
            raise UserError(f"{corpus.flag}: nothing is left to train on: {report.lines()[0]}")
        settings = cache_settings(corpus.text_column, encoder)
        keys = {name: writer.finish(name, settings, asdict(filters)) for name in (TRAIN, HELD_OUT)}
        marks = 1 if encoder.bos_id is None else 2
        for name, each in report.splits.items():
            each.tokens = writer.splits[name].tokens - marks * each.documents
        content = {"format": 1, "splits": keys, "settings": {**settings, **asdict(filters)}, "report": report.to_dict()}
        (folder / PREPARED_JSON).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return report


def _batches(corpus: Corpus, bar: tqdm) -> Iterator[list[Document]]:
    """Documents in groups of about `_BATCH_CHARACTERS`. The bar counts the bytes of the files, roughly within each."""
    batch: list[Document] = []
    size = 0
    for part in corpus.parts:
        left = part.size_bytes()
        for document in corpus.documents_of(part):
            batch.append(document)
            size += len(document.text)
            if size >= _BATCH_CHARACTERS:
                yield batch
                bar.update(min(size, left))
                left -= min(size, left)
                batch, size = [], 0
        bar.update(left)
    if batch:
        yield batch


# -- in the workers --------------------------------------------------------------------------------------------------
@dataclass
class _Piece:
    """A document, or a piece of one, as a worker returns it."""

    text: str
    """Only where it may have to be written, or hashed on: of held-out documents and of pieces."""
    begins: bool
    ends: bool
    tokens: np.ndarray
    digest: bytes
    signature: np.ndarray | None
    characters: int
    text_bytes: int
    scripts: Counter[str]

    def join(self, piece: _Piece) -> None:
        """Counts of the document's next piece."""
        if self.signature is not None and piece.signature is not None:
            self.signature = np.minimum(self.signature, piece.signature)
        self.characters += piece.characters
        self.text_bytes += piece.text_bytes
        self.scripts.update(piece.scripts)


@dataclass(frozen=True)
class _Worker:
    """A batch of documents, read closely. Pickled to the worker processes."""

    encoder: Encoder
    near: bool
    held_out_percent: float

    def __call__(self, batch: list[Document]) -> list[_Piece]:
        return [self._piece(*pair) for pair in zip(batch, self.encoder.rows(batch), strict=True)]

    def _piece(self, document: Document, tokens: np.ndarray) -> _Piece:
        text, whole = document.text, document.begins and document.ends
        digest = canonical_digest(text) if whole else b""
        return _Piece(
            text if not whole or is_held_out(digest, self.held_out_percent) else "",
            document.begins, document.ends, tokens, digest,
            signature(text) if self.near else None, len(text), len(text.encode()), count_scripts(text),
        )  # fmt: skip


# -- in the caller's process -----------------------------------------------------------------------------------------
class _Judge:
    """Decides document by document, in the order of the files."""

    def __init__(self, filters: Filters) -> None:
        self.report = PreparationReport()
        self._filters = filters
        self._near = NearDuplicates(filters.near_duplicates) if filters.near_duplicates else None
        self._seen: set[bytes] = set()
        self._whole: _Piece | None = None
        self._canonical = Canonical()

    def add(self, piece: _Piece) -> _Piece | None:
        """Gathers a document in pieces; returns it (less its tokens) once its last one is here."""
        if piece.begins or self._whole is None:
            self._canonical, self._whole = Canonical(), piece
        else:
            self._whole.join(piece)
        self._canonical.add(piece.text)
        if not piece.ends:
            return None
        whole, self._whole = self._whole, None
        whole.digest = self._canonical.digest()
        return whole

    def split_of(self, document: _Piece) -> str | None:
        """Where it goes, None for nowhere; counted there, or under the reason."""
        self.report.read += 1
        if reason := self._objection(document):
            self.report.dropped[reason] += 1
            return None
        name = HELD_OUT if is_held_out(document.digest, self._filters.held_out_percent) else TRAIN
        split = self.report.splits[name]
        split.documents += 1
        split.characters += document.characters
        split.text_bytes += document.text_bytes
        self.report.scripts.update(document.scripts)
        return name

    def _objection(self, document: _Piece) -> str | None:
        filters = self._filters
        if document.characters < max(filters.min_characters, 1):
            return "too short"
        if 0 < filters.max_characters < document.characters:
            return "too long"
        if document.digest in self._seen:
            return "exact duplicate"
        self._seen.add(document.digest)
        if self._near is not None and document.signature is not None and self._near.seen(document.signature):
            return "near duplicate"
        return None


def _take(piece: _Piece, judge: _Judge, writer: SplitWriter) -> None:
    """A whole document is written where it belongs; pieces are, and taken back when the document's end says so."""
    if piece.begins and piece.ends:
        if (split := judge.split_of(piece)) is not None:
            writer.whole(piece.tokens, piece.text, split)
        return
    if piece.begins:
        writer.begin()
    writer.piece(piece.tokens, piece.text)
    if (document := judge.add(piece)) is not None:
        writer.end(judge.split_of(document))
