"""Attention by documents is dense attention in every family: losses and gradients, at one
row and at several.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from mora_ds.adapters.inject import mora_layers
from mora_ds.models import attention
from mora_ds.models.attention import (
    NAME,
    Scores,
    attention_of,
    by_documents,
    model_inputs,
    prefer_document_attention,
    use_document_attention,
    why_dense,
)
from mora_ds.models.loss import token_nll
from tests.helpers.batches import LAYOUTS, batch_of
from tests.helpers.models import FAMILIES, MASKLESS, adapted_model, tiny_model, tokens
from tests.helpers.pairwise import pairwise
from tests.helpers.tables import each_row, parsed


def model_of(family, checkpointing=False):
    """Weights large enough that attention is not uniform."""
    model = adapted_model(family, checkpointing)
    for name, parameter in model.named_parameters():
        if "norm" not in name and ".ln_" not in name:
            parameter.data *= 3
    return model.train()


def losses_and_gradients(model, batch):
    loss = token_nll(model, batch) / (batch["labels"] != -100).sum()
    loss.backward()
    return loss.item(), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


@pairwise(
    {"family": list(FAMILIES), "rows": list(LAYOUTS), "checkpointing": [False, True]}
)
def test_documents_are_dense_attention(family, rows, checkpointing):
    model = model_of(family, checkpointing)
    use_document_attention(model)
    assert attention_of(model) == NAME
    assert why_dense(model.config, None) is None
    assert_same_step(model, model_of(family), batch_of(rows))


def assert_same_step(model, dense, batch):
    """The loss and the gradients of both."""
    expected, wanted = losses_and_gradients(dense, batch)
    loss, gradients = losses_and_gradients(model, batch)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    assert len(gradients) >= len(mora_layers(model))
    for name, gradient in gradients.items():
        scale = float(wanted[name].abs().max())
        assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5 * scale)


class OwnConfig(LlamaConfig):
    """A config as in code that comes with a model."""


DENSE = """
llama | {is_causal: false} | the model's attention is not causal
gemma3_text | {use_bidirectional_attention: true} | the model's attention is not causal
bloom | {} | transformers calls the attention of BloomForCausalLM directly
# though one is chosen
stablelm | {} | transformers calls the attention of StableLmForCausalLM directly
# of its text model
llama4 | {} | the model has layers of the type chunked_attention
"""


@each_row("kind, settings, reason", DENSE)
def test_attention_that_must_stay_dense_has_a_reason(kind, settings, reason):
    config = AutoConfig.for_model(kind, **parsed(settings))
    assert why_dense(config, None) == reason
    assert why_dense(config, "eager") == "--attn_implementation eager reads masks"
    assert why_dense(OwnConfig(), None) == "the model's code is not in transformers"


def test_document_attention_is_used_where_the_model_supports_it():
    """FlashAttention stays, and without the option it gets no documents."""
    batch = batch_of(4)
    assert "documents" not in model_inputs(tiny_model(), batch)
    model = prefer_document_attention(tiny_model())
    engine = SimpleNamespace(module=model)
    assert attention_of(model) == NAME
    assert model_inputs(engine, batch)["documents"] is batch["documents"]
    assert model_inputs(model, {"input_ids": batch["input_ids"]}).keys() == {
        "input_ids",
        "use_cache",
    }
    config = AutoConfig.for_model("bloom", **MASKLESS["bloom"])
    bloom = prefer_document_attention(AutoModelForCausalLM.from_config(config))
    assert attention_of(bloom) != NAME
    assert "documents" not in model_inputs(bloom, batch)
    flash_model = prefer_document_attention(with_flash_attention(tiny_model()))
    assert "documents" not in model_inputs(flash_model, batch)
    assert attention_of(flash_model) == "flash_attention_2"


def with_flash_attention(model):
    model.config._attn_implementation_internal = "flash_attention_2"
    return model


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_padding_and_caches_are_as_in_the_models_own_attention(family, monkeypatch):
    """A model that attends by documents also generates: sinks, capped scores and windows
    included.
    """
    monkeypatch.setattr(attention, "QUERIES", 20)
    original = tiny_model(family).eval()
    model = tiny_model(family).eval()
    for variant in (original, model):
        for name, parameter in variant.named_parameters():
            if "norm" not in name:
                parameter.data *= 3
    use_document_attention(model)
    ids = tokens(2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :9] = 0
    with torch.no_grad():
        outputs, wanted = (
            variant(ids, attention_mask=mask).logits[mask.bool()]
            for variant in (model, original)
        )
        assert_close(outputs, wanted, rtol=1e-4, atol=1e-4)
        full = original(ids).logits
        cache = None
        chunk_logits = []
        for chunk in ids.split([4, 25, 1], dim=1):
            output = model(chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            chunk_logits.append(output.logits)
        assert_close(torch.cat(chunk_logits, dim=1), full, rtol=1e-4, atol=1e-4)


# -- FlashAttention --------------------------------------------------------------------


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
    """A stand-in for `flash_attn_varlen_func`: (N, H, D), documents by their bounds."""
    assert options["causal"]
    assert cu_seqlens_q is cu_seqlens_k
    assert cu_seqlens_q.dtype is torch.int32
    lengths = cu_seqlens_q.diff()
    assert int(cu_seqlens_q[-1]) == len(q)
    assert options["max_seqlen_q"] == options["max_seqlen_k"] == int(lengths.max())
    window = options["window_size"][0] + 1 if "window_size" in options else None
    return by_documents(
        q, k, v, tuple(lengths.tolist()), window, Scores(options["softmax_scale"])
    )


def unused(*args, **kwargs):
    raise AssertionError("rows were not taken for documents")


@pytest.mark.parametrize("rows", LAYOUTS)
def test_flash_attention_is_given_the_documents_of_all_rows(rows, monkeypatch):
    """transformers' own code around a stand-in for the kernel: it takes rows for packed
    ones at one row only, but flattens any number of them if it gets the bounds."""
    supports = {
        name: name in ("dropout_p", "window_size", "max_seqlen_q", "max_seqlen_k")
        for name in (
            "dropout_p",
            "window_size",
            "deterministic",
            "softcap",
            "s_aux",
            "learnable_sink",
            "block_table",
            "page_table",
            "cache_seqlens",
            "max_seqlen_q",
            "max_seqlen_k",
        )
    }
    process = partial(flash._process_flash_attention_kwargs, supports_mapping=supports)
    kernels = (unused, varlen, unused, unused, unused), (process, process)
    # fp32
    monkeypatch.setattr(
        "transformers.integrations.flash_attention.get_target_dtype", lambda *args: None
    )
    monkeypatch.setattr(
        flash, "lazy_import_flash_attention", lambda *args, **kwargs: kernels
    )
    batch = batch_of(rows)
    model = with_flash_attention(model_of("mistral"))
    use_document_attention(model)
    assert attention_of(model) == "flash_attention_2"
    assert_same_step(model, model_of("mistral"), batch)
    del batch["documents"]
    with pytest.raises(KeyError, match="documents"):
        token_nll(model, batch)
    untold = with_flash_attention(model_of("mistral"))
    with pytest.raises(AssertionError, match="rows were not taken for documents"):
        token_nll(untold, batch_of(4))
