"""Checks whether a checkpoint or a ledger is intact and consistent. Offline: needs no
DeepSpeed, no GPU and no base.

    files       as manifest.json lists them: existence, size, sha256
    formats     trainer_state.json, adapter.json and its tensors, base.json, probe
    ledger      every hash, their chain, finite matrices; the base that it starts from, as many cycles as adapter and
                state record
    shards      readable, complete for the number of ranks, every element of every parameter once, random states
    agreement   adapter.safetensors = the master weights in the shards, bit for bit
    base        (where a folder is given) the same fingerprint

Every check runs, even where an earlier one has failed; the base alone is compared with
intact checkpoints only, since another base is a mistake in the command. An adapter that
was made out of a checkpoint, without a run's state and shards, is checked as far as it
goes.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError

from mora_ds.checkpoint.adapter_files import AdapterTensors, BaseReference, read_adapter
from mora_ds.checkpoint.layout import (
    ADAPTER_JSON,
    ADAPTER_TENSORS,
    CHECKPOINTS,
    ENGINE_TAG,
    LATEST,
    LEDGER_FOLDER,
    PROBE_FILE,
    STATE_FILE,
    is_full_training,
    is_step_name,
    step_of,
)
from mora_ds.checkpoint.manager import complete_checkpoints
from mora_ds.checkpoint.shard_table import EngineShards
from mora_ds.checkpoint.state import TrainerState
from mora_ds.checkpoint.storage import local_copy, storage_of
from mora_ds.common.errors import RunError, UserError, raise_validation_errors
from mora_ds.common.fetched import local
from mora_ds.common.files import MANIFEST, listed_files, verify_manifest
from mora_ds.common.tensor_files import open_safetensors
from mora_ds.common.untrusted import shown
from mora_ds.engine.shards import MASTER
from mora_ds.models.base import BaseCheckpoint
from mora_ds.remora.ledger import LEDGER_FILE, Ledger

logger = logging.getLogger(__name__)


@dataclass
class Verdict:
    """The result of checking one checkpoint."""

    folder: Path
    problems: list[str] = field(default_factory=list)
    """What is wrong, one line a problem; each names its file."""
    facts: list[str] = field(default_factory=list)
    """What was checked and is right."""
    is_latest: bool = False

    @property
    def is_good(self) -> bool:
        return not self.problems

    def lines(self) -> list[str]:
        head = f"{self.folder}: {'good' if self.is_good else 'DAMAGED'}{', latest' if self.is_latest else ''}"
        return [
            head,
            *(f"  {fact}" for fact in self.facts),
            *(f"  wrong: {problem}" for problem in self.problems),
        ]


def verify(path: Path | str, base: Path | None = None) -> list[Verdict]:
    """Checks a checkpoint, a ledger's folder, or every checkpoint of a run (its output
    folder, or `checkpoints` in it), oldest first.

    Raises `UserError` when there is none at `path`, and where `base` is no model or not
    that of what is intact.
    """
    path = local(path, all_checkpoints=True)
    opened = None if base is None else BaseCheckpoint.open(base, "--base")
    if any((path / name).is_file() for name in (MANIFEST, STATE_FILE, ADAPTER_JSON)):
        return [_verify_one(path.resolve(), opened)]
    if (path / LEDGER_FILE).is_file():
        # A ledger without a checkpoint, such as that of a run
        ledger = path.resolve()
        return [
            _verdict(ledger, [lambda _: _cycles(Ledger.open(ledger))], ledger, opened)
        ]
    roots = {root: complete_checkpoints(root) for root in (path / CHECKPOINTS, path)}
    root = next((root for root in roots if roots[root]), None)
    if root is None:
        raise UserError(
            f"{path} is neither a checkpoint, nor a ledger, nor the folder of a run that has one"
        )
    verdicts = [_verify_one(local_copy(folder), opened) for folder in roots[root]]
    storage = storage_of(root)
    latest = storage.linked(LATEST)
    for verdict in verdicts:
        verdict.is_latest = verdict.folder.name == latest
    verified = {verdict.folder.name for verdict in verdicts}
    if os.path.lexists(storage.open_read(LATEST)) and latest not in verified:
        verdicts[-1].problems.append(
            f"{root / LATEST} names no checkpoint of this run that was saved to the end"
        )
    return verdicts


def _verify_one(folder: Path, base: BaseCheckpoint | None) -> Verdict:
    has_run = not _is_adapter_alone(folder)
    has_adapter = not is_full_training(folder)
    checks = {
        _files: True,
        _state: has_run,
        _shards: has_run,
        _adapter: has_adapter,
        _ledger: has_adapter,
        _agreement: has_run and has_adapter,
    }
    applying = [check for check, applies in checks.items() if applies]
    return _verdict(
        folder, applying, folder / LEDGER_FOLDER, base if has_adapter else None
    )


def _verdict(
    folder: Path,
    checks: Iterable[Callable[[Path], Iterator[str]]],
    ledger: Path,
    base: BaseCheckpoint | None,
) -> Verdict:
    """What the checks say of a folder, and of the base with which its ledger begins."""
    verdict = Verdict(folder)
    for check in checks:
        _run(verdict, check)
    if base is not None and verdict.is_good:
        recorded = Ledger.open(ledger, hashes=False).base_fingerprint
        if base.fingerprint() != recorded:
            raise UserError(
                f"--base: {base.folder} is not the base of {folder}, whose fingerprint is {recorded}"
            )
        verdict.facts.append(f"base: {base.folder} has the recorded fingerprint")
    verdict.problems = list(dict.fromkeys(verdict.problems))
    return verdict


def _run(verdict: Verdict, check: Callable[[Path], Iterator[str]]) -> None:
    try:
        verdict.facts.extend(check(verdict.folder))
    except UserError as error:
        # `raise_validation_errors` raises all problems at once, one a line
        verdict.problems.extend(str(error).split("\n"))
    except (RunError, SafetensorError, OSError) as error:
        verdict.problems.append(str(error))
    except (LookupError, ValueError, TypeError, RuntimeError) as error:
        # The file has values that no check has foreseen
        verdict.problems.append(f"{verdict.folder} is damaged: {shown(error)}")


def _is_adapter_alone(folder: Path) -> bool:
    """Whether it was made out of a checkpoint, without a run's state and shards."""
    try:
        has_adapter = (folder / ADAPTER_JSON).is_file()
        return has_adapter and STATE_FILE not in listed_files(folder)
    except (UserError, RunError):
        return False


# -- checks: each yields what is right, and raises what is wrong -----------------------


def _files(folder: Path) -> Iterator[str]:
    raise_validation_errors(verify_manifest(folder))
    listed = listed_files(folder)
    nbytes = sum(facts.size for facts in listed.values())
    yield f"files: {len(listed)} as the manifest says, {nbytes / 2**20:,.2f} MiB"


def _state(folder: Path) -> Iterator[str]:
    state = TrainerState.read(folder)
    number = step_of(folder) if is_step_name(folder.name) else state.step
    if number != state.step:
        raise UserError(
            f"{folder / STATE_FILE} is of step {state.step}, its folder of step {number}"
        )
    yield f"state: step {state.step}, {state.tokens:,} tokens, {len(state.merges)} merge(s), {state.world_size} rank(s)"


def _shards(folder: Path) -> Iterator[str]:
    shards = EngineShards.open(folder / ENGINE_TAG)
    world = TrainerState.read(folder).world_size
    saved = shards.layout.world_size
    if world != saved:
        raise UserError(
            f"{shards.folder} was written by {saved} ranks, {STATE_FILE} says {world}"
        )
    problems = [
        f"{shards.folder} holds no random state of rank {rank}"
        for rank in range(saved)
        if "cpu" not in shards.random_states(rank)
    ]
    keys: set[str] = set()
    for name in shards.layout.shapes:
        # Raises where the ranks do not agree
        moments, _ = shards.state(name)
        for key in (MASTER, *moments):
            keys.add(key)
            if not torch.isfinite(shards.read(name, key)).all():
                problems.append(f"{shards.folder}: {key} of {name} is not finite")
    raise_validation_errors(problems)
    what = f"{len(shards.layout.shapes)} tensors ({', '.join(sorted(keys))})"
    yield f"shards: {len(shards.files)} file(s) of {saved} rank(s), ZeRO {shards.layout.stage}, {what}"


def _adapter(folder: Path) -> Iterator[str]:
    adapter = read_adapter(folder)
    tensors = AdapterTensors(folder, adapter)
    if not _is_adapter_alone(folder):
        open_safetensors(folder / PROBE_FILE)
    raise_validation_errors(
        f"{folder / ADAPTER_TENSORS}: {name} is not finite"
        for name, tensor in tensors.items()
        if not torch.isfinite(tensor).all()
    )
    yield f"adapter: {len(adapter.layers)} layers, cycle {adapter.cycle}, {len(adapter.trainables)} other tensor(s)"


def _ledger(folder: Path) -> Iterator[str]:
    ledger = Ledger.open(folder / LEDGER_FOLDER, BaseReference.read(folder).fingerprint)
    adapter = read_adapter(folder)
    # As an export does
    adapter.check_ledger(ledger)
    cycle = adapter.cycle
    merges = (
        cycle if _is_adapter_alone(folder) else len(TrainerState.read(folder).merges)
    )
    if not ledger.cycles == cycle == merges:
        raise UserError(
            f"{ledger.folder} has {ledger.cycles} cycle(s), {ADAPTER_JSON} was written in cycle {cycle}, "
            f"{STATE_FILE} records {merges} merge(s)"
        )
    yield from _cycles(ledger)


def _cycles(ledger: Ledger) -> Iterator[str]:
    raise_validation_errors(
        f"{ledger.folder / record.file}: the MoRA matrix of {module} is not finite"
        for record in ledger.records
        for module in ledger.layers(record.cycle)
        if not torch.isfinite(ledger.mora_matrix(record.cycle, module)).all()
    )
    yield f"ledger: {ledger.cycles} cycle(s), hashes and chain"


def _agreement(folder: Path) -> Iterator[str]:
    path = folder / ADAPTER_TENSORS
    adapter = read_adapter(folder)
    shards = EngineShards.open(folder / ENGINE_TAG)
    tensors = dict(AdapterTensors(folder, adapter).items())
    for layer in adapter.layers.values():
        name = layer.mora_matrix
        tensors[name] = layer.operator.trained(tensors[name])
    if different := sorted(set(tensors) ^ set(shards.layout.shapes)):
        raise UserError(
            f"{path} and the shards do not hold the same tensors, e.g. {different[0]}"
        )
    raise_validation_errors(
        f"{path}: {name} is not what the shards hold"
        for name, tensor in tensors.items()
        if not torch.equal(tensor, shards.full(name, MASTER).float())
    )
    yield f"agreement: {len(tensors)} live tensor(s) equal their master weights in the shards"
