"""The attention of complete runs: what is chosen, and what dense attention stays. Resumed
runs: test_resume.
"""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from mora_ds.checkpoint.state import TrainerState
from mora_ds.config.arguments import from_flat
from mora_ds.config.data import ModelArguments
from mora_ds.models.attention import (
    NAME,
    attention_of,
    model_inputs,
    use_document_attention,
)
from mora_ds.models.loss import token_nll
from mora_ds.train.dry_run import implementation_of
from mora_ds.train.preflight import check_attention, check_document_mask, preflight
from tests.helpers.batches import batch_of
from tests.helpers.errors import user_error
from tests.helpers.jobs import assert_close_losses, finished_run
from tests.helpers.models import MASKLESS, tiny_model
from tests.helpers.tables import each_row

MORE = "--per_device_train_batch_size 4 --save_steps 2 --merge_every 3 --restart_warmup_steps 1"


@pytest.fixture(scope="module")
def by_documents(user, tmp_path_factory):
    return finished_run(1, user, tmp_path_factory, MORE)


@pytest.fixture(scope="module")
def dense(user, tmp_path_factory):
    return finished_run(1, user, tmp_path_factory, MORE, "--attn_implementation sdpa")


def attention_in(out):
    """The attention that the last checkpoint states."""
    return str(TrainerState.read(out / "checkpoints/latest").identity["attention"])


def test_a_run_attends_by_documents_and_its_losses_are_those_of_dense_attention(
    by_documents, dense
):
    assert attention_in(by_documents) == "documents"
    assert attention_in(dense) == "dense"
    assert_close_losses(by_documents, dense)


def test_dense_attention_is_what_it_was_to_the_bit():
    """The model is given what transformers reads, and nothing of it is replaced."""
    batch = batch_of(4)
    one = tiny_model("mistral")
    another = tiny_model("mistral")
    logits = one(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        use_cache=False,
    ).logits
    loss = F.cross_entropy(
        logits.flatten(0, 1).float(),
        batch["labels"].flatten(),
        ignore_index=-100,
        reduction="sum",
    )
    nll = token_nll(another, batch)
    assert torch.equal(nll, loss)
    assert attention_of(another) == "sdpa"
    assert model_inputs(another, batch).keys() == {
        "input_ids",
        "position_ids",
        "use_cache",
    }
    loss.backward()
    nll.backward()
    for mine, theirs in zip(one.parameters(), another.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


# -- what is chosen --------------------------------------------------------------------


CHOSEN = """
llama | auto | documents
llama | flash_attention_2 | flash_attention_2
llama | sdpa | sdpa
gpt_oss | auto | documents
gemma2 | auto | documents
bloom | auto | none
llama4_text | auto | none
mamba | auto | none
"""


@each_row("kind, asked_for, runs", CHOSEN)
def test_documents_wherever_the_model_can(kind, asked_for, runs):
    arguments = ModelArguments(attn_implementation=asked_for)
    implementation = implementation_of(arguments, AutoConfig.for_model(kind))
    assert implementation == {"documents": NAME, "none": None}.get(runs, runs)


# -- documents in batches of one row and of more ---------------------------------------


@pytest.mark.parametrize("rows", [1, 2])
def test_a_leak_at_one_batch_size_is_found(rows):
    """A stand-in for FlashAttention without bounds, which takes rows for packed ones where
    there is a single row.
    """
    model = tiny_model("llama").eval()
    for parameter in model.parameters():
        parameter.data *= 3
    forward = model.forward

    def leaks(input_ids, position_ids, **kwargs):
        if len(input_ids) == rows:
            position_ids = torch.arange(position_ids.shape[1]).expand_as(position_ids)
        return forward(input_ids=input_ids, position_ids=position_ids, **kwargs)

    check_document_mask(model)
    model.forward = leaks
    with user_error(f"batch size {rows}"):
        check_document_mask(model)


@pytest.mark.parametrize(
    "kind, flags",
    [
        ("opt", {"attn_implementation": "eager"}),
        ("bloom", {}),
        ("mamba", {}),
        ("lfm2", {}),
    ],
)
def test_documents_that_see_each_other_are_refused_with_the_flags_that_help(
    kind, flags
):
    config = AutoConfig.for_model(kind, **MASKLESS[kind])
    model = AutoModelForCausalLM.from_config(config)
    job = SimpleNamespace(
        engine=model,
        state=TrainerState(),
        loaded=SimpleNamespace(model=model),
        sequence=None,
    )
    with user_error("leave --attn_implementation at auto, or give --no_document_mask"):
        preflight(job, from_flat(flags))


def with_sinks():
    """Ones that matter, and weights large enough that attention is not uniform."""
    model = tiny_model("gpt_oss").eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)
        elif "norm" not in name:
            parameter.data *= 5
    return model


def test_attention_sinks_by_documents():
    """GPT-OSS, which takes no mask from the positions: its documents in one row are what
    each is alone.
    """
    with user_error("--no_document_mask"):
        check_attention(with_sinks(), document_mask=True)
    model = with_sinks()
    alone = with_sinks()
    batch = batch_of(4)
    use_document_attention(model)
    check_attention(model, document_mask=True)
    logits = model(**model_inputs(model, batch)).logits
    for row, begins in enumerate((batch["position_ids"] == 0).int()):
        edges = [*begins.nonzero().flatten().tolist(), len(begins)]
        documents = [batch["input_ids"][None, row, a:b] for a, b in pairwise(edges)]
        expected = torch.cat(
            [
                alone(input_ids=document, use_cache=False).logits[0]
                for document in documents
            ]
        )
        assert_close(logits[row], expected, rtol=1e-5, atol=1e-5)


def with_lost_window():
    """A model whose layers do not hand their attention the window of its config."""
    model = tiny_model("mistral")
    use_document_attention(model)
    check_attention(model, document_mask=False)
    for layer in model.model.layers:
        layer.self_attn.config = AutoConfig.for_model(
            "mistral", sliding_window=None, attn_implementation=NAME
        )
    return model


def test_a_window_that_does_not_reach_attention_is_noticed():
    with user_error("of its config to its attention: give --attn_implementation sdpa"):
        check_attention(with_lost_window(), document_mask=False)
