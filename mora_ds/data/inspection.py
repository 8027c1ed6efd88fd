"""Reads every member of a corpus once before anything is tokenised: checks it, counts its characters, hashes it.

<cache_dir>/index/<hash of path, size and time>.json    the result, valid as long as the file does not change
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from mora_ds.common.errors import RunError, UserError
from mora_ds.common.files import DISK_FULL
from mora_ds.data.corpus import Corpus
from mora_ds.data.members import Member
from mora_ds.data.workers import ordered_map

_FORMAT = 2


@dataclass(frozen=True)
class MemberFacts:
    """The result of reading one member of a corpus."""

    content_hash: str
    documents: int
    characters: int


def inspect_members(corpus: Corpus, cache_dir: Path, num_proc: int, progress: bool) -> list[MemberFacts]:
    """The facts of every member, in order: from the index where the member is unchanged, otherwise by reading it.

    Raises `UserError` for the first file that is broken, and for a `cache_dir` that cannot be written to.
    """
    with writable(cache_dir):
        (cache_dir / "index").mkdir(parents=True, exist_ok=True)
    entries = [_entry(cache_dir, member, corpus.text_column) for member in corpus.members]
    known = [_recall(entry) for entry in entries]
    unknown = [index for index, facts in enumerate(known) if facts is None]
    members = [corpus.members[index] for index in unknown]
    read = ordered_map(partial(_inspect, corpus), members, min(num_proc, len(members)))
    hidden = None if progress and members else True  # None: where there is no terminal
    bar = tqdm(read, "checking files", len(members), unit="file", disable=hidden)
    for index, facts in zip(unknown, bar, strict=True):
        known[index] = facts
        with writable(cache_dir):
            _remember(entries[index], facts)
    return [facts for facts in known if facts is not None]


def _inspect(corpus: Corpus, member: Member) -> MemberFacts:
    documents = characters = 0
    for document in corpus.documents_of(member):
        documents += document.ends
        characters += len(document.text)
    return MemberFacts(member.content_hash(), documents, characters)


def _entry(cache_dir: Path, member: Member, text_column: str) -> Path:
    stamp = json.dumps({"format": _FORMAT, "text_column": text_column, **member.stamp()}, sort_keys=True)
    return cache_dir / "index" / f"{hashlib.sha256(stamp.encode()).hexdigest()[:32]}.json"


def _recall(entry: Path) -> MemberFacts | None:
    try:
        content = json.loads(entry.read_text())
        facts = MemberFacts(**content["facts"])
    except (OSError, ValueError, TypeError, KeyError):  # missing or incomplete: the member is read again
        return None
    return facts if content.get("seal") == _seal(facts) else None


def _remember(entry: Path, facts: MemberFacts) -> None:
    """Writes in place: half an entry has no valid seal, and a kill leaves no temporary file."""
    entry.write_text(json.dumps({"facts": asdict(facts), "seal": _seal(facts)}))


def _seal(facts: MemberFacts) -> str:
    return hashlib.sha256(json.dumps(asdict(facts)).encode()).hexdigest()[:16]


@contextmanager
def writable(cache_dir: Path) -> Iterator[None]:
    """Turns a full disk into a `RunError`, and any other refusal to write (a read-only disk) into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise RunError(f"the disk that holds {cache_dir} is full: {error.strerror}") from error
        raise UserError(f"--cache_dir {cache_dir} cannot be written to: {error.strerror or error}") from error
