"""Embeddings and head trained in part: --train_embedding_rank adds a product of low rank to them,
--train_new_embeddings trains their added rows. Both compute what trained tables do, and are sharded, resumed and
exported with the adapters."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from mora_ds import MoRAConfig, inject, load_adapter
from mora_ds.adapters.inject import count_parameters, move_base
from mora_ds.adapters.low_rank_embeddings import (
    LowRankEmbedding,
    LowRankHead,
    with_product,
)
from mora_ds.adapters.new_embeddings import NewRowEmbedding, NewRowHead
from mora_ds.commands.pretrain import train
from mora_ds.common.files import read_json
from mora_ds.config.arguments import parse
from mora_ds.data import load_corpus, load_tokenizer
from mora_ds.deploy.combine import combine_adapters
from mora_ds.deploy.export import export_merged
from mora_ds.deploy.peft_export import export_peft
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.vocabulary import EXTENSION_JSON, extend_vocabulary
from tests.helpers.errors import user_error
from tests.helpers.jobs import assert_close_losses, losses, run, validation_errors_of
from tests.helpers.models import (
    causal_loss,
    model_with_mora,
    tiny_model,
    tokens,
)
from tests.helpers.outcome import assert_good
from tests.helpers.tables import each_row, parsed

# -- a product of low rank -------------------------------------------------------------

RANK = 3
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def low_rank_model(tied, family="llama"):
    """A model whose embedding products are not zero."""
    model = tiny_model(family, tie_word_embeddings=tied)
    report = inject(model, MoRAConfig(rank=2, embedding_rank=RANK))
    assert report.other_trainable_params == (128 + 32) * RANK * (1 if tied else 2)
    torch.manual_seed(0)
    modules = model.get_input_embeddings(), model.get_output_embeddings()
    for low_rank in {
        id(module.low_rank): module.low_rank.data for module in modules
    }.values():
        tall, wide = low_rank.split((128, 32))
        assert not tall.any()
        assert 0.9 < wide.abs().max() * 32**0.5 <= 1
        tall.normal_()
    return model


def assert_alone_trained(model, kind, tied):
    """The only trained parameters besides the MoRA matrices, once where the tables are
    tied."""
    names = {
        name for name, _ in model.named_parameters() if not name.endswith("mora_matrix")
    }
    tables = ("model.embed_tokens",) if tied else ("model.embed_tokens", "lm_head")
    assert names == {f"{table}.{kind}" for table in tables}


# Gemma's embeddings are multiplied by the root of the width
MODELS = [("llama", True), ("llama", False), ("gemma2", True), ("gemma3_text", False)]


@pytest.mark.parametrize("family, tied", MODELS)
def test_low_rank_tables_have_the_outputs_and_gradients_of_trained_ones(family, tied):
    """The gradient of a product A B is (G B^T, A^T G), G being that of the table."""
    model = low_rank_model(tied, family)
    full = tiny_model(family, tie_word_embeddings=tied)
    ids = tokens(3)
    modules = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(modules[0], LowRankEmbedding)
    assert isinstance(modules[1], LowRankHead)
    assert (modules[0].low_rank is modules[1].low_rank) == tied
    tables = full.get_input_embeddings(), full.get_output_embeddings()
    for module, table in zip(modules[: 1 if tied else 2], tables, strict=False):
        table.weight.data = with_product(table.weight.data, module.low_rank.data)
    for variant in (model, full):
        causal_loss(variant, ids).backward()
    assert torch.allclose(model(ids).logits, full(ids).logits, atol=1e-5)
    for module, table in zip(modules, tables, strict=True):
        tall, wide = module.low_rank.data.split((128, 32))
        wanted = torch.cat([table.weight.grad @ wide, table.weight.grad.T @ tall])
        assert torch.allclose(module.low_rank.grad, wanted, atol=1e-5)
        assert wanted.abs().max() > 1e-3
    assert_alone_trained(model, "low_rank", tied)


def test_a_new_product_changes_nothing_and_a_head_keeps_its_bias():
    model = tiny_model("llama")
    ids = tokens(2)
    before = model(ids).logits
    inject(model, MoRAConfig(rank=2, embedding_rank=RANK))
    assert torch.equal(model(ids).logits, before)
    head = model.get_output_embeddings()
    again = model_with_mora(rank=2, embedding_rank=RANK)
    assert torch.equal(again.get_output_embeddings().low_rank, head.low_rank), (
        "drawn by the seed"
    )
    other = model_with_mora(rank=2, embedding_rank=RANK, seed=1)
    assert not torch.equal(other.get_output_embeddings().low_rank, head.low_rank)
    assert not torch.equal(head.low_rank, model.get_input_embeddings().low_rank)
    table = torch.nn.Linear(4, 9)
    x = torch.randn(3, 4)
    assert_close(
        LowRankHead(table, torch.nn.Parameter(torch.zeros(13, 2)))(x), table(x)
    )


MERGING = "--merge_every 3 --restart_warmup_steps 1 --save_steps 4"


def merged_and_resumed(user, folder, *more):
    """The output folder of a run on two ranks with a merge, and its checkpoint of step 4,
    from which a second run has gone on alike.
    """
    flags = (*more, MERGING, "--eval_files", user.held)
    out = folder / "out"
    earlier = out / "checkpoints/step-000004"
    run(2, user.flags(out, *flags))
    run(2, user.flags(folder / "again", *flags, "--resume_from_checkpoint", earlier))
    assert losses(out)[4:].tolist() == losses(folder / "again").tolist()
    assert_good(out, user.model)
    return out, earlier


def test_a_run_resumes_combines_and_exports_products(user, tmp_path, merged):
    """Two ranks, a merge, a resume in the middle. The exported model is the live one; half
    of the update is half of it, and a sum of two checkpoints the sum of their tables."""
    base = BaseCheckpoint.open(user.model)
    # Muon, as in continual_embeddings.yaml
    more = (
        f"--train_embedding_rank {RANK} --embedding_learning_rate 0.01 --optimizer muon"
    )
    out, earlier = merged_and_resumed(user, tmp_path, more)
    wider = "--train_embedding_rank 5 --resume_from_checkpoint"
    message = validation_errors_of(user.flags(tmp_path / "no", wider, earlier))
    assert "--train_embedding_rank: 3 there, 5 here" in message

    assert export_merged(out, merged, verify=True).replaced == 2
    export_merged(earlier, tmp_path / "earlier")
    export_merged(out, tmp_path / "half", delta_scale=0.5)
    combine_adapters([out, earlier], [2.0, -0.5], tmp_path / "sum", user.model)
    export_merged(tmp_path / "sum", tmp_path / "summed")
    export_peft(out, tmp_path / "peft", rank=4)
    saved = load_file(tmp_path / "peft/adapter_model.safetensors")
    models = {
        name: AutoModelForCausalLM.from_pretrained(tmp_path / name)
        for name in ("merged", "earlier", "half", "summed")
    }
    ids = torch.tensor(
        [load_tokenizer(user.model)(user.held.read_text())["input_ids"][:100]]
    )
    with torch.no_grad():
        for folder, name in ((out, "merged"), (tmp_path / "sum", "summed")):
            live = load_adapter(user.model, folder)
            assert torch.allclose(
                live(ids).logits, models[name](ids).logits, atol=1e-4
            ), name
    for key in TABLES:
        was, now, then = (
            base.read(key),
            *(models[name].state_dict()[key] for name in ("merged", "earlier")),
        )
        assert torch.allclose(saved[f"base_model.model.{key}"], now, atol=1e-6)
        assert (now - was).abs().max() > 1e-3
        assert torch.linalg.matrix_rank(now - was, atol=1e-5) == RANK
        for name, wanted in (
            ("half", (was + now) / 2),
            ("summed", was + 2 * (now - was) - 0.5 * (then - was)),
        ):
            assert torch.allclose(models[name].state_dict()[key], wanted, atol=1e-6), (
                name
            )


# -- new rows --------------------------------------------------------------------------

FIRST = 112


def model_with_new_rows(tied, family="llama"):
    model = tiny_model(family, tie_word_embeddings=tied)
    report = inject(model, MoRAConfig(rank=2, new_rows_from=FIRST))
    assert report.other_trainable_params == (128 - FIRST) * 32 * (1 if tied else 2)
    return model


@pytest.mark.parametrize("family, tied", MODELS)
def test_new_rows_have_the_outputs_and_gradients_of_trained_tables(family, tied):
    """The loss and the gradient of the new rows are those of a model whose complete tables
    are trained.
    """
    model = model_with_new_rows(tied, family)
    full = tiny_model(family, tie_word_embeddings=tied)
    ids = tokens(9)
    assert {FIRST - 1, FIRST, 127} <= set(ids.flatten().tolist())
    for variant in (model, full):
        causal_loss(variant, ids).backward()
    assert causal_loss(model, ids).item() == causal_loss(full, ids).item()
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    assert isinstance(embedding, NewRowEmbedding)
    assert isinstance(head, NewRowHead)
    assert (embedding.new_rows is head.new_rows) == tied
    wanted = full.get_input_embeddings().weight.grad[FIRST:]
    assert torch.allclose(embedding.new_rows.grad, wanted, atol=1e-7)
    assert wanted.abs().max() > 1e-3
    assert torch.allclose(
        head.new_rows.grad, full.get_output_embeddings().weight.grad[FIRST:], atol=1e-7
    )
    assert_alone_trained(model, "new_rows", tied)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_table_is_counted_once(tied):
    model = tiny_model("llama", tie_word_embeddings=tied)
    before = count_parameters(model)
    report = inject(model, MoRAConfig(rank=2, new_rows_from=FIRST))
    assert count_parameters(model) == before + report.trainable_params
    move_base(model, "cpu", torch.bfloat16)
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied
    assert head.weight.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def extended(user):
    corpus = load_corpus([str(user.train)], flag="--corpus")
    extend_vocabulary(user.model, corpus, 40, user.root / "extended")
    return replace(user, model=user.root / "extended")


def test_a_run_trains_resumes_and_exports_new_rows(extended, tmp_path):
    """Two ranks train as one, with a merge and a resume in the middle. The exported model is
    the live one; old rows keep their bits.
    """
    base = BaseCheckpoint.open(extended.model)
    first = read_json(extended.model / EXTENSION_JSON)["first_row"]
    out, _ = merged_and_resumed(extended, tmp_path, "--train_new_embeddings")
    alone = ("--train_new_embeddings", MERGING, "--per_device_train_batch_size 4")
    run(1, extended.flags(tmp_path / "one", *alone))
    assert_close_losses(out, tmp_path / "one")
    report = export_merged(out, tmp_path / "merged", verify=True)
    assert report.replaced == 2
    assert report.cycles == 1
    live = load_adapter(extended.model, out)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    text = json.loads(extended.train.read_text().splitlines()[0])["text"]
    ids = torch.tensor([load_tokenizer(extended.model)(text)["input_ids"][:100]])
    assert (ids >= first).any()
    with torch.no_grad():
        assert torch.allclose(live(ids).logits, merged(ids).logits, atol=1e-5)
    assert (tmp_path / "merged" / EXTENSION_JSON).is_file()
    for key in TABLES:
        table = merged.state_dict()[key]
        was = base.read(key)
        assert torch.equal(table[:first], was[:first]), key
        assert not torch.equal(table[first : first + 40], was[first : first + 40]), key


def test_a_head_keeps_its_bias():
    table = torch.nn.Linear(4, 128)
    x = torch.randn(3, 4)
    head = NewRowHead(table, torch.nn.Parameter(table.weight.data[FIRST:]))
    assert_close(head(x), table(x))


# -- plans and errors ------------------------------------------------------------------


def test_a_dry_run_counts_new_rows(extended, out, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")

    def counted(*flags):
        """The trainable parameters that a dry run prints."""
        train(parse(extended.flags(out, "--dry_run", *flags)))
        printed = re.search(r"trainable ([\d,]+) ", capsys.readouterr().out)
        assert printed is not None
        return int(printed[1].replace(",", ""))

    without = counted()
    tokens_, width = BaseCheckpoint.open(extended.model).read(TABLES[0]).shape
    new_rows = tokens_ - read_json(extended.model / EXTENSION_JSON)["first_row"]
    for more, elements in (
        (["--train_embedding_rank", "3"], 3 * (tokens_ + width)),
        (["--train_new_embeddings"], new_rows * width),
    ):
        assert counted(*more) == without + 2 * elements  # the head is not tied


class Scaled(torch.nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 2


class Softmax(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x).softmax(-1)


UNFIT = """
{embedding_rank: 2, train_embeddings: true} | `embedding_rank` keeps embeddings and head frozen
{embedding_rank: 2, train_head: true} | `embedding_rank` keeps embeddings and head frozen
{embedding_rank: 2, new_rows_from: 9} | `embedding_rank`: the embeddings are a NewRowEmbedding
{new_rows_from: 128} | none from 128 on is new
"""


@each_row("config, message", UNFIT)
def test_configs_that_do_not_fit_are_refused(config, message):
    with user_error(message):
        inject(tiny_model("llama"), MoRAConfig(rank=2, **parsed(config)))


def test_models_without_suitable_embeddings_are_refused():
    last_row = MoRAConfig(rank=2, new_rows_from=127)
    assert inject(tiny_model("llama"), last_row).other_trainable_params == 2 * 32
    for change, message in (
        ({"set_input_embeddings": Scaled(128, 32)}, "the embeddings are a Scaled"),
        ({"set_output_embeddings": Softmax(32, 128)}, "the output head is a Softmax"),
        (
            {"set_output_embeddings": None},
            "the output head is a NoneType, no linear layer",
        ),
    ):
        model = tiny_model("llama")
        for setter, module in change.items():
            getattr(model, setter)(module)
        with user_error(f"`new_rows_from`: {message}"):
            inject(model, MoRAConfig(rank=2, new_rows_from=FIRST))
    with user_error(r"low_rank has 9 rows, and the base a table of \(6, 2\)"):
        with_product(torch.zeros(6, 2), torch.zeros(9, 1))


def test_a_model_without_new_rows_is_refused(user, out):
    message = validation_errors_of(user.flags(out, "--train_new_embeddings"))
    assert message.endswith("so it was not written by mora-ds extend-vocab")
