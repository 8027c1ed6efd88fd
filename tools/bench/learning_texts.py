"""What the runs of tools/bench/learning.py start from and learn."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from mora_ds.common.files import sha256_file
from mora_ds.data import load_tokenizer, tokenizer_fingerprint
from mora_ds.models.base import BaseCheckpoint

NEW = "new"
OLD = "old"


@dataclass(frozen=True)
class Texts:
    """What the runs start from and learn: a model's folder, and files of text."""

    base: Path
    new: Path
    new_held: Path
    old: Path
    old_held: Path
    marks: dict[str, str]
    """What a run is known by, but for its flags: digests of the base with its tokenizer,
    and of the texts.
    """

    @classmethod
    def of(cls, base: Path, new: Path, new_held: Path, old: Path, old_held: Path) -> Texts:
        tokenizer = load_tokenizer(base)
        model = BaseCheckpoint.open(base).fingerprint() + tokenizer_fingerprint(tokenizer)
        contents = " ".join(map(sha256_file, (new, new_held, old, old_held)))
        marks = {"base": digest(model), "texts": digest(contents)}
        return cls(base, new, new_held, old, old_held, marks)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
