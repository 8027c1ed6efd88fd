"""Keeps one package from importing another one that takes seconds and is not used."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def hide(package: str, importer: str) -> None:
    """`package` cannot be found while the module `importer` is loaded, which must do without it then (as it would
    where the package is not installed). Everyone else can import it, before and afterwards."""
    finder = _Hiding(package, importer)
    if finder not in sys.meta_path:
        sys.meta_path.insert(0, finder)


class _Hiding(MetaPathFinder):
    def __init__(self, package: str, importer: str) -> None:
        self._names = package, importer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hiding) and other._names == self._names

    def __hash__(self) -> int:
        return hash(self._names)

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        package, importer = self._names
        spec = PathFinder.find_spec(name, path) if name == importer else None
        if spec is None or spec.loader is None or package in sys.modules:
            return None
        load = spec.loader.exec_module

        def load_without(module: ModuleType) -> None:
            sys.modules[package] = None  # type: ignore[assignment]  # what Python takes for "there is no such module"
            try:
                load(module)
            finally:
                del sys.modules[package]

        spec.loader.exec_module = load_without  # type: ignore[method-assign]
        return spec
