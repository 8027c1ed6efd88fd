"""Everything that a run leaves in its output folder, compared byte for byte with that of
another run.
"""

import json
import os

from mora_ds.checkpoint.verify import verify
from tests.helpers.jobs import curve

_MEASURED = {"metrics.jsonl", "run.yaml", "summary.json"}
"""Files that may differ between two equal runs: they hold times, memory, the name of the
folder.
"""


def tree(out):
    """Path -> content of every file and link of a run, except TensorBoard's, whose names
    hold time and process.
    """
    return {str(path.relative_to(out)): _content(path) for path in _entries(out)}


def _entries(out):
    for path in sorted(out.rglob("*")):
        is_leaf = path.is_symlink() or not path.is_dir() or not any(path.iterdir())
        if is_leaf and "tensorboard" not in path.parts:
            yield path


def _content(path):
    if path.is_symlink():
        return os.readlink(path).encode()
    return b"" if path.name in _MEASURED or path.is_dir() else path.read_bytes()


def assert_good(folder, base=None):
    """The checkpoints of a run, one of them or a ledger: nothing is found wrong with
    any.
    """
    assert [
        verdict.lines() for verdict in verify(folder, base) if not verdict.is_good
    ] == []


def assert_same_outcome(out, reference):
    """Checkpoints (MoRA matrices, moments, random states, manifest), ledger, merged model
    and curve are equal.
    """
    assert curve(out) == curve(reference)
    ours = tree(out)
    expected = tree(reference)
    assert ours.keys() == expected.keys(), f"differ: {ours.keys() ^ expected.keys()}"
    assert [path for path in expected if ours[path] != expected[path]] == []
    summaries = [
        json.loads((folder / "summary.json").read_text()) for folder in (out, reference)
    ]
    for name in ("steps", "tokens", "merges", "perplexity_before", "perplexity_after"):
        assert summaries[0][name] == summaries[1][name], name
