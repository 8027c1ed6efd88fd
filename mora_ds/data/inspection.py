"""Every part of a corpus read through once, before anything is tokenised: is it text, how much, and what is its hash?

<cache_dir>/index/<hash of path, size and time>.json    the answer, for as long as the file stays as it is
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from mora_ds.data.corpus import Corpus, Part
from mora_ds.data.workers import ordered_map
from mora_ds.errors import RunError, UserError
from mora_ds.files import DISK_FULL

_FORMAT = 2


@dataclass(frozen=True)
class PartFacts:
    """What reading one part of a corpus through has told."""

    content_hash: str
    documents: int
    characters: int


def inspect_parts(corpus: Corpus, cache_dir: Path, num_proc: int, progress: bool) -> list[PartFacts]:
    """Facts of every part in order: from the index where it is unchanged, and else by reading it (and so checking it).

    Raises `UserError` for the first file that is broken, and for a `cache_dir` that cannot be written to.
    """
    with writable(cache_dir):
        (cache_dir / "index").mkdir(parents=True, exist_ok=True)
    entries = [_entry(cache_dir, part, corpus.text_column) for part in corpus.parts]
    known = [_recall(entry) for entry in entries]
    unknown = [index for index, facts in enumerate(known) if facts is None]
    parts = [corpus.parts[index] for index in unknown]
    read = ordered_map(partial(_inspect, corpus), parts, min(num_proc, len(parts)))
    bar = tqdm(read, "checking files", len(parts), unit="file", disable=not (progress and parts))
    for index, facts in zip(unknown, bar, strict=True):
        known[index] = facts
        with writable(cache_dir):
            _remember(entries[index], facts)
    return [facts for facts in known if facts is not None]


def _inspect(corpus: Corpus, part: Part) -> PartFacts:
    documents = characters = 0
    for document in corpus.documents_of(part):
        documents += document.ends
        characters += len(document.text)
    return PartFacts(part.content_hash(), documents, characters)


def _entry(cache_dir: Path, part: Part, text_column: str) -> Path:
    stamp = json.dumps({"format": _FORMAT, "text_column": text_column, **part.stamp()}, sort_keys=True)
    return cache_dir / "index" / f"{hashlib.sha256(stamp.encode()).hexdigest()[:32]}.json"


def _recall(entry: Path) -> PartFacts | None:
    try:
        content = json.loads(entry.read_text())
        facts = PartFacts(**content["facts"])
    except (OSError, ValueError, TypeError, KeyError):  # not there, or not whole: then the part is read again
        return None
    return facts if content.get("seal") == _seal(facts) else None


def _remember(entry: Path, facts: PartFacts) -> None:
    """In place: half of an entry is no entry, and nothing beside it is left by a kill."""
    entry.write_text(json.dumps({"facts": asdict(facts), "seal": _seal(facts)}))


def _seal(facts: PartFacts) -> str:
    return hashlib.sha256(json.dumps(asdict(facts)).encode()).hexdigest()[:16]


@contextmanager
def writable(cache_dir: Path) -> Iterator[None]:
    """Turns a refusal to write (a read-only file system, say) into a `UserError`, a full disk into a `RunError`."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise RunError(f"the disk that holds {cache_dir} is full: {error.strerror}") from error
        raise UserError(f"--cache_dir {cache_dir} cannot be written to: {error.strerror or error}") from error
