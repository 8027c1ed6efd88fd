"""Mutations of files by a seeded generator: values, keys and types of JSON, YAML, headers and pickles; bytes; links."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.helpers.crafted import change_header, rewrite_pickle

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 1000, 2**16, 2**24, 2**31, 2**32, 2**63, 10**12, 10**30, 0.5, 1e308,
    float("nan"), float("inf"), "", ".", "..", "../../escape", "../escape", "{case}/escape", "/dev/zero", "a/b", "a\0b",
    "a\nb", "\ud800", "x" * 300, "x" * 100_000, "re:(x+x+)+y", "*", "model.norm.weight", "rotate", "lora", "subspace",
    [], {}, [[]], [1], {"a": 1}, ["..", "/"],
)  # fmt: skip

TEXTS = ("[" * 5000, "9" * 5000, "{}", "[]", "", "null", '"text"', "\xff\xfe", "[1e999]", '{"a": 1, "a": 2}', "&a [*a]")


class Mutator:
    """Changes one thing in a folder. The same seed makes the same changes."""

    def __init__(self, seed: int, case: Path) -> None:
        self._random, self._case = random.Random(seed), case

    def mutate(self, folder: Path) -> str:
        """Returns what was done, for the report."""
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        if not files:
            return "nothing left to change"
        path = self._random.choice(files)
        name = path.relative_to(folder).as_posix()
        try:
            if self._random.random() < 0.12:
                return f"{name}: {self._tree(path)}"
            if self._random.random() < 0.08:
                return f"{name}: {self._bytes(path)}"
            return f"{name}: {self._content(path)}"
        except Exception as error:  # of a file that an earlier change has broken
            return f"{name}: unchanged, {type(error).__name__}"

    def _content(self, path: Path) -> str:
        if path.suffix == ".json":
            if self._random.random() < 0.05:
                path.write_text(self._random.choice(TEXTS), encoding="latin-1")
                return "other text"
            content, done = self._changed(json.loads(path.read_text(encoding="utf-8")))
            path.write_text(json.dumps(content), encoding="utf-8")
            return done
        if path.suffix == ".yaml":
            content, done = self._changed(yaml.safe_load(path.read_text(encoding="utf-8")))
            path.write_text(yaml.safe_dump(content), encoding="utf-8")
            return done
        if path.suffix == ".safetensors":
            return self._header(path)
        if path.suffix == ".pt":
            made: list[str] = []

            def change(content: Any) -> Any:
                content, done = self._changed(content)
                made.append(done)
                return content

            rewrite_pickle(path, change)
            return made[0]
        return self._bytes(path)

    def _header(self, path: Path) -> str:
        made: list[str] = []

        def change(header: dict[str, Any]) -> None:
            about = header.get("__metadata__", {})
            if "layers" in about and self._random.random() < 0.7:
                layers, done = self._changed(json.loads(about["layers"]))
                about["layers"] = json.dumps(layers)
            else:
                content, done = self._changed(header)
                if content is not header and isinstance(content, dict):
                    header.clear()
                    header.update(content)
            made.append(done)

        change_header(path, change)
        return made[0]

    def _changed(self, content: Any) -> tuple[Any, str]:
        """(`content` with one change somewhere, what was done)."""
        holders: list[tuple[Any, Any]] = []
        waiting, seen = [content], set[int]()
        while waiting:
            value = waiting.pop()
            if id(value) in seen:  # an earlier change may have made a list that contains itself
                continue
            if isinstance(value, (dict, list)):
                seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            for key, child in items:
                holders.append((value, key))
                waiting.append(child)
        if not holders or self._random.random() < 0.01:
            return self._value(), "the whole"
        holder, key = self._random.choice(holders)
        way = self._random.choice(("value", "value", "value", "key", "drop", "twin", "wrap"))
        if way == "drop":
            del holder[key]
        elif way == "key" and isinstance(holder, dict):
            holder[str(self._value())] = holder.pop(key)
        elif way == "twin":
            other, place = self._random.choice(holders)
            holder[key] = other[place] if other is not holder else self._value()
        elif way == "wrap":
            holder[key] = [holder[key]]
        else:
            holder[key] = self._value(holder[key])
        return content, f"{way} of {str(key)[:60]!r}"

    def _value(self, old: Any = None) -> Any:
        if isinstance(old, torch.Tensor) and self._random.random() < 0.6:
            others = (
                old[:-1] if old.dim() else old, old.double(), old.reshape(-1), old * float("nan"), old.to(torch.int8),
                torch.zeros(1).expand(10**9), old[None],
            )  # fmt: skip
            return self._random.choice(others)
        value = self._random.choice(VALUES)
        return value.replace("{case}", str(self._case)) if isinstance(value, str) else value

    def _bytes(self, path: Path) -> str:
        data = bytearray(path.read_bytes())
        way = self._random.choice(("cut", "flip", "empty", "noise"))
        if way == "cut":
            data = data[: self._random.randrange(len(data) + 1)]
        elif way == "empty":
            data.clear()
        else:
            for _ in range(1 if way == "flip" else 20):
                if data:
                    data[self._random.randrange(min(len(data), 4096))] = self._random.randrange(256)
        path.write_bytes(bytes(data))
        return way

    def _tree(self, path: Path) -> str:
        files = [each for each in sorted(path.parent.glob("*.*")) if each.is_file()]
        ways: dict[str, Callable[[], object]] = {
            "gone": path.unlink,
            "renamed": lambda: path.rename(path.with_name(path.name[1:] or "a")),
            "linked": lambda: (path.unlink(), path.symlink_to(self._case / "canary")),
            "loop": lambda: (path.unlink(), path.symlink_to(path.parent)),
            "stray link": lambda: (path.parent / "stray").symlink_to(self._case / "canary"),
            "a folder": lambda: (path.unlink(), path.mkdir()),
            "a pipe": lambda: (path.unlink(), os.mkfifo(path)),
            "another file": lambda: shutil.copyfile(self._random.choice(files), path),
        }
        way = self._random.choice(list(ways))
        ways[way]()
        return way
