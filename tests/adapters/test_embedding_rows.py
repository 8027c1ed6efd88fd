"""--train_embedding_rows trains the rows whose tokens become more frequent; a run shards, resumes, combines and exports
them as those of --train_new_embeddings, whose file of tests has the equalities of outputs, gradients and ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mora_ds import MoRAConfig, inject, load_adapter
from mora_ds.adapters.new_embeddings import rows_of
from mora_ds.checkpoint.verify import verify
from mora_ds.common.errors import UserError
from mora_ds.config.arguments import parse
from mora_ds.config.validate import validate
from mora_ds.data import Mixture, PackedDataset, load_tokenizer
from mora_ds.deploy.combine import combine_adapters
from mora_ds.deploy.export import export_merged
from mora_ds.models.base import BaseCheckpoint
from mora_ds.train.embedding_rows import embedding_rows, most_grown
from mora_ds.train.pretrain import pretrain
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, losses, refused, run
from tests.helpers.models import tiny_model

K = 24


def shares(user: Playground, path: Path) -> np.ndarray:
    """Of the tokens of a text, an end of text after each document included."""
    tokenizer, text = load_tokenizer(user.model), path.read_text(encoding="utf-8")
    texts = [json.loads(line)["text"] for line in text.splitlines()] if path.suffix == ".jsonl" else [text]
    ids = [each for one in texts for each in [*tokenizer(one)["input_ids"], tokenizer.eos_token_id]]
    return np.bincount(ids, minlength=400) / len(ids)


@pytest.fixture(scope="module")
def code(user: Playground) -> Playground:
    """`other` is the old text: long enough, and of other words."""
    old = user.root / "old.txt"
    old.write_text("the quick brown fox jumps over the lazy dog and nothing else happens; " * 80, encoding="utf-8")
    return replace(user, other=old)


def flags_of(code: Playground, out: Path, *more: object) -> list[str]:
    old = ("--replay", f"old={code.other}:0.25", "--eval_files", code.held, "--train_embedding_rows", K)
    return code.flags(out, *old, *more)  # type: ignore[arg-type]


@pytest.mark.gloo
def test_a_run_trains_resumes_combines_and_exports_them(code: Playground, tmp_path: Path) -> None:
    """Two ranks, a merge, a resume in the middle. The exported model is the live one; other rows keep their bits."""
    out, base = tmp_path / "out", BaseCheckpoint.open(code.model)
    more = ("--merge_every", 3, "--restart_warmup_steps", 1, "--save_steps", 4)
    run(2, flags_of(code, out, *more))
    checkpoint = str(out / "checkpoints" / "step-000004")
    run(2, flags_of(code, tmp_path / "again", *more, "--resume_from_checkpoint", checkpoint))
    assert losses(out)[4:].tolist() == losses(tmp_path / "again").tolist()
    argv = flags_of(code, tmp_path / "no", *more, "--resume_from_checkpoint", checkpoint, "--train_embedding_rows", 9)
    assert run_ranks(1, refused, argv)[0][1].endswith(f"belongs to a run with {K} rows")

    rows = json.loads((out / "checkpoints/latest/adapter.json").read_text())["config"]["trained_rows"]
    growth = shares(code, code.train) - shares(code, code.other)
    assert len(rows) == K and rows == sorted(rows)
    assert growth[rows].min() >= np.delete(growth, rows).max()

    for verdict in verify(out, code.model):
        assert verdict.is_good, verdict.lines()
    assert export_merged(out, tmp_path / "merged", verify=True).replaced == 2
    live, merged = load_adapter(code.model, out), AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([load_tokenizer(code.model)(code.held.read_text())["input_ids"][:100]])
    with torch.no_grad():
        assert torch.allclose(live(ids).logits, merged(ids).logits, atol=1e-5)
    frozen = [row for row in range(400) if row not in rows]
    combine_adapters([out], [0.5], tmp_path / "half", code.model)
    export_merged(tmp_path / "half", tmp_path / "merged-half", base_folder=code.model)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "merged-half")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        table, was, middle = merged.state_dict()[key], base.read(key), half.state_dict()[key]
        assert torch.equal(table[frozen], was[frozen]) and torch.equal(middle[frozen], was[frozen])
        changed = (table != was).any(1).nonzero().flatten().tolist()
        assert set(changed) <= set(rows) and len(changed) > K // 2
        assert torch.allclose(middle, (table + was) / 2, atol=1e-6)


def test_a_dry_run_counts_them(user: Playground, tmp_path: Path) -> None:
    flags = user.flags(tmp_path / "out", "--dry_run")
    without, some = (pretrain(parse([*flags, *more])) for more in ([], ["--train_embedding_rows", str(K)]))
    assert some["trainable_params"] == without["trainable_params"] + 2 * K * 32  # the head is not tied


def test_where_it_does_not_fit_it_is_refused(code: Playground, tmp_path: Path) -> None:
    argv = flags_of(code, tmp_path / "out")
    for more, message in (
        (["--train_embeddings"], "train them all: give one of them"),
        (["--train_new_embeddings"], "train different parts of embeddings and head: give one of them"),
        (["--adapter", "full"], "--train_embedding_rows: --adapter full has no frozen embeddings"),
        (["--full_rank_steps", "2"], "--full_rank_steps train every row first"),
        (["--streaming"], "--streaming does not read"),
        (["--train_embedding_rows", "-1"], "train_embedding_rows must be"),
    ):
        with pytest.raises(UserError, match=message):
            validate(parse([*argv, *more]))
    with pytest.raises(UserError, match="name that with --replay"):
        validate(parse(code.flags(tmp_path / "out", "--train_embedding_rows", 5)))
    for rows in ((3, 3), (5, 4), (-1, 4), (4, 128)):
        with pytest.raises(UserError, match="not ascending, or the model"):
            inject(tiny_model("llama"), MoRAConfig(rank=2, trained_rows=rows))
    for count, rows in ((3, [1, 2]), (2, [1, 9]), (2, [-1, 2])):
        with pytest.raises(UserError, match="trained_rows are no"):
            rows_of(torch.zeros(9, 2), count, rows)


def mixture_of(**tokens: list[int]) -> Any:
    """Sources with these tokens in their caches."""
    mixture: Any = Mixture.__new__(Mixture)
    mixture.names, mixture.sources = list(tokens), []
    for each in tokens.values():
        source: Any = PackedDataset.__new__(PackedDataset)
        source.cache = SimpleNamespace(tokens=np.array(each))
        mixture.sources.append(source)
    return mixture


def test_the_rows_are_those_whose_share_grows_most(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Shares, not counts: there is four times as much old text. Of equal ones the first is taken."""
    monkeypatch.setattr("mora_ds.train.embedding_rows.CHUNK", 3)
    mixture = mixture_of(old=[0] * 8 + [1] * 8, new=[1, 1, 2], older=[3] * 4, newer=[0, 3])
    # shares:      token   0    1    2    3    4
    #   old text          .4   .4   0    .2   0      new text   .2   .4   .2   .2   0
    with caplog.at_level("INFO"):
        found = [most_grown(count, 5, mixture, ["older", "old"]) for count in range(1, 5)]
    assert found == [[2], [1, 2], [1, 2, 3], [1, 2, 3, 4]]
    assert "--train_embedding_rows 2: their tokens are 40.0% of the replayed text and 60.0% of the new" in caplog.text


def test_a_checkpoint_says_which_rows_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    facts, asked = {"config": {"trained_rows": [2, 4]}}, list[str]()
    monkeypatch.setattr("mora_ds.train.embedding_rows.read_adapter", lambda path: SimpleNamespace(facts=facts))

    def on_first(what: str, work: Any, long: bool) -> Any:
        asked.append(what)
        assert long
        return work()

    ranks: Any = SimpleNamespace(on_first=on_first)
    mixture = mixture_of(old=[0, 0, 1], new=[1, 1, 2])
    assert embedding_rows(2, 5, mixture, ["old"], None, ranks) == (1, 2)
    assert embedding_rows(2, 5, mixture, ["old"], Path("step"), ranks) == (2, 4)
    with pytest.raises(UserError, match="--train_embedding_rows 1: step belongs to a run with 2 rows"):
        embedding_rows(1, 5, mixture, ["old"], Path("step"), ranks)
    assert asked == ["rows of the embeddings"] * 3


def test_more_rows_than_there_are_and_streams_are_refused() -> None:
    class Source:
        n_blocks = None

    mixture: Any = Mixture.__new__(Mixture)
    mixture.names, mixture.sources = ["web"], [Source()]
    assert not isinstance(mixture.sources[0], PackedDataset)
    with pytest.raises(UserError, match="source 'web', which is streamed"):
        most_grown(5, 400, mixture, [])
    with pytest.raises(UserError, match="--train_embeddings trains them all"):
        most_grown(400, 400, mixture, [])
