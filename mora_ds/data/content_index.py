"""The hash of every member's contents, part of a token cache's key. Hashes are cached:

<cache_dir>/index/<hash of path, size and time>.json    the hash, valid until the file changes
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from mora_ds.common.files import json_digest, writable
from mora_ds.common.untrusted import parse_json, read_text
from mora_ds.data.corpus import Corpus
from mora_ds.data.members import Member

_FORMAT = 3
_ENTRY_BYTES = 1 << 10


def content_hashes(corpus: Corpus, cache_dir: Path, threads: int) -> list[str]:
    """The hash of every member's contents, in order. Reads a member only if it is new
    or changed. Raises `UserError` for a `cache_dir` that cannot be written to."""
    with writable("--cache_dir", cache_dir):
        (cache_dir / "index").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(threads) as pool:  # hashing releases the GIL
        return list(pool.map(partial(_content_hash, cache_dir), corpus.members))


def _content_hash(cache_dir: Path, member: Member) -> str:
    stat_signature = {"format": _FORMAT, **member.stat_signature()}
    entry = cache_dir / "index" / f"{json_digest(stat_signature)[:32]}.json"
    content_hash = _read_entry(entry)
    if content_hash is None:
        content_hash = member.content_hash()
        with writable("--cache_dir", cache_dir):
            _write_entry(entry, content_hash)
    return content_hash


def _read_entry(entry: Path) -> str | None:
    try:
        content = parse_json(read_text(entry, _ENTRY_BYTES))
        content_hash: str = content["content_hash"]
        return content_hash if content["checksum"] == _checksum(content_hash) else None
    # Missing or damaged: the member is hashed again.
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write_entry(entry: Path, content_hash: str) -> None:
    """Replace the entry by a new file: an old one may be a link. Without a temporary
    file, which a kill would leave; the checksum detects an incomplete entry."""
    content = {"content_hash": content_hash, "checksum": _checksum(content_hash)}
    entry.unlink(missing_ok=True)
    # If another process is faster, its entry is the same
    with suppress(FileExistsError), entry.open("x") as file:
        file.write(json.dumps(content))


def _checksum(content_hash: str) -> str:
    return hashlib.sha256(content_hash.encode()).hexdigest()[:16]
