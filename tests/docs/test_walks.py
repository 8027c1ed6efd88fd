"""What docs/contributing.md says of how to read the code: every file and function that its
walks name exists, and a step and a merge run the files to open.
"""

import ast
import itertools
import re
import sys
from collections import defaultdict

import pytest

from mora_ds.data.mixture import BatchLoader
from mora_ds.train.trainer import Trainer
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import job
from tests.helpers.pages import ROOT

PAGE = (ROOT / "docs/contributing.md").read_text()
WALKS = re.findall(r"^\*\*(A \w+)\*\*.*\n\n((?:\d+\. .*\n)+)", PAGE, re.MULTILINE)
"""(title, its numbered lines)"""
STATION = re.compile(r"`(\w[\w/]*\.py)` `([\w.]+)`")
TO_OPEN = {
    title: (int(count), set(re.findall(r"`([\w/]+\.py)`", files)))
    for title, count, files in re.findall(
        r"^- ([\w ]+), (\d+): ((?:.+\n)+?)(?=- |\n)", PAGE, re.MULTILINE
    )
}
"""What happens -> how many files of mora_ds that takes, and which."""
PACKAGE = f"{ROOT}/mora_ds/"
LEAST_LINES = 10
NOT_COUNTED = ("common/", "runtime/", "adapters/ops/")


def defined(path):
    """The functions, methods and classes of a file: `function`, `Class`, `Class.method`."""
    names = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{method.name}"
                for method in node.body
                if isinstance(method, ast.FunctionDef)
            }
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
        assert len(files) == count and all(
            (ROOT / "mora_ds" / file).is_file() for file in files
        )


def traced(owner, name, lines=None, number=0):
    """Patch a method: the lines of mora_ds that its call `number` runs go into `lines`,
    file -> numbers of lines. Those of its other calls are not counted."""
    method = getattr(owner, name)
    calls = itertools.count(1)

    def trace(frame, event, _):
        file = frame.f_code.co_filename
        if PACKAGE not in file or frame.f_code.co_name == "<module>":
            return None
        if event == "line":
            lines[file.partition(PACKAGE)[2]].add(frame.f_lineno)
        return trace

    def traced_method(*args):
        before = sys.gettrace()
        sys.settrace(trace if next(calls) == number else None)
        try:
            return method(*args)
        finally:
            sys.settrace(before)

    setattr(owner, name, traced_method)


def files_of_a_run(argv):
    """What happens in a run -> the files of which it runs `LEAST_LINES` or more."""
    happens = {"a step": defaultdict(set), "a merge": defaultdict(set)}
    traced(Trainer, "train_step", happens["a step"], number=3)
    # In a thread, ahead of the step
    traced(BatchLoader, "_read", happens["a step"], number=3)
    traced(Trainer, "_run_pending", happens["a merge"], number=2)
    traced(Trainer, "after_step")
    traced(Trainer, "_reference_loss")
    job(argv)
    return {
        what: {
            file
            for file, numbers in lines.items()
            if len(numbers) >= LEAST_LINES and not file.startswith(NOT_COUNTED)
        }
        for what, lines in happens.items()
    }


@pytest.mark.heavy
def test_files_to_open_are_those_that_run(user, out):
    flags = "--max_steps 5 --merge_every 2 --restart_warmup_steps 1 --logging_steps 1"
    replay = ("--replay", f"old={user.train}:0.1")
    found = run_ranks(2, files_of_a_run, user.flags(out, flags, *replay))[0]
    assert found == {what: TO_OPEN[what][1] for what in found}
