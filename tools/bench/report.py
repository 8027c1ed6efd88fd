"""What a benchmark finds, printed and written as JSON: the tables of docs/results are made
from these files.

A benchmark takes its flags by `bench_parser`, and hands its tables and sentences to one
`Report`.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mora_ds.common.files import write_json_atomic
from mora_ds.common.version import __version__
from mora_ds.runtime.cli import command_parser, table

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "triton")
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""Of a CPU, as /proc/cpuinfo names them: those that decide how fast its matrix products
are.
"""


Numbers = Mapping[str, tuple[float, str]]
"""Flag without its dashes -> its default, whose type it takes, and its help."""


def bench_parser(
    documentation: str | None, numbers: Numbers | None = None
) -> argparse.ArgumentParser:
    """A parser with `--json FILE` and a flag for each of `numbers`, described by a
    benchmark's documentation.
    """
    parser = command_parser(documentation)
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write what is printed as JSON too",
    )
    for name, (default, text) in (numbers or {}).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    return parser


class Report:
    """Tables and sentences of one run, in the order in which they are printed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._path: Path | None = options.json
        self.tables: dict[str, list[list[str]]] = {}
        self.sentences: list[str] = []
        self.points: dict[str, list[dict[str, Any]]] = {}
        """What figures are drawn from: name -> rows, such as the runs of a benchmark that
        trains, with their curves.
        """

    def say(self, sentence: str) -> None:
        """Print a sentence and keep it."""
        self.sentences.append(sentence)
        print(sentence, flush=True)

    def show(self, name: str, rows: Sequence[Sequence[str]]) -> None:
        """Print the table `name` and keep it; the first row holds the titles."""
        self.tables[name] = [list(row) for row in rows]
        print("\n".join(table(rows)), flush=True)

    def write(self) -> None:
        """Write the file that `--json` names, if it names one."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self._path, {**self.found(), "measured_on": machine()})

    def found(self) -> dict[str, Any]:
        """What the file holds, without the machine."""
        return {
            "command": command(),
            "sentences": self.sentences,
            "tables": self.tables,
            **self.points,
        }


def command() -> str:
    """The command of this process, without the flags that only say where to write."""
    words = list(sys.argv[1:])
    arguments = []
    while words:
        word = words.pop(0)
        if word in ("--json", "--folder", "--work"):
            words = words[1:]
        elif not word.startswith("--local_rank"):
            arguments.append(word)
    script = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parents[2]
    name = str(script.relative_to(root)) if script.is_relative_to(root) else script.name
    if name.startswith("tests/"):  # it imports others, as `python -m` alone lets it
        name = "-m " + name.removesuffix(".py").replace("/", ".")
    return f"python {name} {shlex.join(arguments)}".rstrip()


def machine() -> dict[str, Any]:
    """The device, the cores, the threads and the versions that the figures depend on."""
    try:
        flags = next(
            line.split()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("flags")
        )
    except (OSError, StopIteration):
        flags = []
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
        "cpu_features": [name for name in FEATURES if name in flags],
        "threads": torch.get_num_threads(),
        "versions": {
            "mora_ds": __version__,
            **{name: installed for name in PACKAGES if (installed := _version(name))},
        },
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
