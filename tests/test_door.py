"""Everything that is read from disk or received from a rank passes one door: `common/untrusted`
bounds its size, kind and depth. No code of mora_ds reads a file, parses JSON or YAML, or
loads arrays by itself, but for a list of exceptions with their reasons; none unpickles.
"""

import ast
from pathlib import Path

import pytest

import mora_ds

PACKAGE = Path(mora_ds.__file__).parent

PICKLE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
"""Modules that nothing imports: what they read can run code."""

READS = {
    "open",
    "read_text",
    "read_bytes",
    "json.load",
    "json.loads",
    "yaml.load",
    "yaml.safe_load",
    "np.load",
    "np.memmap",
    "torch.load",
}

ALLOWED = {
    ("common/untrusted.py", "open"): "the door: a pipe of the user's shell",
    ("common/untrusted.py", "json.loads"): "the door",
    ("common/files.py", "yaml.load"): "with the door's text, by a loader without tags",
    ("common/tensor_files.py", "open"): "writes",
    ("train/metrics.py", "open"): "writes",
    ("models/load.py", "torch.load"): "with weights_only, on the meta device",
    ("runtime/node_memory.py", "read_text"): "files of the kernel, in /proc and /sys",
    ("checkpoint/sections.py", "json.loads"): "of what was just dumped",
    ("checkpoint/state.py", "json.loads"): "of what was just dumped",
}
"""(file, call) -> why it may. Files of text and token caches have readers of their own in
`data/`, which `tests/data` attacks.
"""


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


def read_by(call):
    """The name in `READS` of what a call reads with, or "". `os.open` returns a
    descriptor for locks and folders, classes of mora_ds have an `open` of their own.
    """
    function = call.func
    if isinstance(function, ast.Name):
        return "open" if function.id == "open" else ""
    if not isinstance(function, ast.Attribute):
        return ""
    owner = ast.unparse(function.value)
    if f"{owner}.{function.attr}" in READS:
        return f"{owner}.{function.attr}"
    is_class = owner == "os" or owner.split(".")[-1].lstrip("_")[:1].isupper()
    is_own = owner.endswith(("sums", "location", "remote"))
    return function.attr if function.attr in READS and not (is_class or is_own) else ""


def found():
    return {
        (name, read_by(node))
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and read_by(node) and not name.startswith("data/")
    }


def test_files_are_read_through_the_door_alone():
    assert found() - ALLOWED.keys() == set(), "read it by common/untrusted, or say why"
    assert ALLOWED.keys() - found() == set(), "no exception is needed any more"


def unsafe(tree):
    """What of a module pickles, unpickles, or exchanges pickled objects."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (name for name in names if name.split(".")[0] in PICKLE)
        attribute = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if attribute.startswith("dist") and "_object" in attribute:
            yield attribute
        is_option = isinstance(node, ast.keyword) and node.arg == "weights_only"
        if is_option and ast.unparse(node.value) != "True":
            yield "weights_only"


def test_nothing_is_pickled():
    assert {
        name: list(unsafe(tree)) for name, tree in modules() if [*unsafe(tree)]
    } == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import loads",
        "dist.broadcast_object_list(values)",
        "dist.all_gather_object(values, value)",
        "torch.load(path, weights_only=False)",
    ],
)
def test_what_could_run_code_is_found(code):
    assert list(unsafe(ast.parse(code)))


@pytest.mark.parametrize(
    "read",
    ["open(p)", "p.open()", "folder.read_text()", "json.load(f)", "np.memmap(p)"],
)
def test_a_read_past_the_door_is_found(read):
    assert read_by(ast.parse(read).body[0].value)
