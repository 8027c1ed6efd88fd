"""The default corpora: text that every Python holds, so that nothing is downloaded and nothing is committed.

    general   prose: the language reference's topics (`pydoc_data.topics`), docstrings of the standard library
    domain    code: the standard library's source files as they stand

    a module -> held out or not, by a hash of its name -> the same side of both corpora

Docstrings are part of the code too. So the split is by module: the code and the docstrings of a held-out module are
only ever evaluated on, and prose that a held-out document repeats is dropped from the training prose.
The same Python gives the same bytes.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mora_ds.errors import UserError

HELD_OUT_PERCENT = 5
_SPLIT = "4/"
"""Goes before the name when sides are drawn: of a few tried, one that holds out about 5% of the bytes too."""

_SKIPPED_FOLDERS = {
    *("__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib-dynload", "lib2to3", "pydoc_data"),
    *("site-packages", "test", "tests", "turtledemo"),
}
_SKIPPED_FILES = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize")
"""Written by whoever built or packaged this Python: full of the paths of its machine."""

_SHORTEST_PROSE = 80
_REPEATED_PARAGRAPH = 40


@dataclass(frozen=True)
class EmbeddedDocument:
    source: str
    """Module (`json.decoder`) or topic (`topic:assert`)."""
    text: str

    @property
    def held_out(self) -> bool:
        return _rank(_SPLIT + self.source) % 100 < HELD_OUT_PERCENT


@dataclass(frozen=True)
class EmbeddedCorpus:
    """Where `write_embedded` has put the four files, and the bytes of text in each."""

    general_train: Path
    general_eval: Path
    domain_train: Path
    domain_eval: Path
    text_bytes: Mapping[str, int]
    """File stem -> UTF-8 bytes of its texts."""


def general_documents() -> list[EmbeddedDocument]:
    """Prose: every topic of the language reference, and one document of docstrings for each module that has some."""
    prose = [EmbeddedDocument(f"topic:{name}", text.strip() + "\n") for name, text in sorted(_topics().items())]
    for module in _modules():
        if module.prose:
            prose.append(EmbeddedDocument(module.source, "\n\n".join(module.prose) + "\n"))
    return _without_held_out_paragraphs(prose)


def domain_documents() -> list[EmbeddedDocument]:
    """Code: one document for each source file of the standard library, unchanged."""
    return [EmbeddedDocument(module.source, module.code) for module in _modules()]


def write_embedded(
    folder: Path,
    *,
    general_bytes: int | None = None,
    domain_bytes: int | None = None,
    eval_bytes: int | None = None,
) -> EmbeddedCorpus:
    """Writes the four corpora into `folder` as JSON lines ("text", "source").

    The limits are UTF-8 bytes of text: of each training file, and of either evaluation file; None for all there is.
    The order is shuffled by a hash of the names, so that a limit cuts evenly through the library.
    Raises `UserError` where this Python has come without its library's sources.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for name, documents, limit in (
        ("general", general_documents(), general_bytes),
        ("domain", domain_documents(), domain_bytes),
    ):
        for side, most in (("train", limit), ("eval", eval_bytes)):
            chosen = [document for document in documents if document.held_out == (side == "eval")]
            sizes[f"{name}_{side}"] = _write(folder / f"{name}_{side}.jsonl", chosen, most)
    return EmbeddedCorpus(text_bytes=sizes, **{name: folder / f"{name}.jsonl" for name in sizes})


def _write(path: Path, documents: Iterable[EmbeddedDocument], limit: int | None) -> int:
    """Documents in hashed order, those left out that would go over the limit; returns the bytes of text."""
    total = 0
    beside = path.with_suffix(".partial")
    with beside.open("w", encoding="utf-8", newline="\n") as stream:
        for document in sorted(documents, key=lambda document: (_rank(document.source), document.source)):
            size = len(document.text.encode())
            if limit is None or total + size <= limit:
                stream.write(json.dumps({"text": document.text, "source": document.source}, ensure_ascii=False) + "\n")
                total += size
    os.replace(beside, path)
    if not total:
        raise UserError(f"the embedded default has no document of at most {limit} bytes for {path.name}")
    return total


def _rank(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


# -- where the text comes from -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Module:
    source: str
    """Its dotted name."""
    code: str
    prose: tuple[str, ...]
    """Its docstrings, those that are prose."""


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise _no_text("pydoc_data.topics") from error
    return topics


def _no_text(what: str) -> UserError:
    return UserError(f"the embedded default needs {what}, which this Python has come without; give --train_files")


@lru_cache(maxsize=1)
def _modules() -> tuple[_Module, ...]:
    """Every source file of the standard library that is UTF-8 and parses, by module name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in _source_files(root):
        try:
            text = path.read_bytes().decode()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):  # a table in another encoding, a template: not code
            continue
        if text.strip():
            prose = tuple(filter(_is_prose, _docstrings(tree)))
            found.append(_Module(_module_name(path.relative_to(root)), text, prose))
    if not any(module.source == "ast" for module in found):
        raise _no_text("the sources of the standard library")
    return tuple(found)


def _source_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS - {name for name in folders if name.startswith("config-")})
        for name in sorted(names):
            path = Path(folder) / name
            if name.endswith(".py") and not name.startswith(_SKIPPED_FILES) and not path.is_symlink():
                yield path


def _module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _docstrings(tree: ast.Module) -> list[str]:
    """Of the module and of everything defined in it, in the order of the file, dedented."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, owners) and node.body]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [inspect.cleandoc(text) for node in nodes if (text := ast.get_docstring(node, clean=False))]


def _is_prose(text: str) -> bool:
    """Long enough, mostly letters, and no doctest session."""
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return len(text) >= _SHORTEST_PROSE and letters >= 0.8 * len(text) and ">>>" not in text


def _without_held_out_paragraphs(documents: list[EmbeddedDocument]) -> list[EmbeddedDocument]:
    """Topics quote each other's sections, and subclasses repeat docstrings: training must not read what is held out."""
    held_out = {paragraph for document in documents if document.held_out for paragraph in _paragraphs(document.text)}
    kept = []
    for document in documents:
        if not document.held_out:
            rest = [part for part in document.text.split("\n\n") if _squeezed(part) not in held_out]
            document = EmbeddedDocument(document.source, "\n\n".join(rest).strip() + "\n")
        if document.text.strip():
            kept.append(document)
    return kept


def _paragraphs(text: str) -> list[str]:
    squeezed = map(_squeezed, text.split("\n\n"))
    return [paragraph for paragraph in squeezed if len(paragraph) >= _REPEATED_PARAGRAPH]


def _squeezed(paragraph: str) -> str:
    return " ".join(paragraph.split())
