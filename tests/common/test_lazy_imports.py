"""A package that another one must do without while it is loaded, and that everyone else can import."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from mora_ds.common.lazy_imports import hide

OPTIONAL = "try:\n    import slow_part\nexcept ImportError:\n    slow_part = None\n"
MODULES = {"slow_part": "", "user_part": OPTIONAL, "user_part_too": OPTIONAL, "broken_part": OPTIONAL + "1 / 0\n"}


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def test_one_module_does_without_a_package_that_others_import() -> None:
    hide("slow_part", "user_part")
    assert import_module("user_part").slow_part is None and "slow_part" not in sys.modules
    assert import_module("user_part_too").slow_part is import_module("slow_part")


def test_a_package_that_is_loaded_already_stays() -> None:
    hide("slow_part", "user_part")
    slow = import_module("slow_part")
    assert import_module("user_part").slow_part is slow is sys.modules["slow_part"]


def test_a_package_can_be_imported_after_a_module_that_failed() -> None:
    hide("slow_part", "broken_part")
    with pytest.raises(ZeroDivisionError):
        import_module("broken_part")
    assert import_module("slow_part") is sys.modules["slow_part"]


def test_the_same_request_is_kept_once() -> None:
    before = len(sys.meta_path)
    for importer in ("user_part", "user_part", "user_part_too"):
        hide("slow_part", importer)
    assert len(sys.meta_path) == before + 2
