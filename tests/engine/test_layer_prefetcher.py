"""A base in host memory, copied to buffers in turn: the same numbers to the bit as a base
on the device.

The device is another buffer of the CPU. Its copies come as late as the prefetcher permits
(`Late`) or at once.
"""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import nn
from transformers import AutoConfig

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import frozen_buffers, inject, mora_layers
from mora_ds.adapters.quantized import base_bits_of
from mora_ds.engine import layer_prefetcher
from mora_ds.engine.device import BUFFERS
from mora_ds.engine.host_copies import Copies
from mora_ds.engine.initialize import initialize
from mora_ds.engine.layer_prefetcher import prefetcher_of, stream_base
from mora_ds.engine.traffic import CollectiveCounter
from mora_ds.models.decoder_layers import find_decoder_layers, weights_of_layers
from mora_ds.planning.step import Streamed, Work, planned_model
from tests.helpers.engines import ds_config, rewrite, trained_values
from tests.helpers.errors import run_error, user_error
from tests.helpers.models import (
    FAMILIES,
    causal_loss,
    enable_checkpointing,
    micro_step,
    tiny_model,
    tokens,
)
from tests.helpers.pool import run_pooled
from tests.helpers.resume import assert_same_tensors

LAYERS = 5
CPU = torch.device("cpu")


class Late(Copies):
    """Copies when something waits for them; until then a buffer holds numbers that would be
    noticed.
    """

    def __init__(self):
        self.waiting = []

    def start(self, pairs):
        event = object()
        pending = list(pairs)
        for target, _ in pending:
            target.fill_(float("nan") if target.is_floating_point() else 99)
        self.waiting.append((event, pending))
        return event

    def wait(self, event):
        known = [queued for queued, _ in self.waiting]
        for _, pairs in self.waiting[
            : known.index(event) + 1
        ]:  # a stream copies in order
            super().start(pairs)
        del self.waiting[: known.index(event) + 1]

    def finish(self):
        if self.waiting:
            self.wait(self.waiting[-1][0])


CASES = yaml.safe_load("""
- {checkpointing: true, bf16: true, accumulation: 4}
- {adapter: {base_bits: 8, operator: share, compute: weight}}
""")
MORE = yaml.safe_load("""
- {accumulation: 4}
- {checkpointing: true}
- {bf16: true}
- {checkpointing: true, adapter: {base_bits: 8}, bf16: true}
- {adapter: {operator: decouple, compute: weight}}
- {adapter: {operator: rotate, compute: weight}}
- {family: gpt2, adapter: {base_bits: 8}}
- {family: qwen2, adapter: {operator: truncate}, accumulation: 4}
- {family: gpt2, checkpointing: true, stage: 1}
- {family: mixtral, bf16: true, checkpointing: true}
- {family: mixtral, bf16: true, adapter: {target_modules: [all-linear, experts], base_bits: 8}}
- {family: gemma2, adapter: {train_norms: true, train_embeddings: true}, stage: 2}
- {family: gpt_neox, stage: 1}
- {adapter: {base_bits: 4, compute: weight}, bf16: true, checkpointing: true}
""")


def trained(case, streamed):
    """Two steps of this rank, with a change of the base in host memory between them."""
    accumulation = case.get("accumulation", 1)
    torch.manual_seed(0)
    model = tiny_model(case.get("family", "llama"), num_hidden_layers=LAYERS)
    if case.get("checkpointing"):
        enable_checkpointing(model)
    inject(model, MoRAConfig(rank=4, **case.get("adapter", {})))
    bf16 = {"enabled": case.get("bf16", False)}
    config = ds_config(case.get("stage", 3), 2, accumulation, bf16=bf16)
    with patch.object(layer_prefetcher, "copies_for", lambda device: Late()):
        engine, *_ = initialize(model=model, config=config, base_on_host=streamed)
    prefetcher = prefetcher_of(model)
    storages = storages_read(model)
    losses = []
    slots = prefetcher.slots if prefetcher else []
    counter = CollectiveCounter([*frozen_buffers(model).values(), *slots])
    with counter.counting():
        for step in range(2 * accumulation):
            if step == accumulation:
                change(model)
            ids = tokens(2, seed=10 * step + dist.get_rank())
            losses.append(micro_step(engine, ids).item())
    engine.eval()
    with torch.no_grad():
        losses.append(causal_loss(engine, tokens(2, seed=99)).item())
    return {
        "losses": losses,
        "values": trained_values(engine),
        "frozen": {
            name: tensor.clone() for name, tensor in frozen_buffers(model).items()
        },
        "sent": counter.base_bytes,
        "used": len(storages),
    }


def change(model):
    """Changes the weights as a merge does."""
    if prefetcher := prefetcher_of(model):
        prefetcher.invalidate()
    layers = mora_layers(model)

    def grow(name, _):
        if base_bits_of(model) != 4:  # which no merge writes
            layers[name].rebuild_weight(layers[name].read().float() * 1.5, [])

    rewrite(model, grow)


def storages_read(model):
    """A set that fills, while the model runs, with the storages that hold the weights of
    linear layers within its decoder layers.
    """
    prefix = next(iter(find_decoder_layers(model))).rpartition(".")[0]
    storages = set()

    def note(layer, *_):
        storages.add(layer.weight.untyped_storage().data_ptr())

    for name, layer in mora_layers(model).items():
        if name.startswith(prefix):
            layer.register_forward_hook(note, prepend=True)
    return storages


def both(cases):
    return [(trained(case, False), trained(case, True)) for case in cases]


@pytest.mark.parametrize(
    "cases", [CASES, pytest.param(MORE, marks=pytest.mark.heavy(seconds=40))]
)
def test_a_streamed_base_is_a_resident_one_to_the_bit(cases):
    if cases is MORE:
        pytest.importorskip("bitsandbytes", reason="needs the extra bits4")
    for results in run_pooled(2, both, cases):
        for case, (resident, streamed) in zip(cases, results, strict=True):
            assert streamed["losses"] == resident["losses"], case
            assert_same_tensors(streamed["values"], resident["values"], case)
            assert_same_tensors(streamed["frozen"], resident["frozen"], case)
            assert streamed["sent"] == 0
            assert streamed["used"] == BUFFERS, case


# -- the prefetcher alone --------------------------------------------------------------------


def streamed_model(family="llama", bits=16):
    model = tiny_model(family, num_hidden_layers=LAYERS)
    inject(model, MoRAConfig(rank=4, base_bits=bits))
    return model, stream_base(model, CPU)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_micro_batch_copies_what_buffers_do_not_hold(checkpointing):
    """And as many bytes as the plan says, which a buffer that held another layer than it
    should would exceed.
    """
    model, prefetcher = streamed_model()
    if checkpointing:
        enable_checkpointing(model)
    plan = Streamed.of(model)
    for _ in range(3):
        before = prefetcher.copied
        causal_loss(model.train(), tokens(2)).backward()
    assert (
        prefetcher.copied - before
        == plan.copied
        == 2 * (LAYERS - BUFFERS) * plan.layers[0]
    )
    assert sum(slot.nbytes for slot in prefetcher.slots) == plan.on_device
    config = AutoConfig.for_model(
        "llama", **{**FAMILIES["llama"], "num_hidden_layers": LAYERS}
    )
    work = Work(config, MoRAConfig(rank=4), 16, dtype=torch.float32)
    assert Streamed.of(planned_model(work)) == plan


def test_an_evaluation_copies_each_layer_once():
    model, prefetcher = streamed_model()
    with torch.no_grad():
        for _ in range(3):
            before = prefetcher.copied
            causal_loss(model, tokens(2))
    assert (
        LAYERS - 2
        <= (prefetcher.copied - before) / Streamed.of(model).layers[0]
        <= LAYERS
    )


def test_a_layer_that_is_used_twice_in_turn_is_read_again_after_a_change():
    """As the only layer of a model is, on both sides of a merge."""
    losses = []
    for streamed in (False, True):
        model = tiny_model(num_hidden_layers=1)
        inject(model, MoRAConfig(rank=4))
        if streamed:
            stream_base(model, CPU)
        with torch.no_grad():
            before = causal_loss(model, tokens(2))
            change(model)
            losses.append(causal_loss(model, tokens(2)))
        assert losses[-1] != before
    assert losses[0] == losses[1]


def test_no_copy_reads_host_memory_any_more_when_it_may_be_written():
    copies = Late()
    with patch.object(layer_prefetcher, "copies_for", lambda device: copies):
        _, prefetcher = streamed_model()
    prefetcher.copy(0)
    prefetcher.copy(1)
    assert len(copies.waiting) == 2
    prefetcher.invalidate()
    assert not copies.waiting


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_modules_hold_host_memory_outside_of_their_forward(family, bits):
    model, prefetcher = streamed_model(family, bits)
    host = frozen_buffers(model)
    contents = {name: tensor.clone() for name, tensor in host.items()}
    causal_loss(model.train(), tokens(2)).backward()
    broken = next(iter(mora_layers(model).values()))
    with (
        patch.object(type(broken), "forward", side_effect=ValueError),
        pytest.raises(ValueError),
    ):
        causal_loss(model, tokens(2))
    for name, tensor in frozen_buffers(model).items():
        assert tensor is host[name], name
        assert torch.equal(tensor, contents[name]), name
    names = layer_prefetcher.names_on_host(model)
    with prefetcher.device_bound():
        aside = frozen_buffers(model)
        storages = {aside[name].untyped_storage().data_ptr() for name in names}
    assert storages == {slot.data_ptr() for slot in prefetcher.slots}
    with torch.autograd.graph.disable_saved_tensors_hooks("none is left"):
        pass


def test_a_saved_weight_is_there_again_when_backward_asks_for_it():
    """Whatever has run since: here another forward pass of all layers, and an
    evaluation.
    """
    model, _ = streamed_model()
    causal_loss(model.train(), tokens(2)).backward()
    expected = gradients(model)
    model.zero_grad()
    loss = causal_loss(model, tokens(2))
    causal_loss(model, tokens(2, seed=5)).backward()
    model.zero_grad()
    with torch.no_grad():
        causal_loss(model, tokens(2, seed=6))
    loss.backward()
    assert_same_tensors(gradients(model), expected)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_a_copy_that_is_being_used_is_not_replaced():
    _, prefetcher = streamed_model()
    prefetcher.before_forward(0)
    with run_error("layer 2 runs"):
        prefetcher.copy(2)
    prefetcher.after_forward()


def test_tied_tensors_stay_on_the_device():
    model = tiny_model("llama", num_hidden_layers=3)
    model.small = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    inject(model, MoRAConfig(rank=4, target_modules=("q_proj",)))
    layers = find_decoder_layers(model)
    first, _, last = model.model.layers
    last.input_layernorm.weight = first.input_layernorm.weight
    names = {name for tensors in weights_of_layers(model).values() for name in tensors}
    assert list(layers) == [f"model.layers.{index}" for index in range(3)]
    assert "model.layers.1.input_layernorm.weight" in names
    assert "model.layers.1.mlp.up_proj.weight" in names
    assert not names & {
        f"model.layers.{index}.input_layernorm.weight" for index in (0, 2)
    }
    assert not [name for name in names if "embed" in name or "lm_head" in name]


def test_a_model_without_a_list_of_layers_is_refused():
    model = tiny_model("llama", num_hidden_layers=3)
    inject(model, MoRAConfig(rank=4))
    model.model.layers = nn.ModuleList([*model.model.layers, nn.Identity()])
    with user_error(
        r"LlamaForCausalLM has no list of 3 decoder layers.*--base_device device"
    ):
        weights_of_layers(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gpu_computes_the_same_with_weights_in_locked_memory(checkpointing):
    device = torch.device("cuda")
    all_gradients = []
    for streamed in (False, True):
        torch.manual_seed(0)
        model = tiny_model("llama", num_hidden_layers=LAYERS)
        inject(model, MoRAConfig(rank=4, operator="share"))
        if checkpointing:
            enable_checkpointing(model)
        if streamed:
            prefetcher = stream_base(model, device)
            assert all(
                tensor.is_pinned()
                for tensors in weights_of_layers(model).values()
                for tensor in tensors.values()
            )
            with prefetcher.device_bound():
                model.to(device)
            for _ in range(3):
                model.zero_grad()
                causal_loss(model.train(), tokens(2).to(device)).backward()
        else:
            model.to(device)
            causal_loss(model.train(), tokens(2).to(device)).backward()
        all_gradients.append(
            [parameter.grad.clone() for parameter in model.parameters()]
        )
    assert all(torch.equal(*pair) for pair in zip(*all_gradients, strict=True))
