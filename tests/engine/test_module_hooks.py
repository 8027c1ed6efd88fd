"""ZeRO-3 without the hooks of modules that have nothing to gather: the same numbers to the
bit.
"""

from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import deepspeed
import pytest
import torch
import torch.distributed as dist

from mora_ds.adapters.inject import mora_layers
from mora_ds.engine import ds_config as ds_config_module
from mora_ds.engine import initialize as initialize_module
from mora_ds.engine import zero
from mora_ds.engine.initialize import initialize
from mora_ds.engine.module_hooks import call_in_backward
from mora_ds.engine.traffic import CollectiveCounter, nbytes_of
from tests.helpers.engines import ds_config, trained_values
from tests.helpers.models import (
    FAMILIES,
    causal_loss,
    micro_step,
    model_with_mora,
    tokens,
)
from tests.helpers.pool import run_pooled
from tests.helpers.resume import assert_same_tensors

SETTINGS = ("persistent", "some", "checkpointing", "embeddings", "sharded again")


def engine_of(setting, zero=None, **changes):
    torch.manual_seed(0)
    model = model_with_mora(
        setting if setting in FAMILIES else "gpt2" if setting == "some" else "llama",
        train_embeddings=setting == "embeddings",
        train_head=setting == "embeddings",
    )
    if setting in ("checkpointing", "sharded again", "sharded reentrant"):
        model.gradient_checkpointing_enable(
            {"use_reentrant": setting == "sharded reentrant"}
        )
    config = ds_config(3, 2, 2, **changes)
    numels = sorted(
        layer.adapter_weight.numel() for layer in mora_layers(model).values()
    )
    thresholds = {
        "persistent": 10**6,
        "checkpointing": 10**6,
        "some": numels[0],
        "embeddings": numels[-1],
    }
    threshold = {"stage3_param_persistence_threshold": thresholds.get(setting, 0)}
    config["zero_optimization"] |= {**threshold, **(zero or {})}
    return initialize(model=model, config=config)[0]


def trained(setting):
    """Losses and trained tensors after 3 steps, and how many modules have DeepSpeed's
    hooks.
    """
    engine = engine_of(setting)
    losses = []
    for step in range(6):
        ids = tokens(2, seed=10 * step + dist.get_rank())
        losses.append(micro_step(engine, ids).item())
    offload = engine.optimizer.parameter_offload
    hooked = {
        id(hooks)
        for handle in offload.forward_hooks
        if handle.id in (hooks := handle.hooks_dict_ref())
    }
    # A module has a dictionary of what runs before it, and one of what runs after it
    return losses, trained_values(engine), len(hooked) // 2


def with_and_without(setting, module=initialize_module, **replaced):
    """How many modules have DeepSpeed's hooks: with `replaced` in `module`, every one by
    default, and without it.
    """
    with patch.multiple(
        module, **(replaced or {"remove_unused_hooks": lambda engine: []})
    ):
        losses, values, everywhere = trained(setting)
    actual, actual_values, hooked = trained(setting)
    assert actual == losses
    assert_same_tensors(actual_values, values)
    return everywhere, hooked


def with_the_collectives_for_many_ranks():
    """Trains with them and without. The bytes of all reduce-scatters and of all
    all-reduces.
    """
    with CollectiveCounter().counting() as counter:
        with_and_without("sharded", ds_config_module, FEW_SLICES=0)
    return [counter.bytes["reduce_scatter_tensor"], counter.bytes["all_reduce"]]


def test_the_collectives_for_many_ranks_give_the_same_bits():
    for scattered, reduced in run_pooled(2, with_the_collectives_for_many_ranks):
        assert 0 < scattered <= reduced


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_is_the_same_to_the_bit_with_hooks_where_something_is_gathered(setting):
    for everywhere, hooked in run_pooled(2, with_and_without, setting):
        layers = len(
            mora_layers(model_with_mora("gpt2" if setting == "some" else "llama"))
        )
        assert everywhere > 2 * layers
        assert hooked == (3 if setting == "embeddings" else 1)


def families_with_and_without():
    return [(family, with_and_without(family)[1]) for family in FAMILIES]


@pytest.mark.heavy
def test_every_familys_layers_gather_together_with_the_same_bits():
    for hook_counts in run_pooled(2, families_with_and_without):
        assert hook_counts == [(family, 1) for family in FAMILIES]


def held_at_once(setting):
    """The decoder layers whose matrices are gathered, at each linear layer that runs or has
    its gradient computed.
    """
    names = ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")
    engine = engine_of(setting, zero={f"stage3_{name}": 0 for name in names})
    gathered_layers = []
    layers = mora_layers(engine.module)
    # Asked for in a forward, DeepSpeed gathers them
    matrices = {name: layer.adapter_weight for name, layer in layers.items()}

    def gathered():
        return {
            name
            for name, matrix in matrices.items()
            if matrix.ds_status.name == "AVAILABLE"
        }

    def note(module):
        names = gathered()
        assert any(layers[name] is module for name in names)
        gathered_layers.append({name.split(".")[2] for name in names})

    def note_all(module, _, output):
        note(module)
        if output.requires_grad:
            output.register_hook(lambda _: note(module))

    for layer in layers.values():
        layer.register_forward_hook(note_all)
    for step in range(6):
        micro_step(engine, tokens(2, seed=step))
        assert not gathered()
    return gathered_layers


@pytest.mark.parametrize("setting", ["sharded", "sharded again", "sharded reentrant"])
def test_one_decoder_layers_matrices_are_gathered_at_a_time(setting):
    for gathered_layers in run_pooled(2, held_at_once, setting):
        assert all(len(layers) == 1 for layers in gathered_layers)
        assert set.union(*gathered_layers) == {"0", "1"}


class Pair(NamedTuple):
    one: torch.Tensor
    ids: Any


def test_backward_is_noticed_whatever_a_layer_takes_and_returns():
    """Arguments and results of any form, with what needs no gradient left as it is."""
    calls = []
    inputs = [torch.randn(3, requires_grad=True) for _ in range(4)]
    plain = torch.randn(3)
    ids = torch.arange(3)
    named = {
        "pair": Pair(inputs[1], ids),
        "list": [inputs[2], None],
        "name": "x",
        "more": inputs[3],
    }
    arguments = ((inputs[0], plain), named)
    (first, same), keywords = call_in_backward(
        arguments, partial(calls.append, "release")
    )
    assert same is plain
    assert keywords["pair"].ids is ids
    assert keywords["list"][1] is None
    assert keywords["name"] == "x"
    assert type(keywords["pair"]) is Pair
    assert type(keywords["list"]) is list
    results = (
        first + keywords["pair"].one,
        {"sum": keywords["list"][0] * keywords["more"]},
    )
    outputs = call_in_backward(results, partial(calls.append, "fetch"))
    assert calls == []
    (outputs[0].sum() + outputs[1]["sum"].sum()).backward()
    # Once each, however many tensors there are
    assert calls == ["fetch", "release"]
    assert [tensor.grad.tolist() for tensor in inputs[:2]] == [[1.0] * 3] * 2
    assert torch.equal(inputs[2].grad, inputs[3])
    assert torch.equal(inputs[3].grad, inputs[2])
    with torch.no_grad():
        (first, _), _ = call_in_backward(arguments, partial(calls.append, "release"))
    assert first is inputs[0], "no graph, no mark"


@contextmanager
def recorded_gathers(sizes):
    """Append the numbers of elements of each all-gather."""
    backend = deepspeed.comm.comm.cdb
    gather = backend.all_gather_into_tensor
    with patch.object(backend, "all_gather_into_tensor", wraps=gather) as gathers:
        yield
    for call in gathers.mock_calls:
        sizes.append(nbytes_of(call.kwargs["output_tensor"]) // 4)


def gathers_of_a_step():
    """Numbers of elements in each all-gather of the first forward and of an optimizer
    step, and in all matrices.
    """
    engine = engine_of("persistent")
    forward = []
    step = []
    with recorded_gathers(forward):
        loss = causal_loss(engine, tokens(2, seed=0))
    engine.backward(loss)
    engine.step()
    engine.backward(causal_loss(engine, tokens(2, seed=1)))
    with recorded_gathers(step):
        engine.step()
    persistent = engine.optimizer.parameter_offload.persistent_parameters
    return forward, step, sum(parameter.ds_numel for parameter in persistent)


def test_persistent_matrices_are_gathered_by_one_all_gather():
    for forward, step, elements in run_pooled(2, gathers_of_a_step):
        assert forward == step == [elements]


def gathered_when_needed():
    """Steps after fp16 has skipped one, and after a context that gathers a matrix and
    shards it again.
    """
    engine = engine_of(
        "persistent", fp16={"enabled": True, "initial_scale_power": 30, "hysteresis": 1}
    )
    persistent = engine.optimizer.parameter_offload.persistent_parameters
    history = []
    for step in range(8):
        statuses = {parameter.ds_status.name for parameter in persistent}
        assert torch.isfinite(micro_step(engine, tokens(2, seed=step)))
        history.append(("NOT_AVAILABLE" in statuses, engine.optimizer.overflow))
    with zero.gathered_parameter(engine, persistent[0]):
        pass
    with torch.no_grad():
        assert torch.isfinite(causal_loss(engine, tokens(2, seed=0)))
    persistent[0].all_gather(persistent)
    return history


def test_persistent_matrices_are_gathered_again_after_a_skipped_step():
    for history in run_pooled(2, gathered_when_needed):
        assert history[0][0], "nothing is gathered before the first pass"
        assert any(sharded for sharded, _ in history[2:]), (
            "a skipped step leaves the matrices sharded"
        )
        assert any(skipped for _, skipped in history)
