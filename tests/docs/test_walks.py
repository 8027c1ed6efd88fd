"""What docs/contributing.md says of how to read the code: every file and function that its walks name exists, and the
files to open are those that run."""

import ast
import functools
import re
import sys
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from mora_ds.config.arguments import parse
from mora_ds.train import pretrain, run
from mora_ds.train.trainer import Trainer
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground
from tests.helpers.pages import ROOT

PAGE = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
WALKS = re.findall(r"^\*\*(A \w+)\*\*.*\n\n((?:\d+\. .*\n)+)", PAGE, re.MULTILINE)
"""(title, its numbered lines)"""
STATION = re.compile(r"`(\w[\w/]*\.py)` `([\w.]+)`")
TO_OPEN = {
    title: (int(count), set(re.findall(r"`([\w/]+\.py)`", files)))
    for title, count, files in re.findall(r"^- ([\w ]+), (\d+): ((?:.+\n)+?)(?=- |\n)", PAGE, re.MULTILINE)
}
"""What happens -> how many files of mora_ds that takes, and which."""

LINES = 10
"""A file is to be opened where at least as many of its lines run."""
BY_NAME = ("common/", "runtime/", "adapters/ops/")
"""What is read by the names of its functions."""
FORWARD = {
    "adapters/domains.py", "data/packing.py", "engine/traffic.py", "models/document_attention.py", "models/loss.py",
    "train/beside.py", "train/loader.py",
}  # fmt: skip
"""The forward pass of the probe batch, before and after a merge and before a save: a step's files."""


def defined(path: str) -> set[str]:
    """The functions, methods and classes of a file: `function`, `Class`, `Class.method`."""
    names: set[str] = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return names


def test_there_are_three_short_walks():
    assert [title for title, _ in WALKS] == ["A step", "A merge", "A resume"]
    for title, text in WALKS:
        lines = text.splitlines()
        assert 5 <= len(lines) <= 12, title
        assert all(STATION.search(line) for line in lines), title


def test_every_station_of_a_walk_exists():
    stations = [station for _, text in WALKS for station in STATION.findall(text)]
    gone = [(path, name) for path, name in stations if name not in defined(path)]
    assert not gone


def test_files_to_open_are_counted_and_exist():
    assert list(TO_OPEN) == ["a step", "a merge", "save and resume", "an export"]
    for count, files in TO_OPEN.values():
        assert len(files) == count and all((ROOT / "mora_ds" / file).is_file() for file in files)


def lines_that_run(argv: list[str]) -> dict[str, dict[str, int]]:
    """What happens in a run and in its resume -> file of mora_ds -> how many of its lines run."""
    package = f"{ROOT / 'mora_ds'}/"
    ran: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    happening = [""]

    def trace(frame: Any, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(package):
            return None
        if event == "line":
            ran[happening[-1]][file.removeprefix(package)].add(frame.f_lineno)
        return trace

    def watch(owner: Any, name: str, title: str):
        function = getattr(owner, name)

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            happening.append(title)
            sys.settrace(trace)
            threading.settrace(trace)
            try:
                return function(*args, **kwargs)
            finally:
                happening.pop()
                if len(happening) == 1:
                    sys.settrace(None)
                    threading.settrace(None)  # type: ignore[arg-type]

        setattr(owner, name, watched)

    watch(Trainer, "train_step", "a step")
    watch(Trainer, "_after_step", "what follows a step")
    watch(Trainer, "_merge", "a merge")
    watch(Trainer, "_save", "save and resume")
    watch(run, "export_merged", "an export")
    pretrain.pretrain(parse([*argv, "--max_steps", "4", "--export_merged", "true"]))
    for owner, name in ((pretrain, "resume_checkpoint"), (pretrain.TrainerState, "read"), (run.Run, "__init__")):
        watch(owner, name, "save and resume")
    pretrain.pretrain(parse([*argv, "--resume_from_checkpoint", "auto"]))
    return {title: {file: len(lines) for file, lines in files.items()} for title, files in ran.items()}


@pytest.mark.heavy(seconds=60)
def test_files_to_open_are_those_that_run(user: Playground, tmp_path: Path):
    argv = user.flags(tmp_path, "--merge_every", 2, "--restart_warmup_steps", 1, "--save_steps", 3)
    (ran,) = run_ranks(1, lines_that_run, argv)
    for title, (_, files) in TO_OPEN.items():
        opened = {file for file, lines in ran[title].items() if lines >= LINES and not file.startswith(BY_NAME)}
        assert files == opened - (FORWARD if title != "a step" else set()), title
