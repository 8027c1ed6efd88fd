"""A program of `tools/` in this process: for what it says of its flags, which needs no interpreter of its own."""

from __future__ import annotations

import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@lru_cache
def tool(name: str) -> Any:
    """The module tools/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(TOOLS), *sys.path])  # for what stands beside it
        spec.loader.exec_module(module)
    return module


def call(name: str, *flags: object) -> None:
    """Its `main` with these flags. What it raises is raised here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        tool(name).main()
