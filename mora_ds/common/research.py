"""The only door to `mora_ds.research`, whose modules nothing else imports."""

from importlib import import_module
from typing import Any


def load(module: str) -> Any:
    """The module `mora_ds.research.MODULE`, imported now."""
    return import_module(f"mora_ds.research.{module}")
