"""What is timed of which layers, and which path the times choose."""

from __future__ import annotations

import pytest
import torch

from mora_ds.adapters import path_times
from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.layer import MoRALinear
from mora_ds.adapters.ops.linear import Compute
from mora_ds.adapters.path_times import (
    PATHS,
    Call,
    Case,
    cases,
    close_paths,
    enough_rounds,
    observe,
    paths_of,
    quickest,
    shape_of,
    time_cases,
    time_paths,
    undecided,
)
from tests.helpers.models import tiny_model, tokens


def injected(**config: object) -> torch.nn.Module:
    model = tiny_model("llama")
    inject(model, MoRAConfig(**{"rank": 4, "operator": "share", **config}))  # type: ignore[arg-type]
    return model


def test_layers_that_are_alike_are_one_case() -> None:
    model = injected()
    layers, batch = undecided(model), tokens(3)
    calls = observe(layers, lambda: model(input_ids=batch))
    assert calls.keys() == layers.keys() == mora_layers(model).keys()
    found = cases(layers, calls)
    assert sum(case.count for case in found) == len(layers) and len(found) < len(layers)
    assert {case.call.tokens for case in found} == {batch.numel()}
    assert len({(case.shape, case.call) for case in found}) == len(found)
    assert not layers["model.layers.0.self_attn.q_proj"]._forward_pre_hooks


def test_layers_with_one_path_are_not_timed() -> None:
    for config in ({"dropout": 0.1}, {"compute": "weight"}, {"domains": ("a", "b")}):
        layers = undecided(injected(**config))
        calls = dict.fromkeys(layers, Call(8, 32))
        assert not cases(layers, calls)


@pytest.mark.parametrize(("bits", "operator"), [(16, "share"), (8, "share"), (16, "rotate"), (8, "rotate")])
@pytest.mark.parametrize("recomputes", [False, True])
def test_timing_leaves_layer_and_generator_alone(bits: int, operator: str, recomputes: bool) -> None:
    layer = undecided(injected(base_bits=bits, operator=operator))["model.layers.0.mlp.down_proj"]
    before = [layer.square.clone(), layer.weight.clone(), torch.get_rng_state()]
    layer.recomputed = recomputes
    calls: list[Compute] = []
    product = layer.product

    def counted(x: torch.Tensor, square: torch.Tensor, path: Compute) -> torch.Tensor:
        calls.append(path)
        return product(x, square, path)

    layer.product = counted  # type: ignore[method-assign]
    found = time_paths(Case(layer, Call(16, layer.in_features), 1), lambda seconds: 3)
    assert list(found) == list(paths_of(layer)) and all(len(times) == 3 and min(times) >= 0 for times in found.values())
    assert all(
        torch.equal(*pair) for pair in zip(before, [layer.square, layer.weight, torch.get_rng_state()], strict=True)
    )
    assert layer.square.grad is None
    rounds = calls[1:]  # the first makes the output's gradient
    per_path = 2 if recomputes else 1
    turn = [path for path in found for _ in range(per_path)]
    assert rounds == turn * 5, "warmed up, counted, then timed in turn"


def test_the_path_of_a_shape_is_the_quickest_of_all_its_layers() -> None:
    layer = undecided(injected())["model.layers.0.self_attn.q_proj"]
    few, many = (Case(layer, Call(count, 32), layers) for count, layers in ((8, 1), (64, 3)))
    slow, quick = [5.0, 1.0, 5.0], [3.0, 9.0, 3.0]
    one = {Compute.ACTIVATION: quick, Compute.WEIGHT: slow}
    other = {Compute.ACTIVATION: slow, Compute.WEIGHT: quick}
    assert quickest([(few, one), (many, other)]) == {shape_of(layer): Compute.WEIGHT}
    assert quickest([(few, one)]) == {shape_of(layer): Compute.ACTIVATION}


def test_close_paths_are_timed_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = undecided(injected(operator="rotate"))["model.layers.0.self_attn.q_proj"]
    assert paths_of(layer) == PATHS
    wanted = []

    def timed(case: Case, rounds: object, paths: object = None) -> dict[Compute, list[float]]:
        wanted.append(paths)
        if paths is None:
            return {Compute.ACTIVATION: [9.0], Compute.WEIGHT: [1.0], Compute.BLOCKS: [1.1]}
        return {Compute.WEIGHT: [1.1] * 3, Compute.BLOCKS: [1.0] * 3}

    monkeypatch.setattr(path_times, "time_paths", timed)
    found = time_cases([Case(layer, Call(8, 32), 1)], lambda name, work: work())
    assert wanted == [None, [Compute.WEIGHT, Compute.BLOCKS]]
    assert quickest(found) == {shape_of(layer): Compute.BLOCKS}
    assert not close_paths([(found[0][0], {Compute.WEIGHT: [1.0], Compute.BLOCKS: [2.0]})])


def test_short_rounds_are_many() -> None:
    counts = [enough_rounds(seconds) for seconds in (0.0, 1e-4, 0.004, 1.0)]
    assert counts == sorted(counts, reverse=True) and counts[0] == 25 and counts[-1] == 5
    assert [enough_rounds(seconds, 4) for seconds in (0.0, 0.004, 1.0)] == [100, 50, 5]


def test_a_layer_over_its_path_is_what_was_timed() -> None:
    """`product` with the layer's own matrix is its forward."""
    layer = undecided(injected())["model.layers.0.self_attn.k_proj"]
    assert isinstance(layer, MoRALinear)
    with torch.no_grad():
        layer.square.normal_()
    x = torch.randn(2, 5, 32)
    for path in PATHS:  # share takes `blocks` for `weight`
        layer.compute = path
        assert torch.equal(layer(x), layer.product(x, layer.square, path))
    assert path_times.undecided(layer) == {}
    path_times.reopen(layer)
    assert path_times.undecided(layer) == {"": layer}
