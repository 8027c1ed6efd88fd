"""--document_start TOKEN: documents of cached and streamed text begin with it, and those of
an evaluation do.
"""

import json
import shutil
from unittest import mock

import numpy as np
import pytest

from mora_ds.common.files import read_json
from mora_ds.data import (
    TokenCache,
    block_start,
    load_corpus,
    load_tokenizer,
    start_id,
)
from mora_ds.eval.perplexity import Windows, evaluate, load_target
from tests.helpers.errors import user_error
from tests.helpers.gloo import run_alone
from tests.helpers.jobs import job, losses, printed, run, validation_errors_of
from tests.helpers.tables import heavy
from tests.helpers.tools import call

TOKEN = "</s>"
START = f"--document_start {TOKEN}"


def test_document_start_is_bos_by_default(user):
    tokenizer = load_tokenizer(user.model)
    assert start_id(tokenizer, "auto") == tokenizer.bos_token_id
    assert start_id(tokenizer, "none") is None
    assert start_id(tokenizer, TOKEN) == tokenizer.eos_token_id
    assert block_start(tokenizer, "auto", "gemma3_text") == tokenizer.bos_token_id
    assert block_start(tokenizer, "auto", "llama") is None
    tokenizer.bos_token = None
    assert start_id(tokenizer) is None
    for start in ("", "</S>"):
        with user_error(
            f"--document_start '{start}' is not a token .* special tokens are '"
        ):
            start_id(tokenizer, start)


def test_every_document_of_a_run_starts_with_the_token(user, tmp_path):
    cache = tmp_path / "cache"
    run(1, user.flags(tmp_path / "files", START, "--cache_dir", cache))
    for meta in cache.glob("*/meta.json"):
        tokens = TokenCache.open(meta.parent)
        starts = np.concatenate([[0], tokens.ends[:-1]])
        assert set(tokens.tokens[starts].tolist()) == {2}


def of_gemma(argv):
    """A run of a Llama whose sequences begin as Gemma's do."""

    def first(tokenizer, start, model_type):
        assert (start, model_type) == ("auto", "llama")
        return tokenizer.bos_token_id

    with mock.patch("mora_ds.train.data.block_start", first):
        return job(argv)


@pytest.mark.parametrize("more", ["--streaming false", "--streaming true"])
def test_sequences_of_gemma_begin_with_bos(user, tmp_path, more):
    """In training and in evaluations; sequences of other models do not."""
    flags = "--max_steps 2 --eval_files", user.held, *more.split()
    plain = run(1, user.flags(tmp_path / "plain", *flags))
    changed = run_alone(of_gemma, user.flags(tmp_path / "changed", *flags))
    assert changed["perplexity_before"] != plain["perplexity_before"]
    assert (losses(tmp_path / "plain") != losses(tmp_path / "changed")).all()


def test_a_run_prints_that_documents_have_no_start_token(user, tmp_path, model_folder):
    model = shutil.copytree(user.model, model_folder)
    content = read_json(model / "tokenizer.json")
    (model / "tokenizer.json").write_text(
        json.dumps({**content, "post_processor": None})
    )
    for number, (folder, start, says) in enumerate(
        ((user.model, "auto", False), (model, "auto", True), (model, "none", False))
    ):
        flags = (
            "--max_steps 2 --document_start",
            start,
            "--model_name_or_path",
            folder,
        )
        output = run_alone(printed, user.flags(tmp_path / str(number), *flags))
        assert ("no token separates documents" in output) == says


@pytest.mark.parametrize("more", ["--streaming true", heavy("--streaming false")])
def test_a_resume_needs_the_same_start_token(user, out, more):
    run(1, user.flags(out, START, more))
    resume = user.flags(out, more, "--resume_from_checkpoint auto --max_steps 8")
    message = validation_errors_of(resume)
    assert "--document_start" in message or "train.text" in message
    run(1, [*resume, *START.split()])
    assert len(losses(out)) == 8


def test_an_evaluation_starts_documents_with_the_token(user, tmp_path):
    target = load_target(user.model)
    corpus = load_corpus([str(user.other)])
    scores = {
        start: evaluate(target, corpus, Windows.of(target.model, 64, 32, start)).nats
        for start in ("auto", "<s>", TOKEN)
    }
    assert scores["auto"] == scores["<s>"] != scores[TOKEN]
    report = tmp_path / "score.json"
    sets = ("--sets", f"code={user.other}", "--window 64 --stride 32 --json", report)
    call("evaluate", user.model, *sets, START)
    assert read_json(report)["sets"]["code"]["nats"] == scores[TOKEN]
    with user_error("--document_start '<x>' is not a token"):
        call("evaluate", user.model, *sets, "--document_start <x>")


def test_an_evaluation_of_a_run_takes_that_of_the_run(user, out):
    run(1, user.flags(out, START))
    assert load_target(out).document_start == TOKEN
