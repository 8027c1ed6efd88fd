"""Runs for the tests of tensor parallelism: one process, and the same on t x dp ranks."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch.testing import assert_close

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import frozen_buffers, inject, mora_layers
from mora_ds.data.documents import Documents
from mora_ds.engine import zero
from mora_ds.engine.initialize import initialize
from mora_ds.models.attention import use_document_attention
from mora_ds.models.loss import token_nll
from tests.helpers.engines import ACCUMULATION, ds_config, plain_steps
from tests.helpers.models import causal_loss, enable_checkpointing, tiny_model, tokens

STEPS = 3
BATCHES = 2
"""Sequences of a micro-batch, over all replicas."""

Case = dict[str, Any]
"""family, checkpointing, model (changes of its config), documents (whether rows hold
several, and split models attend by them), and everything else for `MoRAConfig`."""
OWN_KEYS = ("family", "checkpointing", "model", "documents")


def config_of(case):
    settings = {key: value for key, value in case.items() if key not in OWN_KEYS}
    return MoRAConfig(**{"rank": 4, "operator": "share", **settings})


def model_of(case):
    """A tiny model whose MoRA matrices are not zero, and whose norms and biases are not
    ones and zeros.
    """
    model = tiny_model(case["family"], **case.get("model", {}))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    if case.get("checkpointing"):
        enable_checkpointing(model)
    inject(model, config_of(case))
    for layer in mora_layers(model).values():
        layer.mora_matrix.data = 0.02 * torch.randn(
            layer.mora_matrix.shape, generator=generator
        )
    return model.train()


def base_in_memory(model):
    """(a base to merge into, keys) for a model that was never saved: copies of its frozen
    weights.
    """
    copies = {name: tensor.clone() for name, tensor in frozen_buffers(model).items()}
    return SimpleNamespace(read=copies.__getitem__, release=lambda: None), {
        name: name for name in copies
    }


def batches(step):
    """(ACCUMULATION, BATCHES, T)."""
    return tokens(BATCHES * ACCUMULATION, seed=step).view(ACCUMULATION, BATCHES, -1)


def loss_of(case, model, ids):
    """Mean loss over the tokens of rows that are one document each, or several."""
    if not case.get("documents"):
        return causal_loss(model, ids)
    positions = (torch.arange(ids.shape[1]) % 7).expand(len(ids), -1).contiguous()
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1), "position_ids": positions}
    return (
        token_nll(model, {**batch, "documents": Documents.of(positions)}) / ids.numel()
    )


def plain_run(case):
    """One process, no DeepSpeed."""
    model = model_of(case)
    logits_before = logits(model)

    def losses_of(step):
        return (loss_of(case, model, ids) / ACCUMULATION for ids in batches(step))

    return {"logits": logits_before, **plain_steps(model, losses_of, STEPS)}


def start(case, degree, more=None, **zero_settings):
    """(engine, replica, replicas) of this rank. `more`: changes of DeepSpeed's config."""
    replicas = dist.get_world_size() // degree
    config = ds_config(3, BATCHES // replicas)
    config["zero_optimization"].update(zero_settings)
    config.update(more or {})
    model = model_of(case)
    if case.get("documents"):
        use_document_attention(model)
    engine, *_ = initialize(model=model, config=config, tensor_parallel_size=degree)
    return engine, dist.get_rank() // degree, replicas


def split_run(case, degree, steps=STEPS, **zero_settings):
    """The same on this rank of t x dp. `gradients` and `values` are put together, as one
    process has them.
    """
    engine, replica, replicas = start(case, degree, **zero_settings)
    micro = BATCHES // replicas
    results = {"losses": [], "norms": [], "logits": logits(engine)}
    for step in range(steps):
        total = 0.0
        for index, ids in enumerate(batches(step)):
            loss = loss_of(case, engine, ids[replica * micro :][:micro])
            engine.backward(loss)
            if step == 0 and index == ACCUMULATION - 1:
                results["gradients"] = unsharded(engine, safe_get_full_grad)
            engine.step()
            total += loss.item() / ACCUMULATION
        mean = torch.tensor(total, dtype=torch.float64)
        dist.all_reduce(mean)
        results["losses"].append(mean.item() / dist.get_world_size())
        results["norms"].append(zero.gradient_norm(engine))
    results["values"] = unsharded(engine, lambda parameter: zero.full_fp32(parameter))
    return results


def unsharded(engine, get):
    layers = {
        f"{name}.mora_matrix": layer
        for name, layer in mora_layers(engine.module).items()
    }
    tensors = {}
    for name, parameter in engine.module.named_parameters():
        value = get(parameter).clone()
        tensors[name] = (
            layers[name].split.unshard(value)
            if name in layers and layers[name].split
            else value
        )
    return tensors


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens(1, seed=99), use_cache=False).logits


def assert_same_run(results, expected, where=""):
    def assert_same(mine, theirs, rtol, atol=0.0):
        assert_close(
            mine, theirs, rtol=rtol, atol=atol, msg=lambda text: f"{where} {text}"
        )

    assert_same(results["losses"], expected["losses"], rtol=1e-6)
    assert_same(results["logits"], expected["logits"], rtol=0, atol=2e-6)
    first, *later = results["norms"]
    first_expected, *later_expected = expected["norms"]
    assert_same(first, first_expected, rtol=2e-6)
    # Adam has moved the MoRA matrices: a rounding in the first step is larger there
    assert_same(later, later_expected, rtol=1e-4)
    assert results["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        error = (results["gradients"][name] - gradient).norm() / gradient.norm()
        assert error <= 1e-5, (where, name, error.item())
    assert_same(results["values"], expected["values"], rtol=1e-4, atol=2e-5)
