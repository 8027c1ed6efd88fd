"""The demo's corpora, from text that comes with Python, so nothing is downloaded.

    general   prose: the language reference's topics (`pydoc_data.topics`), docstrings of the standard library
    domain    code: the standard library's source files, unchanged

    a hash of a module's name decides whether it is held out of both corpora

The split is by module, because docstrings are also part of the code. The code and the
docstrings of a held-out module are only evaluated on, and paragraphs of held-out prose
are removed from the training prose. The same Python version gives the same bytes.
"""

import ast
import hashlib
import json
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mora_ds.common.errors import UserError

HELD_OUT_PERCENT = 5
_SPLIT_SALT = "4/"
"""Prefix of the hashed names, chosen so that also about 5% of the bytes are held
out."""

_SKIPPED_FOLDERS = {
    "__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib-dynload", "lib2to3",
    "pydoc_data", "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
_SKIPPED_FILES = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize")
"""Files with paths of the machine that built or packaged this Python."""

_SHORTEST_PROSE = 80
_SHORTEST_PARAGRAPH = 40
"""Minimum length, in characters, of a repeated paragraph to be removed."""


@dataclass(frozen=True)
class DemoDocument:
    """One document of a demo corpus."""

    source: str
    """Module (`json.decoder`) or topic (`topic:assert`)."""
    text: str

    @property
    def held_out(self) -> bool:
        return _hash(_SPLIT_SALT + self.source) % 100 < HELD_OUT_PERCENT


def general_documents() -> list[DemoDocument]:
    """Prose: one document for each topic of the language reference, and one for the
    docstrings of each module."""
    # Imported here: half a megabyte that only the demo needs.
    from pydoc_data.topics import topics

    prose = []
    for name, text in sorted(topics.items()):
        prose.append(DemoDocument(f"topic:{name}", text.strip() + "\n"))
    for module in library_modules():
        if module.prose:
            text = "\n\n".join(module.prose)
            prose.append(DemoDocument(module.source, text + "\n"))
    return _without_held_out_paragraphs(prose)


def domain_documents() -> list[DemoDocument]:
    """Code: one document for each source file of the standard library, unchanged."""
    return [DemoDocument(module.source, module.code) for module in library_modules()]


def write_demo_corpus(
    folder: Path, general_bytes: int, domain_bytes: int, eval_bytes: int
) -> None:
    """Write four corpora to `folder` as JSON lines ("text", "source"):
    general_train.jsonl, general_eval.jsonl, domain_train.jsonl, domain_eval.jsonl.

    Limits are in UTF-8 bytes of text per file. Raises `UserError` if this Python has no
    sources of its standard library.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents, limit in (
        ("general", general_documents(), general_bytes),
        ("domain", domain_documents(), domain_bytes),
    ):
        for side, most in (("train", limit), ("eval", eval_bytes)):
            is_eval = side == "eval"
            chosen = [
                document for document in documents if document.held_out == is_eval
            ]
            _write(folder / f"{name}_{side}.jsonl", chosen, most)


def _write(path: Path, documents: Iterable[DemoDocument], limit: int) -> None:
    """Write documents up to `limit` bytes, ordered by a hash of their names, so that
    they are an even sample. A document that would exceed the limit is skipped."""

    def order(document: DemoDocument) -> tuple[int, str]:
        return _hash(document.source), document.source

    total = 0
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for document in sorted(documents, key=order):
            size = len(document.text.encode())
            if total + size <= limit:
                record = {"text": document.text, "source": document.source}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                total += size
    if not total:
        problem = "the demo needs the sources of the standard library, which this Python lacks"
        raise UserError(f"{problem}: --train_files")


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


# -- sources of the text ---------------------------------------------------------------


@dataclass(frozen=True)
class _Module:
    source: str
    """Its dotted name."""
    code: str
    prose: tuple[str, ...]
    """Its docstrings that are prose."""


@lru_cache(maxsize=1)
def library_modules() -> tuple[_Module, ...]:
    """Every source file of the standard library that is UTF-8 and parses, by name."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = []
    for path in _source_files(root):
        try:
            text = path.read_bytes().decode()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse(text)
        # A table in another encoding, or a template.
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue
        if text.strip():
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            name = name.removesuffix(".__init__")
            modules.append(
                _Module(name, text, tuple(filter(_is_prose, docstrings_of(tree))))
            )
    return tuple(modules)


def _source_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            name
            for name in folders
            if name not in _SKIPPED_FOLDERS and not name.startswith("config-")
        )
        for name in sorted(names):
            path = Path(folder) / name
            is_source = name.endswith(".py") and not name.startswith(_SKIPPED_FILES)
            if is_source and not path.is_symlink():
                yield path


def docstrings_of(tree: ast.Module) -> list[str]:
    """The docstrings of the module and of everything defined in it, in file order,
    dedented."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, owners) and node.body]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node)) is not None]


def _is_prose(text: str) -> bool:
    """Whether a docstring is long, mostly letters, and not a doctest session."""
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return (
        len(text) >= _SHORTEST_PROSE
        and letters >= 0.8 * len(text)
        and ">>>" not in text
    )


def _without_held_out_paragraphs(documents: list[DemoDocument]) -> list[DemoDocument]:
    """Remove held-out paragraphs from the training prose, because topics quote each
    other and subclasses repeat docstrings."""
    held_out: set[str] = set()
    for document in documents:
        if document.held_out:
            held_out.update(paragraphs_of(document.text))
    cleaned = []
    for document in documents:
        if not document.held_out:
            paragraphs = document.text.split("\n\n")
            text = "\n\n".join(
                paragraph
                for paragraph in paragraphs
                if _normalized(paragraph) not in held_out
            )
            document = DemoDocument(document.source, text.strip() + "\n")
        if document.text.strip():
            cleaned.append(document)
    return cleaned


def paragraphs_of(text: str) -> list[str]:
    normalized = map(_normalized, text.split("\n\n"))
    return [
        paragraph for paragraph in normalized if len(paragraph) >= _SHORTEST_PARAGRAPH
    ]


def _normalized(paragraph: str) -> str:
    return " ".join(paragraph.split())
