"""A damaged token cache or index entry is noticed, named and built again."""

import os

import pytest

from mora_ds.data import build_cache, load_corpus, load_tokenizer
from tests.helpers.damage import HARMS, flip
from tests.helpers.outcome import tree


@pytest.fixture
def build(user, tmp_path):
    """Builds or opens a cache."""
    tokenizer = load_tokenizer(user.model)
    return lambda: build_cache(
        load_corpus([str(user.train)]), tokenizer, tmp_path / "cache"
    )


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "meta.json"])
def test_a_damaged_cache_is_named_and_built_anew(build, caplog, name, harm):
    built = build()
    contents = tree(built.folder)
    for where in (0.02, 0.4, 0.97) if harm == "flip" else (0.0,):
        flip(built.folder / name, where) if harm == "flip" else HARMS[harm](
            built.folder / name
        )
        assert build().folder == built.folder
        assert tree(built.folder) == contents
    assert caplog.messages
    assert all(
        f"the token cache {built.folder} is damaged" in line for line in caplog.messages
    )
    caplog.clear()
    assert build().folder == built.folder
    assert not caplog.messages


@pytest.mark.parametrize("link", ["symlink", "hard link"])
def test_an_entry_of_the_index_is_never_written_through_a_link(build, tmp_path, link):
    """Whoever may write to a shared cache could have any file of the user's
    overwritten."""
    (entry,) = (build().folder.parent / "index").iterdir()
    content = entry.read_text()
    precious = tmp_path / "precious"
    precious.write_text("precious")
    entry.unlink()
    if link == "symlink":
        entry.symlink_to(precious)
    else:
        entry.hardlink_to(precious)
    build()
    assert precious.read_text() == "precious"
    assert entry.read_text() == content
    assert not entry.is_symlink()


def test_an_entry_that_is_a_pipe_is_not_waited_for(build):
    (entry,) = (build().folder.parent / "index").iterdir()
    content = entry.read_text()
    entry.unlink()
    os.mkfifo(entry)
    build()
    assert entry.read_text() == content


@pytest.mark.parametrize("name", ["meta.json", "../left.partial-0"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_never_ends_is_not_read_in_a_shared_cache(build, name, kind):
    folder = build().folder
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    (folder / "documents.bin").unlink()  # so that it is built again
    assert build().n_documents


@pytest.mark.parametrize("where", [0.1, 0.3, 0.6, 0.9])
def test_a_damaged_entry_of_the_index_is_not_believed(build, where):
    """A wrong entry would name another cache, and so another run."""
    built = build()
    (entry,) = (built.folder.parent / "index").iterdir()
    content = entry.read_text()
    flip(entry, where)
    assert build().folder == built.folder
    assert entry.read_text() == content
