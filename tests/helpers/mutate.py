"""Mutations of files by a seeded generator: values, keys and types of JSON, YAML, headers;
bytes; links.
"""

import json
import os
import random

import yaml

from tests.helpers.crafted import change_header
from tests.helpers.tables import parsed

VALUES = (
    *parsed(r"""
    [null, true, false, -1, 0, 1, 2, 3, 7, 1000, 65536, 16777216, 2147483648, 4294967296, 9223372036854775808,
     1000000000000, 1000000000000000000000000000000, 0.5, 1.0e+308, .nan, .inf, "", ., .., ../../escape, ../escape,
     "{case}/escape", /dev/zero, a/b, "a\0b", "a\nb", "\ud800", "re:(x+x+)+y", "*", model.norm.weight, rotate, lora,
     stack, [], {}, [[]], [1], {a: 1}, [.., /]]
    """),
    "x" * 300,
    "x" * 100_000,
)

TEXTS = (
    "[" * 5000,
    "9" * 5000,
    "{}",
    "[]",
    "",
    "null",
    '"text"',
    "\xff\xfe",
    "[1e999]",
    '{"a": 1, "a": 2}',
    "&a [*a]",
)


class Mutator:
    """Changes one thing in a folder. The same seed makes the same changes."""

    def __init__(self, seed, case):
        self._random = random.Random(seed)
        self._case = case

    def mutate(self, folder):
        """Change one file below `folder`. Returns its name and the kind of change, for the
        report.
        """
        files = sorted(
            path
            for path in folder.rglob("*")
            if path.is_file() and not path.is_symlink()
        )
        if not files:
            return "nothing left to change"
        path = self._random.choice(files)
        (change,) = self._random.choices(
            (self._replace, self._damage, self._rewrite), (12, 8, 80)
        )
        try:
            change(path)
            outcome = change.__name__
        except Exception as error:  # of a file that an earlier change has broken
            outcome = f"unchanged, {type(error).__name__}"
        return f"{path.relative_to(folder)}: {outcome}"

    def _replace(self, path):
        """Take the file away, or put something else in its place."""
        path.unlink()
        replacements = (
            lambda: None,
            lambda: path.symlink_to(self._case / "canary"),
            lambda: path.symlink_to(path.parent),
            path.mkdir,
            lambda: os.mkfifo(path),
            lambda: path.write_text(self._random.choice(TEXTS), encoding="latin-1"),
        )
        self._random.choice(replacements)()

    def _damage(self, path):
        """Cut the file off somewhere, or change some of its first bytes."""
        content = bytearray(path.read_bytes())
        if self._random.random() < 0.5:
            content = content[: self._random.randrange(len(content) + 1)]
        else:
            for _ in range(self._random.choice((1, 20))):
                content[self._random.randrange(min(len(content), 4096))] = (
                    self._random.randrange(256)
                )
        path.write_bytes(bytes(content))

    def _rewrite(self, path):
        """Change one value of what the file holds, in its own format."""
        if path.suffix == ".json":
            path.write_text(json.dumps(self._changed(json.loads(path.read_text()))))
        elif path.suffix == ".yaml":
            path.write_text(
                yaml.safe_dump(self._changed(yaml.safe_load(path.read_text())))
            )
        elif path.suffix == ".safetensors":
            change_header(path, self._change_header)
        else:
            self._damage(path)

    def _change_header(self, header):
        metadata = header.get("__metadata__", {})
        if "layers" in metadata and self._random.random() < 0.7:
            metadata["layers"] = json.dumps(
                self._changed(json.loads(metadata["layers"]))
            )
        else:
            self._changed(header)

    def _changed(self, content):
        """`content` with one change somewhere: mostly in place, seldom another value
        instead of the whole.
        """
        entries = []
        waiting = [content]
        while waiting:
            container = waiting.pop()
            if isinstance(container, dict):
                keys = list(container)
            else:
                keys = (
                    list(range(len(container))) if isinstance(container, list) else []
                )
            entries += [(container, key) for key in keys]
            waiting += [container[key] for key in keys]
        if not entries or self._random.random() < 0.01:
            return self._value()
        container, key = self._random.choice(entries)
        way = self._random.choice(("value", "value", "value", "rename", "drop", "wrap"))
        if way == "drop":
            del container[key]
        elif way == "rename" and isinstance(container, dict):
            container[str(self._value())] = container.pop(key)
        elif way == "wrap":
            container[key] = [container[key]]
        else:
            container[key] = self._value()
        return content

    def _value(self):
        value = self._random.choice(VALUES)
        return (
            value.replace("{case}", str(self._case))
            if isinstance(value, str)
            else value
        )
