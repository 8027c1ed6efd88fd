"""`mora-ds prepare-corpus` fills the token cache with what a run of the same settings looks
for.
"""

import pytest

from mora_ds.commands import prepare_corpus
from mora_ds.data import cache
from tests.helpers.errors import user_error
from tests.helpers.jobs import losses, run

START = "--document_start </s> --held_out_share 0.2"


@pytest.fixture
def prepare(monkeypatch):
    def call(*argv):
        monkeypatch.setattr("sys.argv", ["mora-ds prepare-corpus", *map(str, argv)])
        prepare_corpus.main()

    return call


def forbidden(*_):
    raise AssertionError("tokenized although it was there")


def test_a_run_finds_what_was_prepared(
    user,
    tmp_path,
    out,
    prepare,
    monkeypatch,
    capsys,
):
    run(2, user.flags(tmp_path / "alone", START, "--cache_dir", tmp_path / "other"))
    flags = user.flags(out, START, "--cache_dir", tmp_path / "cache")
    prepare(*flags)
    names = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["train", "held", "short", "held_out"]
    assert not out.exists()
    monkeypatch.setattr(cache, "_build", forbidden)
    run(2, flags)
    assert losses(out).tolist() == losses(tmp_path / "alone").tolist()


def test_streams_are_left_to_the_run(user, tmp_path, out, prepare, capsys):
    prepare(*user.flags(out, "--streaming --cache_dir", tmp_path / "cache"))
    names = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["held", "short"]


def test_what_cannot_be_prepared_is_refused(user, out, prepare):
    with user_error("--train_tokenizer_vocab: the run trains its tokenizer"):
        prepare(*user.flags(out, "--train_tokenizer_vocab 300"))
    with user_error("no text to "):
        prepare("--model_name_or_path", user.model)
