"""How long the paths of a layer take on this machine: what `--compute auto` decides by.

    observe(layers, forward)     how many tokens each layer reads in a forward
    cases(layers, calls)         the layers that are alike: in operator, size, tokens and part of a split layer
    time_cases(found, agree)     seconds of forward and backward of one layer of each case, over each path in turn
    quickest(timed)              the path of each shape

The paths are timed in turn, so that whatever else the machine does slows all of them alike.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from mora_ds.adapters.inject import mora_layers
from mora_ds.adapters.layer import MoRALinear
from mora_ds.adapters.ops.linear import Compute

PATHS = (Compute.ACTIVATION, Compute.WEIGHT, Compute.BLOCKS)

_SECONDS = 0.05
"""How long a case is timed, but at least `_FEWEST` rounds ..."""
_FEWEST, _MOST = 5, 25
"""... and at most so many."""
_CLOSE, _LONGER = 1.25, 4
"""Paths that take up to so many times the quickest one's time are timed once more, for so many times as long."""

Times = Mapping[Compute, Sequence[float]]
"""Seconds of each round, by path."""
Agree = Callable[[str, Callable[[], Any]], Any]


@dataclass(frozen=True)
class Call:
    """What a layer read in a forward."""

    tokens: int
    inputs: int
    """Fewer than the layer's where it is split along its inputs."""


@dataclass(frozen=True)
class Case:
    """Layers that are alike, of which one is timed."""

    layer: MoRALinear
    call: Call
    count: int

    @property
    def shape(self) -> str:
        return shape_of(self.layer)


def undecided(model: nn.Module) -> dict[str, MoRALinear]:
    """Module name -> layer whose path nobody has chosen."""
    return {name: layer for name, layer in _with_paths(model).items() if layer.compute is Compute.AUTO}


def reopen(model: nn.Module) -> None:
    """Takes the path of every layer back."""
    for layer in _with_paths(model).values():
        layer.compute = Compute.AUTO


def _with_paths(model: nn.Module) -> dict[str, MoRALinear]:
    return {name: layer for name, layer in mora_layers(model).items() if isinstance(layer, MoRALinear)}


def shape_of(layer: MoRALinear) -> str:
    """By which a path is recorded: it names no tokens and no part of a layer, so that a run keeps its paths at another
    number of ranks."""
    spec = layer.spec
    return f"{spec.kind.value} {spec.d_in} x {spec.d_out}, r_hat {spec.r_hat}"


def observe(layers: Mapping[str, MoRALinear], forward: Callable[[], Any]) -> dict[str, Call]:
    """Name -> the first call of each layer that `forward` calls."""
    calls: dict[str, Call] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            calls.setdefault(name, Call(x.numel() // x.shape[-1], x.shape[-1]))

        return hook

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def cases(layers: Mapping[str, MoRALinear], calls: Mapping[str, Call]) -> list[Case]:
    """The cases of the layers that have a call and a choice, in the model's order."""
    alike: dict[tuple[str, Call], list[MoRALinear]] = defaultdict(list)
    for name, layer in layers.items():
        if name in calls and layer.has_paths:
            alike[shape_of(layer), calls[name]].append(layer)
    return [Case(same[0], call, len(same)) for (_, call), same in alike.items()]


def paths_of(layer: MoRALinear) -> tuple[Compute, ...]:
    """The paths that differ for a layer."""
    return PATHS if layer.has_blocks_path else (Compute.ACTIVATION, Compute.WEIGHT)


def time_cases(
    found: Iterable[Case], agree: Agree, hold: Callable[[MoRALinear], AbstractContextManager[Any]] = nullcontext
) -> list[tuple[Case, Times]]:
    """Seconds of each round of every case, by path; those of close paths are the longer ones of a second turn.

    `agree(name, work)`: what `work` returns on rank 0, on all ranks. `hold`: what has the layer's weight on the device
    while it is timed. Collective.
    """

    def timed_once(case: Case, times: int = 1, paths: Iterable[Compute] | None = None) -> dict[Compute, list[float]]:
        with hold(case.layer):
            return time_paths(case, lambda one: agree("rounds of timing", lambda: enough_rounds(one, times)), paths)

    timed = [(case, timed_once(case)) for case in found]
    for index, paths in agree("close paths", lambda: close_paths(timed)):
        timed[index][1].update(timed_once(timed[index][0], _LONGER, paths))
    return [(case, times) for case, times in timed]


def close_paths(timed: Sequence[tuple[Case, Times]]) -> list[tuple[int, list[Compute]]]:
    """The cases whose quickest paths are close, by index, and these paths."""
    found = []
    for index, (_, times) in enumerate(timed):
        least = min(median(seconds) for seconds in times.values())
        paths = [path for path, seconds in times.items() if median(seconds) <= _CLOSE * least]
        if len(paths) > 1:
            found.append((index, paths))
    return found


def time_paths(
    case: Case, rounds: Callable[[float], int], paths: Iterable[Compute] | None = None
) -> dict[Compute, list[float]]:
    """Seconds of forward and backward over each path, as many times as `rounds` says of the seconds of one round.
    `paths`: by default those of the layer.

    Collective for a split layer. Random numbers stand for input, gradient and M; the layer's own parameter, which ZeRO
    may have partitioned, is not touched, and torch's global generator is not drawn from.
    """
    layer, now = case.layer, clock(case.layer.weight.device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, case.call.tokens, case.call.inputs, generator=generator).to(layer.weight.device, layer.dtype)
    square = layer.shard(torch.randn(layer.spec.value_shape, generator=generator) / layer.spec.r_hat)
    leaves = x.requires_grad_(), square.to(x).requires_grad_()
    found: dict[Compute, list[float]] = {path: [] for path in paths or paths_of(layer)}
    with torch.no_grad():
        y = layer.product(*leaves, next(iter(found)))
    g = torch.randn(y.shape, generator=generator).to(y)

    def step(path: Compute) -> float:
        started = now()
        with torch.enable_grad():
            torch.autograd.grad(layer.product(*leaves, path), leaves, g)
        return now() - started

    for path in found:
        step(path)  # makes index tables, compiles
    for _ in range(rounds(sum(step(path) for path in found))):
        for path, seconds in found.items():
            seconds.append(step(path))
    return found


def enough_rounds(seconds: float, times: int = 1) -> int:
    """How many rounds of so many seconds tell the paths apart; `times` as many where they are close."""
    return min(times * _MOST, max(_FEWEST, int(times * _SECONDS / max(seconds, 1e-9))))


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds, after all work so far: for one thread of a CPU its own time, of which other processes take none."""
    if device.type != "cuda":
        return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized


def quickest(timed: Iterable[tuple[Case, Times]]) -> dict[str, Compute]:
    """Shape -> the path with the least time of all its layers, by medians."""
    totals: dict[str, dict[Compute, float]] = {}
    for case, times in timed:
        total = totals.setdefault(case.shape, dict.fromkeys(times, 0.0))
        for path, seconds in times.items():
            total[path] += case.count * median(seconds)
    return {shape: min(total, key=lambda path: total[path]) for shape, total in totals.items()}
