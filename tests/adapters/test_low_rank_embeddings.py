"""--train_embedding_rank adds a product of low rank to embeddings and head: it computes what trained tables of this sum
do, and is sharded, resumed, combined and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mora_ds import MoRAConfig, initialize, inject, load_adapter
from mora_ds.adapters.low_rank_embeddings import LowRankEmbedding, LowRankHead, sum_of_products, with_product
from mora_ds.checkpoint.verify import verify
from mora_ds.common.errors import UserError
from mora_ds.config.arguments import parse
from mora_ds.config.validate import validate
from mora_ds.data import load_tokenizer
from mora_ds.deploy.combine import Mix, combine_adapters
from mora_ds.deploy.export import export_merged
from mora_ds.deploy.peft_export import export_peft
from mora_ds.engine import zero
from mora_ds.models.base import BaseCheckpoint
from mora_ds.train.pretrain import pretrain
from tests.helpers.engines import ds_config
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, losses, refused, run
from tests.helpers.models import causal_loss, tiny_model, tokens

RANK = 3
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def low_rank_model(tied: bool) -> Any:
    """With products that are not zero."""
    model = tiny_model("llama", tie_word_embeddings=tied)
    report = inject(model, MoRAConfig(rank=2, embedding_rank=RANK))
    assert report.other_trainable_params == (128 + 32) * RANK * (1 if tied else 2)
    torch.manual_seed(0)
    modules = model.get_input_embeddings(), model.get_output_embeddings()
    for low_rank in {id(each.low_rank): each.low_rank.data for each in modules}.values():
        tall, wide = low_rank.split((128, 32))
        assert not tall.any() and 0.9 < wide.abs().max() * 32**0.5 <= 1
        tall.normal_()
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_outputs_and_gradients_are_those_of_trained_tables(tied: bool) -> None:
    """The gradient of a product A B is (G B^T, A^T G), G being that of the table."""
    model, whole, ids = low_rank_model(tied), tiny_model("llama", tie_word_embeddings=tied), tokens(3)
    modules = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(modules[0], LowRankEmbedding) and isinstance(modules[1], LowRankHead)
    assert (modules[0].low_rank is modules[1].low_rank) == tied
    tables = whole.get_input_embeddings(), whole.get_output_embeddings()
    for module, table in zip(modules[: 1 if tied else 2], tables, strict=False):
        table.weight.data = with_product(table.weight.data, module.low_rank.data)
    for each in (model, whole):
        causal_loss(each, ids).backward()
    assert torch.allclose(model(ids).logits, whole(ids).logits, atol=1e-5)
    for module, table in zip(modules, tables, strict=True):
        tall, wide = module.low_rank.data.split((128, 32))
        wanted = torch.cat([table.weight.grad @ wide, table.weight.grad.T @ tall])
        assert torch.allclose(module.low_rank.grad, wanted, atol=1e-5) and wanted.abs().max() > 1e-3
    names = {name for name, _ in model.named_parameters() if not name.endswith("square")}
    assert names == {"model.embed_tokens.low_rank"} | (set() if tied else {"lm_head.low_rank"})


def test_a_new_product_changes_nothing_and_a_head_keeps_its_bias() -> None:
    model, ids = tiny_model("llama"), tokens(2)
    before = model(ids).logits
    inject(model, MoRAConfig(rank=2, embedding_rank=RANK))
    assert torch.equal(model(ids).logits, before)
    head, again = model.get_output_embeddings(), tiny_model("llama")
    inject(again, MoRAConfig(rank=2, embedding_rank=RANK))
    assert torch.equal(again.get_output_embeddings().low_rank, head.low_rank), "drawn by the seed"
    assert not torch.equal(head.low_rank, model.get_input_embeddings().low_rank)
    table, x = torch.nn.Linear(4, 9), torch.randn(3, 4)
    torch.testing.assert_close(LowRankHead(table, torch.nn.Parameter(torch.zeros(13, 2)))(x), table(x))


def trained_on_ranks(tied: bool) -> dict[str, torch.Tensor]:
    """All trained parameters, unsharded and in fp32, after three steps on this rank's part of the same rows."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    config = ds_config(3, 4 // world, 1)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine, *_ = initialize(model=low_rank_model(tied), config=config)
    for step in range(3):
        mine = tokens(4, seed=step)[rank * 4 // world : (rank + 1) * 4 // world]
        engine.backward(causal_loss(engine, mine))
        engine.step()
    shards = [each.ds_tensor.numel() for name, each in engine.module.named_parameters() if name.endswith("low_rank")]
    assert shards == [160 * RANK // world] * (1 if tied else 2)
    return {name: zero.full_fp32(engine, each).clone() for name, each in engine.module.named_parameters()}


@pytest.mark.gloo
@pytest.mark.parametrize("tied", [True, False])
def test_two_ranks_train_it_as_one(tied: bool) -> None:
    alone, both = run_ranks(1, trained_on_ranks, tied)[0], run_ranks(2, trained_on_ranks, tied)
    assert not torch.allclose(
        alone["model.embed_tokens.low_rank"], low_rank_model(tied).get_input_embeddings().low_rank, atol=1e-3
    )
    for name, value in alone.items():
        assert torch.equal(both[0][name], both[1][name]), name
        assert torch.allclose(both[0][name], value, atol=2e-5), name


@pytest.mark.gloo
def test_a_run_resumes_combines_and_exports_it(user: Playground, tmp_path: Path) -> None:
    """Two ranks, a merge, a resume in the middle. The exported model is the live one; half of the update is half of it,
    and the mean of two checkpoints the mean of their tables."""
    out, base = tmp_path / "out", BaseCheckpoint.open(user.model)
    more = ("--train_embedding_rank", RANK, "--embedding_learning_rate", 0.01, "--merge_every", 3)
    more += ("--restart_warmup_steps", 1, "--save_steps", 4, "--eval_files", user.held)
    run(2, user.flags(out, *more))
    earlier = out / "checkpoints" / "step-000004"
    run(2, user.flags(tmp_path / "again", *more, "--resume_from_checkpoint", str(earlier)))
    assert losses(out)[4:].tolist() == losses(tmp_path / "again").tolist()
    other = user.flags(tmp_path / "no", *more, "--resume_from_checkpoint", str(earlier), "--train_embedding_rank", 5)
    assert "--train_embedding_rank: 3 there, 5 here" in run_ranks(1, refused, other)[0][1]

    for verdict in verify(out, user.model):
        assert verdict.is_good, verdict.lines()
    assert export_merged(out, tmp_path / "merged", verify=True).replaced == 2
    export_merged(earlier, tmp_path / "earlier")
    export_merged(out, tmp_path / "half", mix=Mix(delta_scale=0.5))
    export_merged(out, tmp_path / "mean", mix=Mix(average_last=2))
    combine_adapters([out, earlier], [2.0, -0.5], tmp_path / "sum", user.model)
    export_merged(tmp_path / "sum", tmp_path / "summed")
    export_peft(out, tmp_path / "peft", rank=4)
    saved = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    models = {
        name: AutoModelForCausalLM.from_pretrained(tmp_path / name)
        for name in ("merged", "earlier", "half", "mean", "summed")
    }
    ids = torch.tensor([load_tokenizer(user.model)(user.held.read_text())["input_ids"][:100]])
    with torch.no_grad():
        for folder, name in ((out, "merged"), (tmp_path / "sum", "summed")):
            live = load_adapter(user.model, folder)
            assert torch.allclose(live(ids).logits, models[name](ids).logits, atol=1e-4), name
    for key in TABLES:
        was, now, then = base.read(key), *(models[name].state_dict()[key] for name in ("merged", "earlier"))
        assert torch.allclose(saved[f"base_model.model.{key}"], now, atol=1e-6)
        assert (now - was).abs().max() > 1e-3 and torch.linalg.matrix_rank(now - was, atol=1e-5) == RANK
        for name, wanted in (
            ("half", (was + now) / 2),
            ("mean", (now + then) / 2),
            ("summed", was + 2 * (now - was) - 0.5 * (then - was)),
        ):
            assert torch.allclose(models[name].state_dict()[key], wanted, atol=1e-6), name


def test_a_dry_run_counts_it(user: Playground, tmp_path: Path) -> None:
    flags = user.flags(tmp_path / "out", "--dry_run")
    without, told = (pretrain(parse([*flags, *more])) for more in ([], ["--train_embedding_rank", "3"]))
    tokens_, width = BaseCheckpoint.open(user.model).read(TABLES[0]).shape
    assert told["trainable_params"] == without["trainable_params"] + 2 * 3 * (tokens_ + width)  # the head is not tied


def test_where_it_does_not_fit_it_is_refused(user: Playground, tmp_path: Path) -> None:
    argv = user.flags(tmp_path / "out", "--train_embedding_rank", 3)
    for more, message in (
        (["--train_embeddings"], "train them all: give one of them"),
        (["--train_head"], "train them all: give one of them"),
        (["--train_new_embeddings"], "train different parts of embeddings and head: give one of them"),
        (["--train_embedding_rank", "-1"], "train_embedding_rank must"),
    ):
        with pytest.raises(UserError, match=message):
            validate(parse([*argv, *more]))
    for config, message in (
        ({"train_embeddings": True}, "--train_embedding_rank keeps embeddings and head frozen"),
        ({"train_head": True}, "--train_embedding_rank keeps embeddings and head frozen"),
        ({"new_rows_from": 9}, "--train_embedding_rank: the embeddings are a NewRowEmbedding"),
        ({"embedding_rank": -1}, "--train_embedding_rank must be at least 1, got -1"),
    ):
        with pytest.raises(UserError, match=message):
            inject(tiny_model("llama"), MoRAConfig(rank=2, **{"embedding_rank": 2, **config}))  # type: ignore[arg-type]
    headless = tiny_model("llama")
    headless.get_output_embeddings = lambda: None
    with pytest.raises(UserError, match="--train_embedding_rank: the output head is a NoneType"):
        inject(headless, MoRAConfig(rank=2, embedding_rank=2))
    with pytest.raises(UserError, match=r"low_rank has 9 rows, and the base a table of \(6, 2\)"):
        with_product(torch.zeros(6, 2), torch.zeros(9, 1))


def test_products_are_summed_side_by_side() -> None:
    lows = torch.randn(7 + 4, 2), torch.randn(7 + 4, 3)
    total = sum_of_products(((low, weight) for low, weight in zip(lows, (0.5, -2.0), strict=True)), 7)
    table, nothing = torch.randn(7, 4), torch.zeros(7, 4)
    wanted = table + 0.5 * with_product(nothing, lows[0]) - 2 * with_product(nothing, lows[1])
    assert total.shape == (11, 5) and torch.allclose(with_product(table, total), wanted, atol=1e-5)
