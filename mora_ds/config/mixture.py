"""What a run is told about its sources: flags and mix.yaml -> a `MixturePlan`, or None for one plain source.

--train_files web='web/*.jsonl':0.7 code='src/**/*.py':0.3      sources with a weight each
--mixture mix.yaml                                              the same, with lists of files, epochs and phases
--replay general='old/*.jsonl':0.05                             5% of every batch, whatever the others weigh
--replay general:0.05                                           the same of a source that is there already
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from mora_ds.config.data import DataArguments
from mora_ds.errors import UserError, nearest
from mora_ds.files import load_yaml

PLAIN = "train"
"""Name of the source that plain --train_files or --dataset_name make, where it needs one."""

_NAME = r"[A-Za-z0-9_.-]+"

_SOURCE = re.compile(rf"({_NAME})=(.+):([^:/]+)")

_KEYS = ("files", "dataset", "weight", "epochs", "text_column", "streaming")


@dataclass(frozen=True)
class SourcePlan:
    """One source as the user describes it."""

    name: str
    files: tuple[str, ...] = ()
    dataset: str | None = None
    epochs: float | None = None
    """How often it may be read; None: as often as its weight asks for."""
    text_column: str | None = None
    streaming: bool = False


@dataclass(frozen=True)
class MixturePlan:
    """Sources in order, and from which step on which weights hold: [(0, (0.7, 0.3)), (1000, (0.5, 0.5))]."""

    sources: tuple[SourcePlan, ...]
    phases: tuple[tuple[int, tuple[float, ...]], ...]

    @property
    def streams(self) -> bool:
        return any(source.streaming for source in self.sources)


def mixture_plan(data: DataArguments) -> MixturePlan | None:
    """Raises `UserError` that lists what is wrong with --mixture, --train_files and --replay."""
    named = [_source_of(entry) for entry in data.train_files]
    if data.mixture is not None:
        if data.train_files or data.dataset_name:
            raise UserError("--mixture names the sources: leave out --train_files and --dataset_name")
        plan = _read(data.mixture)
    elif any(named):
        plan = _of_flags(data.train_files, named)
    elif data.replay or data.streaming:
        plan = MixturePlan((SourcePlan(PLAIN, tuple(data.train_files), data.dataset_name),), ((0, (1.0,)),))
    else:
        return None
    plan = _with_replay(plan, data.replay)
    _check_weights(plan, data.mixture or "--train_files")
    if data.streaming:
        plan = replace(plan, sources=tuple(replace(source, streaming=True) for source in plan.sources))
    return plan


# -- flags -------------------------------------------------------------------------------------------------------------
def _source_of(entry: str) -> tuple[str, str, float] | None:
    """(name, files, weight), or None for a plain path: one that has not this form, or is there under that very name."""
    found = _SOURCE.fullmatch(entry)
    if found is None or os.path.exists(os.path.expanduser(entry)):
        return None
    try:
        return found[1], found[2], float(found[3])
    except ValueError:
        return None


def _of_flags(entries: list[str], named: list[tuple[str, str, float] | None]) -> MixturePlan:
    plain = [entry for entry, source in zip(entries, named, strict=True) if source is None]
    if plain:
        raise UserError(
            f"--train_files {plain[0]}: where one source has a name and a weight, all need them: NAME=FILES:WEIGHT"
        )
    sources = [source for source in named if source is not None]
    _refuse_twice("--train_files", [name for name, _, _ in sources])
    return MixturePlan(
        tuple(SourcePlan(name, (files,)) for name, files, _ in sources),
        ((0, tuple(weight for _, _, weight in sources)),),
    )


def _with_replay(plan: MixturePlan, entries: list[str]) -> MixturePlan:
    """Replayed sources take their share of every phase; the others keep their proportions in what is left."""
    shares: dict[str, float] = {}
    sources = list(plan.sources)
    for entry in entries:
        name, files, share = _replayed(entry)
        names = [source.name for source in sources]
        if files is not None and name in names:
            raise UserError(f"--replay {entry}: there is a source {name!r} already; --replay {name}:SHARE replays it")
        if files is None and name not in names:
            raise UserError(
                f"--replay {entry}: no source is called {name!r}.{nearest(name, names)} "
                "A new one is given with its files: NAME=FILES:SHARE"
            )
        if files is not None:
            sources.append(SourcePlan(name, (files,)))
        if name in shares:
            raise UserError(f"--replay: {name} is given twice")
        shares[name] = share
    total = sum(shares.values())
    if total >= 1:
        raise UserError(f"--replay: the shares add up to {total:g}, which leaves nothing for what is new")
    if set(shares) >= {source.name for source in sources}:
        raise UserError("--replay: every source is replayed, and none is new")
    phases = tuple((step, _shared(sources, plan, weights, shares)) for step, weights in plan.phases) if shares else ()
    return MixturePlan(tuple(sources), phases or plan.phases)


def _shared(
    sources: list[SourcePlan], plan: MixturePlan, weights: tuple[float, ...], shares: dict[str, float]
) -> tuple[float, ...]:
    """Shares are read as decimals; the others' proportions are scaled to what they leave of 1."""
    given = {source.name: weight for source, weight in zip(plan.sources, weights, strict=True)}
    new = sum(weight for name, weight in given.items() if name not in shares)
    left = 1 - sum(shares.values())
    return tuple(
        shares[source.name] if source.name in shares else _rounded(given[source.name], new, left) for source in sources
    )


def _rounded(weight: float, of: float, left: float) -> float:
    """To 12 digits: 0.05 of 1 leaves 0.95, not 0.950000000000000011."""
    return round(weight / of * left, 12) if of else weight


def _replayed(entry: str) -> tuple[str, str | None, float]:
    found = re.fullmatch(rf"({_NAME})(?:=(.+))?:([^:/]+)", entry)
    try:
        share = float(found[3]) if found else math.nan
    except ValueError:
        share = math.nan
    if found is None or not 0 < share < 1:
        raise UserError(f"--replay {entry}: must be NAME=FILES:SHARE or NAME:SHARE, with a share between 0 and 1")
    return found[1], found[2], share


# -- mix.yaml ----------------------------------------------------------------------------------------------------------
def _read(path: str) -> MixturePlan:
    content = load_yaml(path, "--mixture")
    if unknown := [key for key in content if key not in ("sources", "phases")]:
        raise UserError(f"{path}: unknown key {unknown[0]!r}.{nearest(str(unknown[0]), ('sources', 'phases'))}")
    entries = content.get("sources")
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{path}: `sources` must map the name of each source to its files and weight")
    sources = tuple(_source(path, str(name), entry) for name, entry in entries.items())
    names = [source.name for source in sources]
    weights = tuple(_number(path, f"sources.{name}.weight", entries[name].get("weight", 1.0)) for name in entries)
    phases = [(0, weights)]
    for number, entry in enumerate(content.get("phases") or []):
        phases.append(_phase(path, number, entry, names, phases[-1][0]))
    return MixturePlan(sources, tuple(phases))


def _source(path: str, name: str, entry: Any) -> SourcePlan:
    where = f"{path}: sources.{name}"
    if not re.fullmatch(_NAME, name):
        raise UserError(f"{where}: a name has letters, digits, _, . and - only")
    if not isinstance(entry, dict):
        raise UserError(f"{where} must have `files` (or `dataset`) and `weight`")
    if unknown := [key for key in entry if key not in _KEYS]:
        raise UserError(f"{where}: unknown key {unknown[0]!r}.{nearest(str(unknown[0]), _KEYS)}")
    files = entry.get("files", [])
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise UserError(f"{where}.files must be a path or pattern, or a list of them")
    if bool(files) == bool(entry.get("dataset")):
        raise UserError(f"{where}: give `files` or `dataset`" + (", not both" if files else ""))
    for key, kind in (("dataset", str), ("text_column", str), ("streaming", bool)):
        if not isinstance(entry.get(key, kind()), kind):
            raise UserError(f"{where}.{key} must be {'true or false' if kind is bool else 'a string'}")
    epochs = None if entry.get("epochs") is None else _number(path, f"sources.{name}.epochs", entry["epochs"])
    if epochs is not None and not 0 < epochs < math.inf:
        raise UserError(f"{where}.epochs must be above 0, got {epochs:g}")
    return SourcePlan(
        name, tuple(files), entry.get("dataset"), epochs, entry.get("text_column"), entry.get("streaming", False)
    )


def _phase(path: str, number: int, entry: Any, names: list[str], after: int) -> tuple[int, tuple[float, ...]]:
    where = f"{path}: phases[{number}]"
    if not isinstance(entry, dict) or set(entry) != {"from_step", "weights"} or not isinstance(entry["weights"], dict):
        raise UserError(f"{where} must have `from_step` and `weights`, and nothing else")
    step = entry["from_step"]
    if not isinstance(step, int) or step <= after:
        raise UserError(f"{where}.from_step must be a step after {after}, got {step!r}")
    if unknown := [name for name in entry["weights"] if name not in names]:
        raise UserError(f"{where}.weights: no source is called {unknown[0]!r}.{nearest(str(unknown[0]), names)}")
    given = entry["weights"]
    return step, tuple(_number(path, f"phases[{number}].weights.{name}", given.get(name, 0)) for name in names)


def _number(path: str, where: str, value: Any) -> float:
    try:
        assert not isinstance(value, bool)
        return float(value)
    except (TypeError, ValueError, AssertionError):
        raise UserError(f"{path}: {where} must be a number, got {value!r}") from None


# -- both --------------------------------------------------------------------------------------------------------------
def _check_weights(plan: MixturePlan, where: str) -> None:
    for step, weights in plan.phases:
        phase = f"{where}: " if step == 0 else f"{where}, from step {step}: "
        for source, weight in zip(plan.sources, weights, strict=True):
            if not 0 <= weight < math.inf:
                raise UserError(f"{phase}the weight of {source.name!r} must not be negative, got {weight:g}")
        if sum(weights) == 0:
            raise UserError(f"{phase}the weights add up to 0, so nothing could be drawn")
    for index, source in enumerate(plan.sources):
        if not any(weights[index] for _, weights in plan.phases):
            raise UserError(f"{where}: {source.name!r} has weight 0 throughout: leave it out")


def _refuse_twice(flag: str, names: list[str]) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise UserError(f"{flag}: {', '.join(twice)} is given twice; in a --mixture file a source may have many files")


HELD_OUT = "held_out"
"""Name of the evaluation set that --held_out_share makes; of a mixture, with the source's name behind it."""
