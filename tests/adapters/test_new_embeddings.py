"""--train_new_embeddings trains the added rows only; they are sharded, resumed and exported with the adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mora_ds import MoRAConfig, initialize, inject, load_adapter
from mora_ds.adapters.inject import count_parameters, move_base
from mora_ds.adapters.new_embeddings import NewRowEmbedding, NewRowHead
from mora_ds.checkpoint.verify import verify
from mora_ds.common.errors import UserError
from mora_ds.config.arguments import parse
from mora_ds.config.validate import validate
from mora_ds.data import load_corpus, load_tokenizer
from mora_ds.deploy.export import export_merged
from mora_ds.engine import zero
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.vocabulary import EXTENSION_JSON, extend_vocabulary
from mora_ds.train.pretrain import pretrain
from tests.helpers.engines import ds_config
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, losses, refused, run
from tests.helpers.models import causal_loss, tiny_model, tokens

FIRST = 112


def model_with_new_rows(tied: bool) -> Any:
    model = tiny_model("llama", tie_word_embeddings=tied)
    report = inject(model, MoRAConfig(rank=2, new_rows_from=FIRST))
    assert report.other_trainable_params == (128 - FIRST) * 32 * (1 if tied else 2)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_outputs_and_gradients_are_those_of_trained_tables(tied: bool) -> None:
    """The loss and the gradient of the new rows are those of a model whose complete tables are trained."""
    model, whole, ids = model_with_new_rows(tied), tiny_model("llama", tie_word_embeddings=tied), tokens(3)
    is_new = ids >= FIRST
    assert is_new.any() and not is_new.all()
    for each in (model, whole):
        causal_loss(each, ids).backward()
    assert causal_loss(model, ids).item() == causal_loss(whole, ids).item()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, NewRowEmbedding) and isinstance(head, NewRowHead)
    assert (embedding.new_rows is head.new_rows) == tied
    wanted = whole.get_input_embeddings().weight.grad[FIRST:]
    assert torch.allclose(embedding.new_rows.grad, wanted, atol=1e-7) and wanted.abs().max() > 1e-3
    assert torch.allclose(head.new_rows.grad, whole.get_output_embeddings().weight.grad[FIRST:], atol=1e-7)
    names = {name for name, _ in model.named_parameters() if not name.endswith("square")}
    assert names == {"model.embed_tokens.new_rows"} | (set() if tied else {"lm_head.new_rows"})


def trained_on_ranks(tied: bool) -> dict[str, torch.Tensor]:
    """All trained parameters, unsharded and in fp32, after three steps on this rank's part of the same rows."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    config = ds_config(3, 4 // world, 1)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine, *_ = initialize(model=model_with_new_rows(tied), config=config)
    for step in range(3):
        mine = tokens(4, seed=step)[rank * 4 // world : (rank + 1) * 4 // world]
        engine.backward(causal_loss(engine, mine))
        engine.step()
    shards = [each.ds_tensor.numel() for name, each in engine.module.named_parameters() if name.endswith("new_rows")]
    assert shards == [16 * 32 // world] * (1 if tied else 2)
    return {name: zero.full_fp32(engine, each).clone() for name, each in engine.module.named_parameters()}


@pytest.mark.gloo
@pytest.mark.parametrize("tied", [True, False])
def test_two_ranks_train_them_as_one(tied: bool) -> None:
    """The same rows of data, split over two ranks: the same parameters after three steps."""
    alone = run_ranks(1, trained_on_ranks, tied)[0]
    both = run_ranks(2, trained_on_ranks, tied)
    new = [name for name in alone if name.endswith("new_rows")]
    assert len(new) == (1 if tied else 2)
    start = tiny_model("llama", tie_word_embeddings=tied).get_input_embeddings().weight[FIRST:]
    assert not torch.allclose(alone["model.embed_tokens.new_rows"], start, atol=1e-3)
    for name, value in alone.items():
        assert torch.equal(both[0][name], both[1][name]), name
        assert torch.allclose(both[0][name], value, atol=2e-5), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_table_is_counted_once(tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    before = count_parameters(model)
    report = inject(model, MoRAConfig(rank=2, new_rows_from=FIRST))
    assert count_parameters(model) == before + report.trainable_params
    move_base(model, "cpu", torch.bfloat16)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied and head.weight.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def extended(user: Playground) -> Playground:
    corpus = load_corpus([str(user.train)], flag="--corpus")
    extend_vocabulary(user.model, corpus, 40, user.root / "extended")
    return replace(user, model=user.root / "extended")


@pytest.mark.gloo
def test_a_run_trains_resumes_and_exports_them(extended: Playground, tmp_path: Path) -> None:
    """Two ranks, a merge, a resume in the middle. The exported model is the live one; old rows keep their bits."""
    out, base = tmp_path / "out", BaseCheckpoint.open(extended.model)
    first = json.loads((extended.model / EXTENSION_JSON).read_text())["first_row"]
    flags = extended.flags(
        out, "--train_new_embeddings", "--merge_every", 3, "--restart_warmup_steps", 1, "--save_steps", 4,
        "--eval_files", extended.held,
    )  # fmt: skip
    run(2, flags)
    again = extended.flags(tmp_path / "again", *flags[flags.index("--train_new_embeddings") :])
    run(2, [*again, "--resume_from_checkpoint", str(out / "checkpoints" / "step-000004")])
    assert losses(out)[4:].tolist() == losses(tmp_path / "again").tolist()

    for verdict in verify(out, extended.model):
        assert verdict.is_good, verdict.lines()
    report = export_merged(out, tmp_path / "merged", verify=True)
    assert report.replaced == 2 and report.cycles == 1
    live, merged = load_adapter(extended.model, out), AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    text = json.loads(extended.train.read_text().splitlines()[0])["text"]
    ids = torch.tensor([load_tokenizer(extended.model)(text)["input_ids"][:100]])
    assert (ids >= first).any()
    with torch.no_grad():
        assert torch.allclose(live(ids).logits, merged(ids).logits, atol=1e-5)
    assert (tmp_path / "merged" / EXTENSION_JSON).is_file()
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        table, was = merged.state_dict()[key], base.read(key)
        assert torch.equal(table[:first], was[:first]), key
        assert not torch.equal(table[first : first + 40], was[first : first + 40]), key


def test_a_dry_run_counts_them(extended: Playground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = extended.flags(tmp_path / "out", "--dry_run")
    without, told = (pretrain(parse([*flags, *more])) for more in ([], ["--train_new_embeddings"]))
    extension = json.loads((extended.model / EXTENSION_JSON).read_text())
    table = BaseCheckpoint.open(extended.model).read("model.embed_tokens.weight")
    rows = (len(table) - extension["first_row"]) * table.shape[1]
    assert told["trainable_params"] == without["trainable_params"] + 2 * rows  # the head is not tied
    assert told["total_params"] == without["total_params"] + 2 * rows


def test_where_it_does_not_fit_it_is_refused(user: Playground, tmp_path: Path) -> None:
    argv = user.flags(tmp_path / "out", "--train_new_embeddings")
    assert run_ranks(1, refused, argv)[0][1].endswith("so it was not written by mora-ds extend-vocab")
    for more, message in (
        (["--train_embeddings"], "train them all: give one of them"),
        (["--train_head"], "train them all: give one of them"),
    ):
        with pytest.raises(UserError, match=message):
            validate(parse([*argv, *more]))
    with pytest.raises(UserError, match="none from 128 on is new"):
        inject(tiny_model("llama"), MoRAConfig(rank=2, new_rows_from=128))
    assert inject(tiny_model("llama"), MoRAConfig(rank=2, new_rows_from=127)).other_trainable_params == 2 * 32


class Scaled(torch.nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 2


class Softmax(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).softmax(-1)


def test_embeddings_and_heads_that_compute_something_else_are_refused() -> None:
    for change, message in (
        ({"set_input_embeddings": Scaled(128, 32)}, "the embeddings are a Scaled"),
        ({"set_output_embeddings": Softmax(32, 128)}, "the output head is a Softmax"),
    ):
        model = tiny_model("llama")
        for setter, module in change.items():
            getattr(model, setter)(module)
        with pytest.raises(UserError, match=f"--train_new_embeddings: {message}"):
            inject(model, MoRAConfig(rank=2, new_rows_from=FIRST))
    headless = tiny_model("llama")
    headless.get_output_embeddings = lambda: None
    with pytest.raises(UserError, match="the output head is a NoneType, no linear layer"):
        inject(headless, MoRAConfig(rank=2, new_rows_from=112))


def test_a_head_keeps_its_bias() -> None:
    table, x = torch.nn.Linear(4, 128), torch.randn(3, 4)
    head = NewRowHead(table, torch.nn.Parameter(table.weight.data[FIRST:]))
    torch.testing.assert_close(head(x), table(x))


def test_every_trained_row_is_looked_up_among_the_trained() -> None:
    table = torch.nn.Embedding(128, 4)
    embedding = NewRowEmbedding(table, torch.nn.Parameter(torch.zeros(128 - FIRST, 4)))
    found = embedding(torch.arange(128))
    assert not found[FIRST:].any()
    assert torch.equal(found[:FIRST], table.weight[:FIRST])
