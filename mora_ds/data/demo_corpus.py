"""The demo's corpora: text that comes with every Python, so that nothing is downloaded.

    general   prose: the language reference's topics (`pydoc_data.topics`), docstrings of the standard library
    domain    code: the standard library's source files, unchanged

    a module -> held out or not, by a hash of its name -> the same side of both corpora

Docstrings are part of the code too, so the split is by module: the code and the
docstrings of a held-out module are evaluated on and never trained on, and paragraphs of
held-out prose are removed from the training prose. The same Python version gives the
same bytes.
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
"""Prefix of the hashed names. Of a few that were tried, this one holds out about 5% of
the bytes too."""

_SKIPPED_FOLDERS = {
    "__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib-dynload", "lib2to3",
    "pydoc_data", "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
_SKIPPED_FILES = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize")
"""Files that hold paths of the machine on which this Python was built or packaged."""

_SHORTEST_PROSE = 80
_SHORTEST_PARAGRAPH = 40
"""Characters from which on a repeated paragraph is removed."""


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
    """Prose: every topic of the language reference, and one document of docstrings for
    each module that has some."""
    # Not above: half a megabyte that only the demo needs.
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
    """Write the four corpora into `folder` as JSON lines ("text", "source"):
    general_train.jsonl, general_eval.jsonl, domain_train.jsonl, domain_eval.jsonl.

    The limits are UTF-8 bytes of text: of each training file, and of either evaluation
    file. Raises `UserError` where this Python has come without its library's sources.
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
    """Write the documents, in the order of a hash of their names, so that a limit takes
    an even sample; those that would exceed it are left out."""

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


# -- where the text comes from ---------------------------------------------------------


@dataclass(frozen=True)
class _Module:
    source: str
    """Its dotted name."""
    code: str
    prose: tuple[str, ...]
    """Those of its docstrings that are prose."""


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
        # It is a table in another encoding, or a template.
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
    """The docstrings of the module and of everything defined in it, in the order of the
    file, dedented."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, owners) and node.body]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node)) is not None]


def _is_prose(text: str) -> bool:
    """Whether a docstring is long enough, mostly letters, and no doctest session."""
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return (
        len(text) >= _SHORTEST_PROSE
        and letters >= 0.8 * len(text)
        and ">>>" not in text
    )


def _without_held_out_paragraphs(documents: list[DemoDocument]) -> list[DemoDocument]:
    """`documents` without held-out paragraphs in the training prose: topics quote each
    other, and subclasses repeat docstrings."""
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
                if _normalised(paragraph) not in held_out
            )
            document = DemoDocument(document.source, text.strip() + "\n")
        if document.text.strip():
            cleaned.append(document)
    return cleaned


def paragraphs_of(text: str) -> list[str]:
    normalised = map(_normalised, text.split("\n\n"))
    return [
        paragraph for paragraph in normalised if len(paragraph) >= _SHORTEST_PARAGRAPH
    ]


def _normalised(paragraph: str) -> str:
    return " ".join(paragraph.split())
