"""The loss in chunks equals the model's own: values, gradients, evaluation, also under
ZeRO-3.
"""

from dataclasses import replace
from functools import wraps
from itertools import product
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject
from mora_ds.checkpoint.state import TrainerState
from mora_ds.data import IGNORED
from mora_ds.engine.initialize import initialize
from mora_ds.models.loss import (
    ChunkedHead,
    chunk_loss,
    chunked_head_of,
    is_frozen,
    sequence_nll,
    token_nll,
    unchunked_loss,
)
from mora_ds.train import pretrain
from mora_ds.train.preflight import logits_are_known
from tests.helpers.engines import ds_config
from tests.helpers.errors import user_error
from tests.helpers.gloo import run_alone
from tests.helpers.jobs import assert_close_losses, job, printed, refused, run
from tests.helpers.models import FAMILIES, enable_checkpointing, tiny_model, tokens
from tests.helpers.pool import run_pooled
from tests.helpers.resume import assert_same_run, interrupted_job, stop_and_resume
from tests.helpers.tables import heavy

CHUNK = 7  # divides neither rows nor batch

CAPPED = {"gemma2": {"final_logit_softcapping": 0.5}}
SCALED = {
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0, "tie_word_embeddings": False},
}
"""Families that cap or scale their logits."""


def model_of(family, train_head=True, targets=("all-linear",)):
    if family in SCALED:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **{**FAMILIES["llama"], **SCALED[family]})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    else:
        model = tiny_model(family, **CAPPED.get(family, {}))
    inject(model, MoRAConfig(rank=4, train_head=train_head, target_modules=targets))
    return model


def batch_of(rows=3, length=16):
    """Two documents a row, and padding."""
    ids = tokens(rows, length + 1)
    labels = ids[:, 1:].clone()
    positions = torch.arange(length).expand(rows, -1).clone()
    labels[:, length // 2 - 1] = labels[-1, -3:] = IGNORED
    positions[:, length // 2 :] -= length // 2
    return {"input_ids": ids[:, :-1], "labels": labels, "position_ids": positions}


def gradients(model, batch):
    model.zero_grad()
    nll = token_nll(model, batch)
    nll.backward()
    return nll.detach(), {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def assert_same(results, expected):
    assert_close(results[0], expected[0], rtol=1e-6, atol=0)
    assert results[1].keys() == expected[1].keys()
    for name, right in expected[1].items():
        assert_close(
            results[1][name],
            right,
            rtol=0,
            atol=1e-5 * max(1.0, right.abs().max().item()),
        )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "family, head",
    [
        *product(["llama", "qwen2"], ["trained", "frozen"]),
        *product(["gemma2", "gpt2", "gpt_neox", "cohere"], ["trained"]),
        *product(["mixtral", "granite"], ["frozen"]),
        ("llama", "adapted"),
    ],
)
def test_loss_and_gradients_are_the_models_own(family, head, checkpointing):
    targets = ["q_proj", "lm_head"] if head == "adapted" else ["all-linear"]
    model = model_of(family, head == "trained", targets)
    batch = batch_of()
    if checkpointing:
        enable_checkpointing(model)
    model.train()
    expected = gradients(model, batch)
    chunk_loss(model, CHUNK)
    assert_same(gradients(model, batch), expected)


def test_evaluation_with_and_without_chunks_is_equal():
    model = model_of("llama").eval()
    batch = batch_of()
    with torch.no_grad():
        expected = token_nll(model, batch)
        logits = model(batch["input_ids"]).logits
        chunk_loss(model, CHUNK)
        assert_close(token_nll(model, batch), expected, rtol=1e-6, atol=0)
        assert torch.equal(model(batch["input_ids"]).logits, logits)
        unchunked_loss(model)
        assert torch.equal(token_nll(model, batch), expected)


@pytest.mark.parametrize("dtype, near", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_gradients_through_a_frozen_head_in_half_precision(dtype, near):
    """The difference from fp32 is within the dtype's rounding, in fp16 with a scaled
    loss."""
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 20_000, bias=False).to(dtype).requires_grad_(False)
    hidden = torch.randn(5, 64).to(dtype)
    labels = torch.tensor([3, 9, IGNORED, 19_999, 0])
    exact = hidden.float().requires_grad_()
    F.cross_entropy(
        exact @ head.weight.float().T, labels, ignore_index=IGNORED, reduction="sum"
    ).backward()
    rows = hidden.clone().requires_grad_()
    chunked = ChunkedHead(head, lambda logits: logits, 2)
    losses = chunked.token_losses(lambda **_: head(rows), {"labels": labels})
    (losses.sum() * 2**12).backward()
    assert not rows.grad[2].any()
    error = (rows.grad.float() / 2**12 - exact.grad).norm() / exact.grad.norm()
    assert error <= near


def sizes_of_chunks(model):
    """A list that fills with the number of tokens of each call of the head's own
    forward.
    """
    project = model.lm_head.forward
    sizes = []

    def projected(hidden):
        sizes.append(hidden.shape[:-1].numel())
        return project(hidden)

    model.lm_head.forward = projected
    return sizes


@pytest.mark.parametrize("train_head, times", [(True, 2), (False, 1)])
def test_no_more_logits_than_a_chunk_are_ever_made(train_head, times):
    """Nothing of the size of logits is saved for backward, which computes them again if
    the head is trained."""
    model = model_of("llama", train_head)
    batch = batch_of()
    sizes = sizes_of_chunks(model)
    chunk_loss(model, CHUNK)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        nll = token_nll(model, batch)
    count = batch["labels"].numel()
    assert sum(sizes) == count
    assert max(saved) < count * model.config.vocab_size
    nll.backward()
    assert sum(sizes) == times * count
    assert max(sizes) == CHUNK


def test_a_frozen_head_on_a_cpu_computes_parts_of_one_size(monkeypatch):
    model = model_of("llama", train_head=False)
    batch = batch_of()
    expected = gradients(model, batch)
    monkeypatch.setattr("mora_ds.models.loss._CPU_TOKENS", CHUNK)
    sizes = sizes_of_chunks(model)
    chunk_loss(model)
    assert_close(gradients(model, batch), expected)
    assert sum(sizes) == batch["labels"].numel()
    assert CHUNK >= max(sizes) >= min(sizes) >= max(sizes) - 1


def test_a_chunk_follows_the_vocabulary_and_is_no_smaller_than_a_token():
    model = tiny_model()
    assert chunk_loss(model).chunk_tokens == 2**24 // 128
    on_device = tiny_model().to("meta")  # as on a GPU
    assert chunk_loss(on_device).chunk_tokens == 2**27 // 128
    model.config.vocab_size = 2**25
    assert chunk_loss(model).chunk_tokens == 1


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("train_head", [False, True])
def test_losses_are_summed_in_fp32(chunked, train_head):
    """The logits are in bf16, in which losses would have two digits."""
    model = model_of("llama", train_head).bfloat16()
    batch = batch_of()
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    logits = model(**inputs, use_cache=False).logits.double()
    labels = batch["labels"].flatten()
    expected = F.cross_entropy(
        logits.flatten(0, 1), labels, ignore_index=IGNORED, reduction="none"
    )
    if chunked:
        chunk_loss(model, CHUNK)
    rows = sequence_nll(model, batch)
    total = token_nll(model, batch)
    assert rows.dtype == total.dtype == torch.float32
    assert_close(rows.double(), expected.view(3, -1).sum(1), rtol=2e-6, atol=0)
    assert_close(total.double(), expected.sum(), rtol=2e-6, atol=0)


def test_a_pass_that_fails_leaves_the_head_as_it_was(monkeypatch):
    model = model_of("llama")
    batch = batch_of()
    logits = model(batch["input_ids"]).logits
    chunked = chunk_loss(model, CHUNK)
    assert chunked_head_of(model) is chunked
    assert chunked_head_of(SimpleNamespace(module=model)) is chunked
    failing = mock.Mock(side_effect=KeyError("of a chunk"))
    monkeypatch.setattr(chunked, "finish", failing)
    with pytest.raises(KeyError, match="of a chunk"):
        token_nll(model, batch)
    monkeypatch.undo()
    assert torch.equal(model(batch["input_ids"]).logits, logits)
    unchunked_loss(model)
    assert chunked_head_of(model) is None
    with chunked.recording() as outputs:
        model(batch["input_ids"])
    assert not outputs
    assert is_frozen(torch.nn.ReLU())
    assert not is_frozen(model.lm_head)
    assert not is_frozen(None)


def test_a_model_without_a_head_is_refused():
    with user_error("--chunked_loss: this model has no output head"):
        chunk_loss(tiny_model().model)


# -- ZeRO-3 ----------------------------------------------------------------------------


def zero3_gradients(family):
    """Gradients of the same batch on every rank, with the head sharded over the
    ranks."""
    model = model_of(family)
    batch = batch_of()
    engine, *_ = initialize(model=model, config=ds_config(3, 3, 1))
    chunk_loss(model, CHUNK)
    assert logits_are_known(engine)
    cut = model.register_forward_hook(
        lambda _, inputs, output: replace(output, logits=output.logits[..., :-1])
    )
    assert not logits_are_known(engine), "as of a model that cuts its padding off"
    cut.remove()

    def full_gradients():
        nll = token_nll(engine, batch)
        engine.backward(nll * 0.5)
        return nll.item(), {
            name: safe_get_full_grad(parameter).clone()
            for name, parameter in model.named_parameters()
        }

    first, gradient = full_gradients()
    engine.optimizer.zero_grad()
    # Once more, after gathering has recorded the order of the modules
    assert_close(full_gradients()[1], gradient, rtol=0, atol=1e-5)
    engine.step()
    with torch.no_grad():
        assert token_nll(engine, batch).item() < first
    return first, gradient


@pytest.mark.parametrize("family", [heavy("llama"), "qwen2"])
def test_a_trained_head_that_zero_3_shards(family):
    """llama: a head of its own; qwen2: tied to the embeddings, which are trained with
    it.
    """
    model = model_of(family)
    batch = batch_of()
    nll, expected = gradients(model, batch)
    assert any("lm_head" in name or "embed" in name for name in expected)
    for loss, halves in run_pooled(2, zero3_gradients, family):
        sharded = {name: 2 * half for name, half in halves.items()}
        assert_same((torch.tensor(loss), sharded), (nll, expected))


# -- complete runs ---------------------------------------------------------------------


def test_a_split_run_has_the_losses_of_one_process_without_chunks(user, tmp_path):
    reference = tmp_path / "reference"
    expected = run(1, user.flags(reference))
    for split in ("sequence", "tensor"):
        chunked = tmp_path / split
        summary = run(
            2, user.flags(chunked, f"--chunked_loss --{split}_parallel_size 2")
        )
        assert_close_losses(chunked, reference)
        after = expected["perplexity_after"]
        assert summary["perplexity_after"] == pytest.approx(after, rel=1e-5)


KEPT = "--max_steps 6 --save_steps 2 --merge_every 3 --restart_warmup_steps 1"


def unchunked_run(argv, step=None):
    """A run without chunks, stopped after `step` if one is given. For `run_ranks`."""
    pretrain.is_frozen = lambda head: False  # in this forked rank alone
    job(argv) if step is None else interrupted_job(argv, step)


def chunks_in(out):
    return TrainerState.read(out / "checkpoints/latest").chunked_loss


def test_a_run_keeps_its_way_of_computing_the_loss_to_the_bit(user, tmp_path):
    """A new run with a frozen head computes it in chunks; one that has begun with complete
    logits goes on with them.
    """
    new, resumed, old, gone_on = (
        tmp_path / name for name in ("new", "resumed", "old", "gone-on")
    )
    run(1, user.flags(new, KEPT))
    stop_and_resume(1, user.flags(resumed, KEPT), 4)
    assert_same_run(resumed, new)
    run_alone(unchunked_run, user.flags(old, KEPT))
    run_alone(unchunked_run, user.flags(gone_on, KEPT), 4)
    run(1, user.flags(gone_on, KEPT, "--resume_from_checkpoint auto"))
    assert_same_run(gone_on, old)
    assert_close_losses(new, old)
    assert chunks_in(new)
    assert chunks_in(resumed)
    assert not chunks_in(old)
    assert not chunks_in(gone_on)


def test_a_model_that_changes_its_logits_is_trained_without_chunks(user, tmp_path):
    out = tmp_path / "out"
    chunked = user.flags(tmp_path / "other", "--chunked_loss")
    text, (_, message) = run_alone(with_changed_logits, user.flags(out), chunked)
    reason = "this model changes the output of its head"
    assert f"loss: computed from all logits at once, because {reason}" in text
    assert f"--chunked_loss: {reason}" in message
    assert not chunks_in(out)


def with_changed_logits(argv, chunked):
    """The output of two runs whose model scales its logits in an unknown way, the
    second with --chunked_loss."""
    LlamaForCausalLM.forward = _scaled(LlamaForCausalLM.forward)  # in this rank alone
    return printed(argv), refused(chunked)


def _scaled(forward):
    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    return wraps(forward)(scaled)
