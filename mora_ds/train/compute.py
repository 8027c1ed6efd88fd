"""Which path each layer takes: timed on this machine when a run begins, then kept, as the paths round differently.

a new run        --compute auto: rank 0's times decide for all ranks (`choose`); FILE: the paths of an earlier run.
                 In loops of one's own by `Run.choose_compute`, in a Hugging Face Trainer by itself
a resumed run    those of its checkpoint, at any number of ranks; of a run that began before paths were timed, those of
                 `formula_of_0_2`

The choice is in trainer_state.json of every checkpoint and, for people and for --compute FILE, in run.yaml.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from mora_ds.adapters.layer import MoRALinear
from mora_ds.adapters.ops.linear import Compute
from mora_ds.adapters.path_times import (
    PATHS,
    Call,
    Case,
    Times,
    cases,
    observe,
    quickest,
    shape_of,
    time_cases,
    undecided,
)
from mora_ds.checkpoint.state import Paths
from mora_ds.common.errors import UserError
from mora_ds.common.files import load_yaml
from mora_ds.common.untrusted import typed
from mora_ds.engine.base_ring import ring_of
from mora_ds.runtime.ranks import Ranks

logger = logging.getLogger(__name__)

FLAG = "--compute"
KEY = "compute"
"""Where `resolved` of run.yaml holds the paths."""


def choose(model: nn.Module, ranks: Ranks, forward: Callable[[], Any]) -> dict[str, Compute]:
    """Shape of a layer -> the path that is quickest here, for all layers whose path is open; rank 0's times decide.

    `forward` runs the model on a micro-batch of training, without gradients. All ranks time, as they compete for memory
    and caches in training too. Collective.
    """
    layers = undecided(model)
    mine = observe(layers, forward)
    tokens = ranks.on_first("tokens of each layer", lambda: {name: call.tokens for name, call in mine.items()})
    calls = {
        name: Call(count, mine[name].inputs if name in mine else layers[name].in_features)
        for name, count in tokens.items()
        if count
    }
    ring = ring_of(model)
    timed = time_cases(cases(layers, calls), ranks.on_first, nullcontext if ring is None else ring.holding)
    found: dict[str, Compute] = ranks.on_first("paths of the layers", lambda: quickest(timed))
    if timed:
        logger.info("\n".join(_table(timed, found)))
    if idle := [name for name in layers if name not in calls]:
        logger.info(
            f"{len(idle)} of {len(layers)} adapted layers, {idle[0]} the first, are not called on this batch. A model"
            " that reads their weights itself, as Mamba does, trains none of their matrices: leave them out by"
            " --target_modules"
        )
    untimed = {shape_of(layer): Compute.ACTIVATION for layer in layers.values()}
    return {**untimed, **found}


def before_training(model: nn.Module, work: Callable[[Callable[[], Any]], None]) -> None:
    """Has `work` run once, before the model's first call in training, with a function that makes the same call in
    evaluation, without gradients."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            handle.remove()
            work(lambda: _evaluate(module, args, kwargs))

    handle = model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)


@torch.no_grad()
def _evaluate(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        model(*args, **kwargs)
    finally:
        for module in training:
            module.training = True


def take(model: nn.Module, paths: Mapping[str, Compute], where: str) -> None:
    """Gives every layer whose path is open its path. Raises `UserError` naming `where` for a shape that is not in
    `paths`."""
    for name, layer in undecided(model).items():
        layer.compute = path_in(paths, name, layer, where)


def path_in(paths: Mapping[str, Compute], name: str, layer: MoRALinear, where: str) -> Compute:
    """The layer's path. Raises `UserError` naming `where` for a shape that `paths` lacks."""
    path = paths.get(shape_of(layer))
    if path not in PATHS:
        raise UserError(f"{where} has no path for {name} ({shape_of(layer)}): was it written for another model?")
    return path


def paths_of_file(file: Path | None) -> Paths | None:
    """The paths in the run.yaml of an earlier run; None without a file. Raises `UserError` where it has none."""
    if file is None:
        return None
    resolved = load_yaml(str(file), FLAG).get("resolved")
    content = resolved.get(KEY) if isinstance(resolved, dict) else None
    if not content:
        raise UserError(
            f"{FLAG} {file}: it holds no paths under resolved: {KEY}; give the run.yaml of a run of --compute auto"
        )
    paths: Paths = typed(Paths, content, f"{FLAG} {file}")
    return paths


def check_same(checkpoint: Path, saved: Paths, given: Paths | None) -> None:
    """Raises `UserError` where --compute FILE has other paths than the checkpoint's run began with."""
    if given is None:
        return
    for shape in sorted({*saved, *given}):
        there, here = saved.get(shape), given.get(shape)
        if there is not here:
            raise UserError(
                f"{FLAG}: a run keeps the paths that it began with, and {checkpoint} has "
                f"{'none' if there is None else there.value} for {shape} where the file has "
                f"{'none' if here is None else here.value}: leave the flag out"
            )


def _table(timed: list[tuple[Case, Times]], found: Mapping[str, Compute]) -> list[str]:
    width = max(len(case.shape) for case, _ in timed)
    names = "".join(f"{path.value:>12}" for path in PATHS)
    lines = [
        "--compute auto: forward and backward of a layer in ms, the median of this machine's rounds",
        f"{'layer':<{width}} {'count':>6} {'tokens':>8}{names}  takes",
    ]
    for case, times in timed:
        figures = "".join(f"{1e3 * median(times[path]):>12.3f}" if path in times else f"{'':>12}" for path in PATHS)
        takes = found[case.shape].value
        lines.append(f"{case.shape:<{width}} {case.count:>6} {case.call.tokens:>8}{figures}  {takes}")
    return lines
