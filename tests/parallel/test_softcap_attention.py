"""Capped attention in blocks is transformers' eager attention, and keeps no scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from mora_ds.parallel import softcap_attention
from mora_ds.parallel.softcap_attention import use_capped_attention
from tests.helpers.models import causal_loss, tiny_model, tokens

LENGTH = 40
"""Longer than the sliding window of the tiny models, and than three blocks of queries."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softcap_attention, "QUERIES", 12)


def model_of(cap: float) -> Any:
    """Gemma 2 with scores of about 1."""
    model = tiny_model("gemma2", attn_logit_softcapping=cap)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 20
        layer.self_attn.k_proj.weight.data *= 20
    return model


def gradients(model: Any, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    loss = causal_loss(model, ids)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_a_model_computes_the_same_with_it() -> None:
    """Sliding and full layers, grouped key-value heads; scores large enough for the cap to matter."""
    eager, ours = model_of(0.5), model_of(0.5)
    assert use_capped_attention(ours) and ours.config._attn_implementation == softcap_attention.NAME
    ids = tokens(2, LENGTH)
    (loss, found), (wanted, expected) = gradients(ours, ids), gradients(eager, ids)
    uncapped, _ = gradients(model_of(1e6), ids)
    assert loss == pytest.approx(wanted, abs=1e-6) and abs(uncapped - wanted) > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: name + text)


def test_models_that_do_not_cap_are_left_alone() -> None:
    model = tiny_model("llama")
    assert not use_capped_attention(model) and model.config._attn_implementation == "sdpa"
    plain = tiny_model("gemma2", attn_logit_softcapping=None)
    assert not use_capped_attention(plain) and plain.config._attn_implementation == "eager"


def test_a_second_model_leaves_the_registry_as_it_is() -> None:
    """Sequence parallelism puts a fork before it, once a process."""
    use_capped_attention(model_of(0.5))
    registered = ALL_ATTENTION_FUNCTIONS[softcap_attention.NAME]

    def fork(*args: Any, **kwargs: Any) -> Any:
        return registered(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(softcap_attention.NAME, fork)
    try:
        assert use_capped_attention(model_of(0.5))
        assert ALL_ATTENTION_FUNCTIONS[softcap_attention.NAME] is fork
    finally:
        ALL_ATTENTION_FUNCTIONS.register(softcap_attention.NAME, registered)


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_of_the_size_of_the_scores_is_kept(masked: bool) -> None:
    module = tiny_model("gemma2").model.layers[0].self_attn
    shapes = ((1, 4, LENGTH, 16), (1, 2, LENGTH, 16), (1, 2, LENGTH, 16))
    query, key, value = (torch.randn(shape, requires_grad=True) for shape in shapes)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, _ = softcap_attention.capped_attention(
            module, query, key, value, causal if masked else None, scaling=0.25, softcap=1.0
        )
    assert max(kept, default=0) <= 4 * LENGTH * 16
    zero = torch.zeros(LENGTH, LENGTH).masked_fill(~causal, torch.finfo(torch.float32).min)
    expected, _ = eager_attention_forward(module, query, key, value, zero, scaling=0.25, softcap=1.0)
    torch.testing.assert_close(out, expected)


def test_queries_that_follow_cached_keys_see_all_of_these() -> None:
    """As a model's do while it generates, which is given no mask then."""
    module = nn.Module().eval()
    query, key, value = (torch.randn(2, heads, LENGTH, 16) for heads in (4, 2, 2))
    expected, _ = softcap_attention.capped_attention(module, query, key, value, None, softcap=1.0)
    for last in (1, 20):
        found, _ = softcap_attention.capped_attention(module, query[:, :, -last:], key, value, None, softcap=1.0)
        torch.testing.assert_close(found, expected[:, -last:])


def test_it_drops_weights_in_training_only_and_scales_by_the_heads_size() -> None:
    module = nn.Module()
    query = torch.randn(1, 2, LENGTH, 4)

    def attend(dropout: float, **given: float) -> Tensor:
        torch.manual_seed(0)
        return softcap_attention.capped_attention(module, query, query, query, None, dropout, **given)[0]

    kept = attend(0.0, scaling=0.5)
    assert torch.equal(attend(0.0), kept)
    assert not torch.allclose(attend(0.5), kept)
    module.eval()
    assert torch.equal(attend(0.5), kept)
