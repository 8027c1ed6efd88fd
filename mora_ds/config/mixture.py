"""Settings of the sources of text: flags and mix.yaml -> a `MixturePlan`, or None for one plain source.

--train_files web='web/*.jsonl':0.7 code='src/**/*.py':0.3      sources with a weight each
--mixture mix.yaml                                              the same, with lists of files, epochs and phases
--replay general='old/*.jsonl':0.05                             5% of every batch, whatever the other weights are
--replay general:0.05                                           the same for a source that is named already
"""

import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from mora_ds.common.errors import NOT_NEGATIVE, POSITIVE, UserError, nearest
from mora_ds.common.files import load_yaml
from mora_ds.config.data import DataArguments
from mora_ds.config.flags import typed_values

PLAIN = "train"
"""Name of the source that plain --train_files or --dataset_name make, where it needs one."""

HELD_OUT = "held_out"
"""Name of the evaluation set of --held_out_share; in a mixture it is followed by the name of the source."""

_NAME = r"[A-Za-z0-9_.-]+"

_ENTRY = re.compile(rf"({_NAME})(?:=(.+))?:([^:/]+)")
"""NAME=FILES:NUMBER, or NAME:NUMBER of a source that is named already."""

_SOURCE_KEYS = {
    "files": list[str],
    "dataset": str | None,
    "weight": float,
    "epochs": float | None,
    "text_column": str | None,
    "streaming": bool,
}


@dataclass(frozen=True)
class SourcePlan:
    """One source as the user describes it."""

    name: str
    files: tuple[str, ...] = ()
    dataset: str | None = None
    epochs: float | None = None
    """Most passes over the source; None: as many as its weight asks for."""
    text_column: str | None = None
    streaming: bool = False
    flag: str = "--mixture"
    """The flag that names its text."""


@dataclass(frozen=True)
class MixturePlan:
    """Sources in order, and (first step, a weight for each source) of every phase: [(0, (0.7, 0.3)), (1000, ...)]."""

    sources: tuple[SourcePlan, ...]
    phases: tuple[tuple[int, tuple[float, ...]], ...]

    @property
    def streams(self) -> bool:
        return any(source.streaming for source in self.sources)


def mixture_plan(data: DataArguments) -> MixturePlan | None:
    """Raises `UserError` that lists what is wrong with --mixture, --train_files and --replay."""
    if data.mixture is not None:
        if data.train_files or data.dataset_name:
            raise UserError("--mixture names the sources: leave out --train_files and --dataset_name")
        plan = _read(data.mixture)
    elif (of_flags := _of_flags(data.train_files)) is not None:
        plan = of_flags
    elif data.replay or data.streaming:
        flag = "--dataset_name" if data.dataset_name else "--train_files"
        source = SourcePlan(PLAIN, tuple(data.train_files), data.dataset_name, flag=flag)
        plan = MixturePlan((source,), ((0, (1.0,)),))
    else:
        return None
    where = data.mixture or "--train_files"
    _check_signs(plan, where)
    plan = _with_replay(plan, data.replay)
    _check_weights(plan, where)
    if data.streaming:
        plan = replace(plan, sources=tuple(replace(source, streaming=True) for source in plan.sources))
    for source in plan.sources:
        if source.streaming and source.epochs and source.epochs % 1:
            raise UserError(
                f"{where}: sources.{source.name}.epochs must be a whole number, since where a part of a stream ends is "
                f"only known when it has been read, got {source.epochs:g}"
            )
    return plan


# -- flags -------------------------------------------------------------------------------------------------------------
def _parsed(entry: str) -> tuple[str, str | None, float] | None:
    """(name, files, number) of an entry; None for another form."""
    match = _ENTRY.fullmatch(entry)
    try:
        return None if match is None else (match[1], match[2], float(match[3]))
    except ValueError:
        return None


def _named_source(entry: str) -> tuple[str, str, float] | None:
    """(name, files, weight); None for a plain path, that is another form or the name of an existing file."""
    parsed = _parsed(entry)
    if parsed is None or parsed[1] is None or os.path.exists(os.path.expanduser(entry)):
        return None
    return parsed[0], parsed[1], parsed[2]


def _of_flags(entries: list[str]) -> MixturePlan | None:
    """The mixture of sources with a name and a weight each; None where all are plain paths."""
    sources = [source for entry in entries if (source := _named_source(entry)) is not None]
    if not sources:
        return None
    for entry in entries:
        if _named_source(entry) is None:
            raise UserError(
                f"--train_files {entry}: where one source has a name and a weight, all need them: NAME=FILES:WEIGHT"
            )
    counts = Counter(name for name, _, _ in sources)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise UserError(f"--train_files: {', '.join(twice)} is given twice; a source of --mixture can have many files")
    weights = tuple(weight for _, _, weight in sources)
    plans = tuple(SourcePlan(name, (files,), flag="--train_files") for name, files, _ in sources)
    return MixturePlan(plans, ((0, weights),))


def _with_replay(plan: MixturePlan, entries: list[str]) -> MixturePlan:
    """Replayed sources take their share of every phase; the others keep their proportions in the rest."""
    shares: dict[str, float] = {}
    sources = list(plan.sources)
    for entry in entries:
        parsed = _parsed(entry)
        if parsed is None or not 0 < parsed[2] < 1:
            raise UserError(f"--replay {entry}: must be NAME=FILES:SHARE or NAME:SHARE, with a share between 0 and 1")
        name, files, share = parsed
        names = [source.name for source in sources]
        if files is not None and name in names:
            raise UserError(f"--replay {entry}: there is a source {name!r} already; --replay {name}:SHARE replays it")
        if files is None and name not in names:
            raise UserError(
                f"--replay {entry}: no source is called {name!r}.{nearest(name, names)} "
                "A new one is given with its files: NAME=FILES:SHARE"
            )
        if files is not None:
            sources.append(SourcePlan(name, (files,), flag="--replay"))
        if name in shares:
            raise UserError(f"--replay: {name} is given twice")
        shares[name] = share
    if not shares:
        return plan
    total = sum(shares.values())
    if total >= 1:
        raise UserError(f"--replay: the shares add up to {total:g}, which leaves nothing for new text")
    if set(shares) >= {source.name for source in sources}:
        raise UserError("--replay: every source is replayed, and none is new")
    phases = []
    for step, weights in plan.phases:
        weight_of = {source.name: weight for source, weight in zip(plan.sources, weights, strict=True)}
        new = sum(weight for name, weight in weight_of.items() if name not in shares)
        # to 12 digits: 0.05 of 1 leaves 0.95, not 0.950000000000000011
        scaled = {name: round(weight / new * (1 - total), 12) if new else weight for name, weight in weight_of.items()}
        phases.append((step, tuple({**scaled, **shares}[source.name] for source in sources)))
    return MixturePlan(tuple(sources), tuple(phases))


# -- mix.yaml ----------------------------------------------------------------------------------------------------------
def _read(path: str) -> MixturePlan:
    content = typed_values(
        load_yaml(path, "--mixture"),
        {"sources": dict, "phases": list[dict] | None},
        path,
    )
    if not content.get("sources"):
        raise UserError(f"{path}: `sources` must map the name of each source to its files and weight")
    sources = []
    weights = []
    for name, entry in content["sources"].items():
        values = typed_values(entry, _SOURCE_KEYS, path, f"sources.{name}.")
        weights.append(values.pop("weight", 1.0))
        sources.append(_source(f"{path}: sources.{name}", str(name), values))
    names = [source.name for source in sources]
    phases = [(0, tuple(weights))]
    for number, entry in enumerate(content.get("phases") or []):
        where = f"phases[{number}]"
        phase = typed_values(entry, {"from_step": int, "weights": dict}, path, f"{where}.")
        if len(phase) < 2:
            raise UserError(f"{path}: {where} must have `from_step` and `weights`")
        if phase["from_step"] <= phases[-1][0]:
            raise UserError(f"{path}: {where}.from_step must be a step after {phases[-1][0]}, got {phase['from_step']}")
        weights_of = {str(name): weight for name, weight in phase["weights"].items()}  # as the names of sources
        weight_of = typed_values(
            weights_of,
            dict.fromkeys(names, float),
            path,
            f"{where}.weights.",
        )
        phases.append((phase["from_step"], tuple(weight_of.get(name, 0.0) for name in names)))
    return MixturePlan(tuple(sources), tuple(phases))


def _source(where: str, name: str, values: dict[str, Any]) -> SourcePlan:
    if not re.fullmatch(_NAME, name):
        raise UserError(f"{where}: a name has letters, digits, _, . and - only")
    files = values.get("files")
    dataset = values.get("dataset")
    epochs = values.get("epochs")
    if bool(files) == bool(dataset):
        raise UserError(f"{where}: give `files` or `dataset`" + (", not both" if files else ""))
    if epochs is not None and not POSITIVE.allow(epochs):
        raise UserError(f"{where}.epochs must be {POSITIVE}, got {epochs:g}")
    return SourcePlan(name, **{**values, "files": tuple(files or ())})


# -- both --------------------------------------------------------------------------------------------------------------
def _phase(where: str, step: int) -> str:
    return f"{where}: " if step == 0 else f"{where}, from step {step}: "


def _check_signs(plan: MixturePlan, where: str) -> None:
    """Before --replay scales the weights, which would turn the signs where all of them are negative."""
    for step, weights in plan.phases:
        for source, weight in zip(plan.sources, weights, strict=True):
            if not NOT_NEGATIVE.allow(weight):
                raise UserError(
                    f"{_phase(where, step)}the weight of {source.name!r} must be {NOT_NEGATIVE}, got {weight:g}"
                )


def _check_weights(plan: MixturePlan, where: str) -> None:
    for step, weights in plan.phases:
        if sum(weights) == 0:
            raise UserError(f"{_phase(where, step)}the weights add up to 0, so no source could be drawn")
    for index, source in enumerate(plan.sources):
        if not any(weights[index] for _, weights in plan.phases):
            raise UserError(f"{where}: {source.name!r} has weight 0 throughout: leave it out")
