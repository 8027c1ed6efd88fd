"""When ZeRO-3 gathers trained parameters, and how many at a time: a simulation of DeepSpeed's rules.

    record(model)      while a micro-batch runs: which modules are entered and left, in forward and backward
    gathers(...)       all-gathers of one micro-batch: calls, elements, most elements at the same time

The rules are those of DeepSpeed 0.19.8, runtime/zero/partitioned_param_coordinator.py (`fetch_sub_module`,
`release_sub_module`, once its trace is complete, which is from the third micro-batch on) and parameter_offload.py (the
hooks), with a decoder layer in place of the modules in it (`engine.layer_gathers`). `tests/planning/test_plan.py`
compares them with counted collectives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mora_ds.models.decoder_layers import find_decoder_layers


@dataclass(frozen=True)
class Event:
    """A module is entered, so that its parameters are needed, or left."""

    enters: bool
    parameters: tuple[int, ...]
    """Indices into `model.parameters()`."""
    is_root: bool
    """Whether it is the model itself, whose hooks start and end a pass."""
    is_layer: bool = False
    """Whether it is a decoder layer, with the parameters of all modules in it."""


@dataclass(frozen=True)
class Gathers:
    """The all-gathers of one micro-batch on one rank."""

    calls: int
    elements: int
    """Elements of unsharded parameters, each counted as often as it is gathered."""
    most_at_once: int
    """The most elements that are gathered at the same time."""
    largest_call: int


@contextmanager
def record(model: nn.Module) -> Iterator[list[Event]]:
    """The events of the micro-batch that runs within, in order. The hooks are where DeepSpeed has its own."""
    events: list[Event] = []
    index = {id(parameter): number for number, parameter in enumerate(model.parameters())}
    layers = find_decoder_layers(model).values()
    inside = {module for layer in layers for module in layer.modules()}
    handles = []
    for module in [*(module for module in model.modules() if module not in inside), *layers]:
        is_layer = module in inside
        own = tuple(sorted(index[id(parameter)] for parameter in module.parameters(recurse=is_layer)))
        handles += _Hooks(events, own, module is model, is_layer).on(module)
    try:
        yield events
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Hooks:
    """Those of one module."""

    events: list[Event]
    own: tuple[int, ...]
    is_root: bool
    is_layer: bool
    inside: bool = False
    runs_again: bool = False

    def on(self, module: nn.Module) -> list[Any]:
        before = module.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        return [before, module.register_forward_hook(self._after_forward)]

    def _note(self, enters: bool) -> None:
        self.inside = enters
        self.events.append(Event(enters, self.own, self.is_root, self.is_layer))

    def _before_forward(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        self.runs_again = self.is_layer and self.inside and torch._C._current_graph_task_id() != -1
        if not self.runs_again:
            self._note(True)
        return _mapped(lambda tensor: _Mark.apply(tensor, lambda: self._note(False)), (args, kwargs))

    def _after_forward(self, _: nn.Module, inputs: Any, output: Any) -> Any:
        if not self.runs_again:
            self._note(False)
        return _mapped(lambda tensor: _Mark.apply(tensor, lambda: self._note(True)), output)


def _mapped(change: Any, value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value) if value.requires_grad else value
    if type(value) in (tuple, list):
        return type(value)(_mapped(change, part) for part in value)
    if isinstance(value, dict):
        for key in value:
            value[key] = _mapped(change, value[key])
    return value


class _Mark(torch.autograd.Function):
    """The identity, which calls `note` when the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, note: Any) -> Tensor:
        ctx.note = note
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.note()
        return gradients[0], None


def gathers(events: Sequence[Event], numels: Sequence[int], settings: Mapping[str, int]) -> Gathers:
    """The all-gathers of one micro-batch, for parameters of these sizes (on a tensor-parallel rank: of its slices).

    `settings`: zero_optimization of a complete DeepSpeed config. Parameters up to its persistence threshold are left
    out: they are gathered once a step, one call each, and a module that has no others has no hooks
    (`engine.module_hooks.drop_idle_hooks`).
    """
    persist = settings["stage3_param_persistence_threshold"]
    sharded = [tuple(own for own in each.parameters if numels[own] > persist) for each in events]
    events = [
        replace(each, parameters=own) if each.is_layer else each
        for each, own in zip(events, sharded, strict=True)
        if each.is_root or own
    ]
    coordinator = _Coordinator(
        events,
        numels,
        persist,
        settings["stage3_prefetch_bucket_size"],
        settings.get("stage3_max_live_parameters", 10**9),
        settings.get("stage3_max_reuse_distance", 10**9),
    )
    for event in events:
        (coordinator.fetch if event.enters else coordinator.release)(event.parameters)
    return Gathers(coordinator.calls, coordinator.gathered, coordinator.most_at_once, coordinator.largest_call)


@dataclass
class _Coordinator:
    """DeepSpeed's PartitionedParameterCoordinator, without parameters."""

    events: Sequence[Event]
    numels: Sequence[int]
    persist: int
    bucket: int
    max_live: int
    max_reuse: int
    step: int = 0
    unsharded: set[int] = field(default_factory=set)
    latest: dict[int, int] = field(default_factory=dict)
    """Parameter -> the step of the trace for which it was fetched last."""
    calls: int = 0
    gathered: int = 0
    most_at_once: int = 0
    largest_call: int = 0

    def __post_init__(self) -> None:
        self.order = [event.parameters for event in self.events if event.enters]
        self.queue = deque((p, step) for step, own in enumerate(self.order) for p in own)

    def fetch(self, own: tuple[int, ...]) -> None:
        self._gather([p for p in own if self._absent(p)])
        missing = {p for p in own if self.latest.get(p, -1) < self.step}
        popped: set[int] = set()
        while self.queue and len(popped) < len(missing):
            parameter, self.latest[parameter] = self.queue.popleft()
            popped.add(parameter)
        self._prefetch()
        self.step += 1

    def _prefetch(self) -> None:
        most = min(self.max_live - sum(self.numels[p] for p in self.unsharded), self.bucket) if self.bucket else 0
        ahead: list[int] = []
        while self.queue and sum(self.numels[p] for p in ahead) < most:
            parameter, step = self.queue.popleft()
            self.latest[parameter] = max(self.latest.get(parameter, -1), step)
            if self._absent(parameter) and parameter not in ahead:
                ahead.append(parameter)
        self._gather(ahead)

    def release(self, own: tuple[int, ...]) -> None:
        going = {p for p in own if p in self.unsharded and self.latest.get(p, -1) <= self.step}
        passed = 0
        for later in self.order[self.step :] if going else ():
            if passed >= self.max_reuse:
                break
            going -= set(later)
            passed += sum(self.numels[p] for p in later)
        self.unsharded -= going

    def _gather(self, parameters: list[int]) -> None:
        if not parameters:
            return
        size = sum(self.numels[p] for p in parameters)
        self.unsharded |= set(parameters)
        self.calls += 1
        self.gathered += size
        self.largest_call = max(self.largest_call, size)
        self.most_at_once = max(self.most_at_once, sum(self.numels[p] for p in self.unsharded))

    def _absent(self, parameter: int) -> bool:
        return parameter not in self.unsharded and self.numels[parameter] > self.persist
