"""Counts the moments at which a program reads a tensor's numbers on the host, and waits for
a GPU where there is one.

with HostReads() as reads: ...
reads.places      {"train/trainer.py": 1, ...}: by the file that asked, within mora_ds, DeepSpeed or transformers
"""

from __future__ import annotations

import threading
import traceback
from collections import Counter
from importlib.util import find_spec
from unittest.mock import patch

import torch
from torch import Tensor

METHODS = (
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
)
FUNCTIONS = ("equal", "nonzero", "allclose")
FOLDERS = {
    f"{folder}/": name
    for name in ("mora_ds", "deepspeed", "transformers")
    if (package := find_spec(name)) is not None
    for folder in package.submodule_search_locations or ()
}


class HostReads:
    """Host reads of the thread that enters it. A read within another one counts
    once."""

    def __init__(self):
        self.places = Counter()
        self._thread = threading.get_ident()
        self._depth = 0
        self._patches = [
            *(
                patch.object(Tensor, name, self._counted(getattr(Tensor, name)))
                for name in METHODS
            ),
            *(
                patch.object(torch, name, self._counted(getattr(torch, name)))
                for name in FUNCTIONS
            ),
        ]

    def _counted(self, original):
        def read(*args, **kwargs):
            if threading.get_ident() != self._thread:
                return original(*args, **kwargs)
            if not self._depth:
                self.places[_asker()] += 1
            self._depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._depth -= 1

        return read

    def __enter__(self):
        for patcher in self._patches:
            patcher.start()
        return self

    def __exit__(self, kind, error, at):
        for patcher in self._patches:
            patcher.stop()


def _asker():
    for frame in reversed(traceback.extract_stack()):
        for folder, package in FOLDERS.items():
            if frame.filename.startswith(folder):
                return f"{package}/{frame.filename.removeprefix(folder)}"
    return "elsewhere"
