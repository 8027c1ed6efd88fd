"""Text files -> a prepared folder: filtered, without duplicates, split and tokenised. One pass, for any size of corpus.

    documents -> batches -> (workers: tokens, hash, signature, scripts) -> in order: keep or drop, train or held out

Memory: a few batches a process; 32 bytes a document for exact duplicates (about 100 with Python's own), and about 5 KB
a document for near ones. Tokens and text are written to disk as they come, those of a long document chunk by chunk.
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

from mora_ds.common.errors import UserError
from mora_ds.common.files import atomic_folder
from mora_ds.data.cache import cache_settings, processes_for
from mora_ds.data.corpus import Corpus
from mora_ds.data.dedup import CanonicalHash, NearDuplicates, canonical_digest, is_held_out, signature
from mora_ds.data.prepared import HELD_OUT, PREPARED_JSON, TRAIN
from mora_ds.data.readers import Document, batched
from mora_ds.data.split_writer import SplitWriter
from mora_ds.data.tokenizer import AUTO, Encoder
from mora_ds.data.workers import ordered_map


@dataclass(frozen=True)
class Filters:
    """Which documents are kept, and how many are held out. Raises `UserError` for limits that make no sense."""

    min_characters: int = 1
    max_characters: int = 0
    """0 for no limit."""
    near_duplicates: float = 0.8
    """Similarity to an earlier document from which on a document is dropped; 0 drops exact duplicates only."""
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
    """The size of one split. `tokens` are those of the text, without BOS and EOS."""

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
    """Reason ("too short", "too long", "exact duplicate", "near duplicate") -> number of documents."""
    splits: dict[str, SplitReport] = field(default_factory=lambda: {TRAIN: SplitReport(), HELD_OUT: SplitReport()})
    scripts: Counter[str] = field(default_factory=Counter)
    """Letters of each script in the documents that were kept."""

    def to_dict(self) -> dict[str, Any]:
        splits = {name: {**asdict(each), "tokens_per_byte": each.tokens_per_byte} for name, each in self.splits.items()}
        dropped, scripts = dict(self.dropped.most_common()), dict(self.scripts.most_common())
        return {"read": self.read, "dropped": dropped, "splits": splits, "scripts": scripts}

    def lines(self) -> list[str]:
        """The report as text."""
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
    document_start: str = AUTO,
) -> PreparationReport:
    """Writes the folder `output`, completely or not at all; what was there is replaced.

    The first of several equal documents is kept; which side it is on depends on its text alone (`is_held_out`).
    The same files give the same bytes, however many processes read them. Raises `UserError` for a file that cannot be
    read (naming the record), a corpus of which nothing is left, and where `datasketch` is missing; `RunError` for a
    full disk.
    """
    encoder = Encoder.of(tokenizer, document_start)
    selection = _Selection(filters)
    worker = _Worker(encoder, filters.near_duplicates > 0, filters.held_out_percent)
    num_proc = processes_for(corpus, tokenizer, num_proc)
    with atomic_folder(output.absolute()) as folder, SplitWriter(folder, encoder.dtype) as writer:
        with tqdm(desc="preparing", total=corpus.size_bytes(), unit="B", unit_scale=True, disable=not progress) as bar:
            batches = batched(_documents(corpus, bar), lambda document: len(document.text))
            for batch in ordered_map(worker, batches, num_proc):
                for chunk in batch:
                    writer.add(chunk.tokens, chunk.text)
                    if (document := selection.complete(chunk)) is not None:
                        writer.end_document(selection.split_of(document))
        report = selection.report
        if not report.splits[TRAIN].documents:
            raise UserError(f"{corpus.flag}: nothing is left to train on: {report.lines()[0]}")
        special = 1 if encoder.start_id is None else 2
        for name, each in report.splits.items():
            each.tokens = writer.splits[name].tokens - special * each.documents
        settings = cache_settings(corpus.text_column, encoder)
        keys = writer.seal(settings, asdict(filters))
        content = {"format": 1, "splits": keys, "settings": {**settings, **asdict(filters)}, "report": report.to_dict()}
        (folder / PREPARED_JSON).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return report


def _documents(corpus: Corpus, bar: tqdm) -> Iterator[Document]:
    """All documents. The progress bar counts the bytes of the files, which it takes from the characters read."""
    for part in corpus.parts:
        left = part.size_bytes()
        for document in corpus.documents_of(part):
            yield document
            size = min(len(document.text), left)
            bar.update(size)
            left -= size
        bar.update(left)


# -- in the worker processes ---------------------------------------------------------------------------------------
@dataclass
class _Chunk:
    """A document, or a chunk of one, with what a worker has computed of it."""

    text: str
    """Only where it may have to be written or hashed: of held-out documents, and of chunks."""
    begins: bool
    ends: bool
    tokens: np.ndarray
    digest: bytes
    signature: np.ndarray | None
    characters: int
    text_bytes: int
    scripts: Counter[str]

    def join(self, chunk: _Chunk) -> None:
        """Adds the counts of the document's next chunk."""
        if self.signature is not None and chunk.signature is not None:
            self.signature = np.minimum(self.signature, chunk.signature)
        self.characters += chunk.characters
        self.text_bytes += chunk.text_bytes
        self.scripts.update(chunk.scripts)


@dataclass(frozen=True)
class _Worker:
    """Tokenises and measures a batch of documents. Pickled to the worker processes."""

    encoder: Encoder
    near: bool
    held_out_percent: float

    def __call__(self, batch: list[Document]) -> list[_Chunk]:
        return [self._chunk(*pair) for pair in zip(batch, self.encoder.rows(batch), strict=True)]

    def _chunk(self, document: Document, tokens: np.ndarray) -> _Chunk:
        text, is_complete = document.text, document.begins and document.ends
        digest = canonical_digest(text) if is_complete else b""
        return _Chunk(
            text if not is_complete or is_held_out(digest, self.held_out_percent) else "",
            document.begins, document.ends, tokens, digest,
            signature(text) if self.near else None, len(text), len(text.encode()), count_scripts(text),
        )  # fmt: skip


def count_scripts(text: str) -> Counter[str]:
    """Script (LATIN, GREEK, CJK, HIRAGANA, ...) -> letters of it in `text`; digits, signs and spaces have none."""
    scripts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if script := _script(character):
            scripts[script] += count
    return scripts


@lru_cache(maxsize=1 << 17)
def _script(character: str) -> str:
    return unicodedata.name(character, "OTHER").split()[0].split("-")[0] if character.isalpha() else ""


# -- in the calling process ----------------------------------------------------------------------------------------
class _Selection:
    """Decides document by document, in the order of the files, what is kept and where it goes."""

    def __init__(self, filters: Filters) -> None:
        self.report = PreparationReport()
        self._filters = filters
        self._near = NearDuplicates(filters.near_duplicates) if filters.near_duplicates else None
        self._digests: set[bytes] = set()
        self._document: _Chunk | None = None
        self._canonical = CanonicalHash()

    def complete(self, chunk: _Chunk) -> _Chunk | None:
        """The document that ends with this chunk, its counts joined (its `tokens` are the first chunk's); else None."""
        if chunk.begins and chunk.ends:
            return chunk
        if chunk.begins or self._document is None:
            self._canonical, self._document = CanonicalHash(), chunk
        else:
            self._document.join(chunk)
        self._canonical.add(chunk.text)
        if chunk.ends:
            self._document.digest = self._canonical.digest()
        return self._document if chunk.ends else None

    def split_of(self, document: _Chunk) -> str | None:
        """The split that the document goes to, None where it is dropped; counted in the report."""
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

    def _objection(self, document: _Chunk) -> str | None:
        filters = self._filters
        if document.characters < max(filters.min_characters, 1):
            return "too short"
        if 0 < filters.max_characters < document.characters:
            return "too long"
        if document.digest in self._digests:
            return "exact duplicate"
        self._digests.add(document.digest)
        if self._near is not None and document.signature is not None and self._near.seen(document.signature):
            return "near duplicate"
        return None
