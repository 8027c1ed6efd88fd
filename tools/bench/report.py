"""The results of a benchmark, printed and written as JSON: the tables of docs/results are
made from these files.

A benchmark takes its flags by `bench_parser`, and hands its tables and sentences to one
`Report`.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mora_ds.common.files import write_json_atomic
from mora_ds.common.version import __version__
from mora_ds.runtime.cli import command_parser, table
from tools.plans import ROOT

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "triton")
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""Features of a CPU, as /proc/cpuinfo names them, that decide how fast its matrix products
are."""


Defaults = Mapping[str, tuple[Any, str]]
"""Flag without its dashes -> its default, whose type it takes, and its help."""


def bench_parser(
    documentation: str | None, defaults: Defaults | None = None
) -> argparse.ArgumentParser:
    """A parser with `--json FILE` and a flag for each of `defaults`, described by a
    benchmark's documentation."""
    parser = command_parser(documentation)
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write what is printed as JSON too",
    )
    for name, (default, text) in (defaults or {}).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    return parser


class Report:
    """Tables and sentences of one run, in the order in which they are printed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._path: Path | None = options.json
        self.tables: dict[str, list[list[str]]] = {}
        self.sentences: list[str] = []

    def say(self, sentence: str) -> None:
        """Print a sentence and keep it."""
        self.sentences.append(sentence)
        print(sentence, flush=True)

    def show(self, name: str, rows: Sequence[Sequence[str]]) -> None:
        """Print the table `name` and keep it; the first row holds the titles."""
        self.tables[name] = [list(row) for row in rows]
        print("\n".join(table(rows)), flush=True)

    def write(self, **points: list[dict[str, Any]]) -> None:
        """Write the file that `--json` names, if it names one. `points`: what figures
        are drawn from, such as the runs of a benchmark that trains, with their
        curves."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            content = {
                "command": command(),
                "sentences": self.sentences,
                "tables": self.tables,
                **points,
                "measured_on": machine(),
            }
            write_json_atomic(self._path, content)


def command() -> str:
    """The command of this process, without the flags that only say where to write."""
    words = iter(sys.argv[1:])
    arguments = []
    for word in words:
        if word in ("--json", "--folder", "--work"):
            next(words)
        elif not word.startswith("--local_rank"):
            arguments.append(word)
    script = Path(sys.argv[0]).resolve()
    name = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    if name.startswith("tests/"):  # it imports others, as `python -m` alone lets it
        name = "-m " + name.removesuffix(".py").replace("/", ".")
    return f"python {name} {shlex.join(arguments)}".rstrip()


def machine() -> dict[str, Any]:
    """The device, the cores, the threads and the versions that the figures depend
    on."""
    cpu = Path("/proc/cpuinfo").read_text().split()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    installed = {
        name: version(name) for name in PACKAGES if find_spec(name) is not None
    }
    return {
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
        "cpu_features": [name for name in FEATURES if name in cpu],
        "threads": torch.get_num_threads(),
        "versions": {"mora_ds": __version__, **installed},
    }
