"""`mora-ds prepare-corpus` fills the token cache with what a run of the same settings looks for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mora_ds.commands import prepare_corpus
from mora_ds.common.errors import UserError
from mora_ds.data import cache
from tests.helpers.jobs import Playground, losses, run

START = ("--document_start", "</s>", "--held_out_share", "0.2")


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def call(*argv: object):
        monkeypatch.setattr("sys.argv", ["mora-ds prepare-corpus", *map(str, argv)])
        prepare_corpus.main()

    return call


def forbidden(*_: Any):
    raise AssertionError("tokenised although it was there")


def test_a_run_finds_what_was_prepared(
    user: Playground,
    tmp_path: Path,
    prepare: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    run(2, user.flags(tmp_path / "alone", *START, "--cache_dir", tmp_path / "other"))
    flags = user.flags(tmp_path / "out", *START, "--cache_dir", tmp_path / "cache")
    prepare(*flags)
    names = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["train", "held", "short", "held_out"]
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(cache, "_build", forbidden)
    run(2, flags)
    assert losses(tmp_path / "out").tolist() == losses(tmp_path / "alone").tolist()


def test_streams_are_left_to_the_run(
    user: Playground, tmp_path: Path, prepare: Callable[..., None], capsys: pytest.CaptureFixture[str]
):
    prepare(*user.flags(tmp_path / "out", "--streaming", "--cache_dir", tmp_path / "cache"))
    names = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["held", "short"]


def test_what_cannot_be_prepared_is_refused(user: Playground, tmp_path: Path, prepare: Callable[..., None]):
    with pytest.raises(UserError, match="--train_tokenizer_vocab: the run trains its tokenizer"):
        prepare(*user.flags(tmp_path / "out", "--train_tokenizer_vocab", 300))
    with pytest.raises(UserError, match="no text to tokenise"):
        prepare("--model_name_or_path", user.model)
