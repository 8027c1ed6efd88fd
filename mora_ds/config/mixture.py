"""Settings of the sources of text: flags and mix.yaml -> a `MixtureConfig`.

--train_files web='web/*.jsonl':0.7 code='src/**/*.py':0.3      sources with a weight each
--mixture mix.yaml                                              the same, with lists of files, epochs and phases
--replay general='old/*.jsonl':0.05                             5% of every batch, whatever the other weights are
"""

import os
import re
from dataclasses import dataclass, replace

from mora_ds.common.errors import NOT_NEGATIVE, POSITIVE, UserError
from mora_ds.common.files import load_yaml
from mora_ds.config.data import DataArguments
from mora_ds.config.flags import Settings, typed_values

PLAIN = "train"
"""Name of the source that plain --train_files or --dataset_name make."""

HELD_OUT = "held_out"
"""Name of the evaluation set of --held_out_share; in a mixture the source's name
follows."""

_NAME = r"[A-Za-z0-9_.-]+"

_ENTRY = re.compile(rf"({_NAME})=(.+):([^:/]+)")
"""NAME=FILES:NUMBER"""

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
class MixtureConfig:
    """The sources of a run, and their weights."""

    sources: tuple[SourcePlan, ...]
    phases: tuple[tuple[int, tuple[float, ...]], ...]
    """(first step, a weight for each source) of every phase: ((0, (0.7, 0.3)), ...)."""
    is_plain: bool = False
    """Whether it is one source that no flag names, in a cache."""

    @property
    def streams(self) -> bool:
        return any(source.streaming for source in self.sources)


def mixture_config(data: DataArguments) -> MixtureConfig:
    """The sources that the flags name. Raises `UserError` that says what is wrong with
    --mixture, --train_files or --replay."""
    if data.mixture is not None:
        mixture = _read(data.mixture)
    elif any(map(_named_source, data.train_files)):
        mixture = _of_flags(data.train_files)
    else:
        flag = "--dataset_name" if data.dataset_name else "--train_files"
        source = SourcePlan(
            PLAIN, tuple(data.train_files), data.dataset_name, flag=flag
        )
        is_plain = not (data.replay or data.streaming)
        mixture = MixtureConfig((source,), ((0, (1.0,)),), is_plain)
    where = data.mixture or "--train_files"
    _check_weights(mixture, where)
    if data.replay:
        mixture = _with_replay(mixture, data.replay)
    if data.streaming:
        streams = tuple(replace(source, streaming=True) for source in mixture.sources)
        mixture = replace(mixture, sources=streams)
    for source in mixture.sources:
        if source.streaming and source.epochs:
            raise UserError(
                f"{where}: sources.{source.name}.epochs is for text in a cache: a stream begins again"
            )
    return mixture


def _check_weights(mixture: MixtureConfig, where: str) -> None:
    for step, weights in mixture.phases:
        phase = where if step == 0 else f"{where}, from step {step}"
        for source, weight in zip(mixture.sources, weights, strict=True):
            if not NOT_NEGATIVE.allow(weight):
                raise UserError(
                    f"{phase}: the weight of {source.name!r} must be {NOT_NEGATIVE}, got {weight:g}"
                )
        if sum(weights) == 0:
            raise UserError(
                f"{phase}: the weights add up to 0, so no source could be drawn"
            )


def _named_source(entry: str) -> tuple[str, str, float] | None:
    """(name, files, number) of an entry; None for another form, and for an existing
    file."""
    match = _ENTRY.fullmatch(entry)
    if match is None or os.path.exists(os.path.expanduser(entry)):
        return None
    try:
        return match[1], match[2], float(match[3])
    except ValueError:
        return None


def _of_flags(entries: list[str]) -> MixtureConfig:
    """The mixture of sources with a name and a weight each."""
    weights: dict[str, float] = {}
    sources = []
    for entry in entries:
        named = _named_source(entry)
        if named is None:
            raise UserError(
                f"--train_files {entry}: where one source has a name and a weight, all need them: NAME=FILES:WEIGHT"
            )
        name, files, weight = named
        if name in weights:
            raise UserError(
                f"--train_files: {name} is given twice; a source of --mixture can have many files"
            )
        weights[name] = weight
        sources.append(SourcePlan(name, (files,), flag="--train_files"))
    return MixtureConfig(tuple(sources), ((0, tuple(weights.values())),))


def _with_replay(mixture: MixtureConfig, entries: list[str]) -> MixtureConfig:
    """`mixture` with replayed sources, which take their share of every phase. The
    proportions of the others stay."""
    sources = list(mixture.sources)
    shares = []
    for entry in entries:
        named = _named_source(entry)
        if named is None or not 0 < named[2] < 1:
            raise UserError(
                f"--replay {entry}: must be NAME=FILES:SHARE, with a share between 0 and 1"
            )
        name, files, share = named
        if name in [source.name for source in sources]:
            raise UserError(f"--replay {entry}: there is a source {name!r} already")
        sources.append(SourcePlan(name, (files,), flag="--replay"))
        shares.append(share)
    new_share = 1 - sum(shares)
    if new_share <= 0:
        raise UserError(
            f"--replay: the shares add up to {sum(shares):g}, which leaves nothing for new text"
        )
    phases = []
    for step, weights in mixture.phases:
        # Weights are read as decimals: to 12 digits 0.05 of 1 leaves 0.95, and not
        # 0.950000000000000011, whose period would be far longer.
        new = [round(weight / sum(weights) * new_share, 12) for weight in weights]
        phases.append((step, (*new, *shares)))
    return replace(mixture, sources=tuple(sources), phases=tuple(phases))


def _read(path: str) -> MixtureConfig:
    """The mixture of a YAML file."""
    content = typed_values(
        load_yaml(path, "--mixture"),
        {"sources": dict, "phases": list[dict] | None},
        path,
    )
    if not content.get("sources"):
        raise UserError(
            f"{path}: `sources` must map the name of each source to its files and weight"
        )
    weights: dict[str, float] = {}
    sources = []
    for name, entry in content["sources"].items():
        values = typed_values(entry, _SOURCE_KEYS, path, f"sources.{name}.")
        weights[name] = values.pop("weight", 1.0)
        sources.append(_source(f"{path}: sources.{name}", name, values))
    phases = [(0, tuple(weights.values()))]
    for number, entry in enumerate(content.get("phases") or []):
        where = f"phases[{number}]"
        phase = typed_values(
            entry, {"from_step": int, "weights": dict}, path, f"{where}."
        )
        if len(phase) < 2:
            raise UserError(f"{path}: {where} must have `from_step` and `weights`")
        step = phase["from_step"]
        if step <= phases[-1][0]:
            raise UserError(
                f"{path}: {where}.from_step must be a step after {phases[-1][0]}, got {step}"
            )
        hints = dict.fromkeys(weights, float)
        known = typed_values(phase["weights"], hints, path, f"{where}.weights.")
        phases.append((step, tuple(known.get(name, 0.0) for name in weights)))
    return MixtureConfig(tuple(sources), tuple(phases))


def _source(where: str, name: str, values: Settings) -> SourcePlan:
    epochs = values.get("epochs")
    if not re.fullmatch(_NAME, name):
        raise UserError(f"{where}: a name has letters, digits, _, . and - only")
    if bool(values.get("files")) == bool(values.get("dataset")):
        raise UserError(f"{where}: give either `files` or `dataset`")
    if epochs is not None and not POSITIVE.allow(epochs):
        raise UserError(f"{where}.epochs must be {POSITIVE}, got {epochs:g}")
    return SourcePlan(name, **{**values, "files": tuple(values.get("files") or ())})
