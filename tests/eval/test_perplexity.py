"""`mora-ds evaluate`: the figures are those of a naive computation, and a checkpoint has
those of its export.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import mora_layers
from mora_ds.common.files import read_json
from mora_ds.data import Document, load_corpus, load_tokenizer
from mora_ds.deploy.export import export_merged
from mora_ds.eval import perplexity
from mora_ds.eval.perplexity import (
    Score,
    Windows,
    evaluate,
    load_target,
    named_sets,
)
from mora_ds.models.load import load_model
from tests.helpers.adapters import Maker
from tests.helpers.errors import user_error
from tests.helpers.jobs import run
from tests.helpers.models import with_own_code
from tests.helpers.streams import Letters
from tests.helpers.tables import each_row, parsed
from tests.helpers.texts import json_lines
from tests.helpers.tools import call


def naive(folder, texts, window, stride, is_gemma):
    """(nats, tokens): one token at a time, each in the first window that reaches it, which
    begins with BOS for Gemma.
    """
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = load_tokenizer(folder)
    nats = 0.0
    tokens = 0
    bos = tokenizer.bos_token_id
    for text in texts:
        ids = [bos, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        for position in range(1, len(ids)):
            begin = 0
            while position >= begin + window:
                begin += stride
            first = bos if is_gemma else ids[begin]
            seen = torch.tensor([[first, *ids[begin + 1 : position]]])
            with torch.no_grad():
                logits = model(seen).logits[0, -1].double()
            nats -= torch.log_softmax(logits, -1)[ids[position]].item()
            tokens += 1
    return nats, tokens


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("window, stride", [(128, 64), (24, 7), (24, 22), (5, 1)])
def test_perplexity_is_the_naive_one(user, tmp_path, window, stride, kind):
    texts = [text[:250] for text in user.texts()[:2]] + ["naïve ☃\n", "x"]
    text_bytes = len("".join(texts).encode())
    path = tmp_path / "set.jsonl"
    path.write_text(json_lines([*texts, ""]))
    target = load_target(user.model)
    corpus = load_corpus([str(path)])
    windows = Windows.of(target.model, window, stride)
    assert windows.model_type == "llama"
    windows = replace(windows, model_type=kind)
    score = evaluate(target, corpus, windows, batch_size=3)
    nats, tokens = naive(user.model, texts, window, stride, kind != "llama")
    assert score.tokens == tokens
    assert score.text_bytes == text_bytes
    assert score.documents == 5
    assert score.nats == pytest.approx(nats, rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(
        nats / math.log(2) / text_bytes, rel=1e-6
    )
    one = evaluate(target, corpus, windows, batch_size=1, max_documents=1)
    assert one.documents == 1
    assert one.text_bytes == len(texts[0].encode())


CUT = """
4 1 <s> llama  | 2    | 0123+3 1234+1 2345+1 3456+1 4567+1 5678+1 09+1 | 2 9 9
# bytes, not characters
4 3 <s> llama  | null | 0123+3 345+2 5678+3 09+1 0156+1                | 3 10 11
# as much context as two windows share
5 3 <s> llama  | 1    | 01234+4 345+1 45678+3                          | 1 8 8
4 2 b gemma    | 1    | 2123+3 2345+2 2567+2 278+1                     | 1 8 8
# without a start token all but the first of a document
4 2 none llama | 2    | 1234+3 345+1 4567+2 678+1                      | 2 7 7
"""
"""Windows | most documents | tokens of each window, and how many are scored | documents,
tokens and bytes."""


@each_row("how, most, parts, counts", CUT)
def test_a_chunk_has_the_end_of_the_one_before_as_context(how, most, parts, counts):
    """Every token is scored once."""
    window, stride, *start = how.split()
    tokenizer = Letters()
    tokenizer.get_vocab = lambda: {"b": 2, "<s>": 0}
    tokenizer.decode = lambda ids: "".join(chr(96 + token) for token in ids)
    beginning = Document("abcde", ends=False)
    rest = Document("fgh", begins=False)
    corpus = [beginning, rest, Document("i"), Document("ü")]
    score = Score()
    windows = Windows(int(window), int(stride), *start)
    cut = perplexity.cut_windows(corpus, tokenizer, windows, parsed(most), score)
    texts = ["".join(map(str, ids)) + f"+{scored}" for ids, scored in cut]
    assert texts == parts.split()
    assert f"{score.documents} {score.tokens} {score.text_bytes}" == counts


def test_windows_are_sorted_a_few_batches_at_a_time(monkeypatch):
    monkeypatch.setattr(perplexity, "_SORTED_BATCHES", 2)
    windows = [([0] * length, 1) for length in (5, 2, 9, 3, 1)]
    batches = list(perplexity.sorted_batches(iter(windows), 2))
    assert [[len(ids) for ids, _ in batch] for batch in batches] == [
        [2, 3],
        [5, 9],
        [1],
    ]


def test_a_model_is_loaded_in_the_dtype_that_is_asked_for(user):
    assert load_target(user.model).model.dtype == torch.float32
    target = load_target(user.model, dtype="bfloat16")
    assert target.model.dtype == torch.bfloat16
    nats = evaluate(target, [Document("one text")], Windows(64, 32)).nats
    assert nats != torch.tensor(nats).bfloat16().item(), "losses are in fp32"
    assert not target.model.training
    with user_error("--domain is for checkpoints"):
        load_target(user.model, domain="law")


def test_a_checkpoint_of_a_model_with_its_own_code_is_evaluated_where_that_is_allowed(
    user, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    folder = with_own_code(user.model, tmp_path / "own")
    maker = Maker(load_model(folder, torch.float32, trust_remote_code=True), folder)
    maker.write(tmp_path / "adapter", MoRAConfig(rank=2), 1)
    for path in (folder, tmp_path / "adapter"):
        target = load_target(path, trust_remote_code=True)
        assert type(target.model).__name__ == "OwnForCausalLM"
        with user_error("trust_remote_code"):
            load_target(path)
        half = load_target(path, dtype="float16", trust_remote_code=True)
        assert half.model.dtype == torch.float16
    assert len(mora_layers(target.model)) == 14


def test_a_checkpoint_and_its_export_give_the_same_figures(user, tmp_path, out, capsys):
    """A checkpoint with a merge, live MoRA matrices and trained norms; its figures are not
    those of its base.
    """
    flags = (
        "--merge_every 3 --restart_warmup_steps 1 --train_norms --learning_rate 0.02"
    )
    run(1, user.flags(out, flags))
    export_merged(out, tmp_path / "merged")

    def scores(*flags):
        report = tmp_path / "scores.json"
        call("evaluate", out, "--window 64 --stride 32", *flags, "--json", report)
        return read_json(report)["sets"]

    held_set = f"held={user.held}"
    live = scores("--sets", held_set, user.other)
    assert "bits/byte" in capsys.readouterr().out
    assert set(live) == {"held", "other"}
    merged = load_target(tmp_path / "merged")
    base = load_target(user.model)
    for name, path in (("held", user.held), ("other", user.other)):
        corpus = load_corpus([str(path)])
        of_merged, of_base = (
            evaluate(target, corpus, Windows(64, 32)).nats for target in (merged, base)
        )
        assert live[name]["nats"] == pytest.approx(of_merged, rel=1e-6)
        assert abs(of_merged - of_base) > 1e-3 * of_base
        assert live[name]["text_bytes"] == path.stat().st_size
    unchanged = evaluate(base, load_corpus([str(user.held)]), Windows(64, 32)).nats
    scaled = scores("--sets", held_set, "--delta_scale 0")
    assert scaled["held"]["nats"] == pytest.approx(unchanged, rel=1e-6)


def test_what_cannot_be_evaluated_is_named(user, tmp_path):
    target = load_target(user.model)
    for window, stride, message in (
        (4096, None, "--window must be from 3 to the model's 128 positions, got 4096"),
        (64, 63, r"--stride must be from 1 to --window minus 2 \(62\), got 63"),
        (64, 0, "--stride"),
        (2, None, "--window must be from 3"),
    ):
        with user_error(message):
            Windows.of(target.model, window, stride)
    assert Windows.of(target.model, None, None).stride == 64
    assert Windows.of(target.model, 3, None).stride == 1
    config = SimpleNamespace(get_text_config=lambda: None, model_type="")
    unlimited = SimpleNamespace(config=config)
    assert Windows.of(unlimited, None, None) == Windows(1024, 512)
    assert Windows.of(unlimited, 4096, None).stride == 2048
    assert Score(1, 2, 2, nats=1e4).perplexity == math.inf, (
        "of a model that has diverged"
    )
    with user_error("neither a Hugging Face model nor a run or checkpoint"):
        load_target(tmp_path)
    with user_error("--base is for checkpoints"):
        load_target(user.model, base=user.model)
    with user_error("two sets have the name a"):
        named_sets(["a=x.txt", "b/a.txt"])
    assert named_sets(["a=x=y.txt", "b/c.jsonl.gz", "/d=e/f.txt"]) == {
        "a": "x=y.txt",
        "c": "b/c.jsonl.gz",
        "f": "/d=e/f.txt",
    }
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    with user_error("no tokens to score"):
        evaluate(target, load_corpus([str(empty)]), Windows(64, 32))
