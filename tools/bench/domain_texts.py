"""Three domains for `bench/options.py`, out of what is installed: Python's code, C++ headers, the Unicode table."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import torch

from mora_ds.common.errors import UserError
from mora_ds.common.files import atomic_path
from mora_ds.data.demo_corpus import domain_documents, general_documents

PROSE, DOMAINS = "prose", ("code", "headers", "unicode")
TRAIN_BYTES, EVAL_BYTES = 1_200_000, 30_000
_RUN = 64
"""Code points of a document."""


def write_texts(folder: Path) -> None:
    """NAME_train.jsonl and NAME_eval.jsonl for prose and every domain; every twentieth document is evaluated on.

    Raises `UserError` where torch came without its headers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, PROSE, (each.text for each in general_documents()))
    _write(folder, "code", (each.text for each in domain_documents()))
    _write(folder, "headers", _headers())
    _write(folder, "unicode", _unicode())


def _headers() -> Iterator[str]:
    root = Path(torch.__file__).parent / "include"
    found = sorted(root.rglob("*.h"))
    if not found:
        raise UserError(f"{root}: no headers; another build of torch has them")
    for path in found:
        yield path.read_text(encoding="utf-8", errors="strict")


def _unicode() -> Iterator[str]:
    """Number, name, category and decomposition of every named character but the ideographs, which all read alike."""
    for start in range(0, 0x20000, _RUN):
        lines = []
        for point in range(start, start + _RUN):
            name = unicodedata.name(chr(point), "")
            if name and not name.startswith(("CJK", "HANGUL SYLLABLE", "TANGUT")):
                facts = (name, unicodedata.category(chr(point)), unicodedata.decomposition(chr(point)))
                lines.append(f"{point:04X};{';'.join(facts)}")
        if lines:
            yield "\n".join(lines) + "\n"


def _write(folder: Path, name: str, texts: Iterator[str]) -> None:
    left = {"train": TRAIN_BYTES, "eval": EVAL_BYTES}
    with (
        atomic_path(folder / f"{name}_train.jsonl") as train,
        atomic_path(folder / f"{name}_eval.jsonl") as held,
        train.open("w", encoding="utf-8") as train_file,
        held.open("w", encoding="utf-8") as held_file,
    ):
        files = {"train": train_file, "eval": held_file}
        for index, text in enumerate(texts):
            side, size = "eval" if index % 20 == 10 else "train", len(text.encode())
            if size <= left[side]:
                left[side] -= size
                files[side].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
