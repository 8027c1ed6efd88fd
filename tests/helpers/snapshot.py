"""The content of a folder, to the byte: for tests that it was not changed."""

import os
import stat
from contextlib import contextmanager


def snapshot(path):
    """{relative name: (kind, mode, content)} of `path` and all below it, links not
    followed; {} where it is missing.

    The content of a link is its target, that of a folder empty.
    """
    if not os.path.lexists(path):
        return {}
    return {
        os.path.relpath(entry, path): _facts(entry)
        for entry in (path, *sorted(path.rglob("*")))
    }


def _facts(path):
    mode = stat.S_IMODE(path.lstat().st_mode)
    if path.is_symlink():
        return "link", mode, os.readlink(path).encode()
    return ("folder", mode, b"") if path.is_dir() else ("file", mode, path.read_bytes())


@contextmanager
def untouched(path):
    """Fails where the block changes anything at `path`, or makes it."""
    before = snapshot(path)
    yield
    assert_same(path, before)


def assert_same(path, before):
    """Fails, naming what differs, where `path` does not hold what it held."""
    after = snapshot(path)
    names = sorted(
        name for name in {*before, *after} if before.get(name) != after.get(name)
    )
    assert not names, f"{path} is not as it was: {names[:10]}"
