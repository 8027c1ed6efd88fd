"""Offline work on a merge ledger: check it, or write a new one without some of its cycles.

    path -> find_ledger -> verify    every hash, the chain, the base, and the checkpoint that contains the ledger
                        -> drop      a new ledger without the named cycles; the others keep their operators

`eval.ledger_summary` shows what the cycles contain, `compact` folds them into a new base. Inputs are never changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from mora_ds.checkpoint.adapter_files import AdapterFile, AdapterTensors, BaseReference, read_adapter
from mora_ds.checkpoint.layout import (
    ADAPTER_JSON,
    ADAPTER_TENSORS,
    BASE_JSON,
    LEDGER_FOLDER,
    TOKENIZER_FOLDER,
    LedgerLocation,
    find_ledger,
    tokenizer_of,
)
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.files import (
    MANIFEST,
    atomic_folder,
    copy_folder,
    file_problem,
    verify_manifest,
    write_json_atomic,
)
from mora_ds.models.base import BaseCheckpoint
from mora_ds.remora.ledger import VECTORS_FILE, Ledger, read_records


def live_adapter(location: LedgerLocation) -> AdapterFile | None:
    """adapter.json of the location's checkpoint, if it is one.

    Raises `UserError` when its live MoRA matrices do not follow the last cycle of the ledger.
    """
    if location.checkpoint is None:
        return None
    adapter = read_adapter(location.checkpoint)
    adapter.check_ledger(location.open(hashes=False))
    return adapter


# -- verify ------------------------------------------------------------------------------------------------------------


def verify(path: Path, base: Path | None = None) -> list[str]:
    """Reads every byte of a ledger, and of the folder `base` if given. Returns a line for everything that is intact.

    Raises `RunError` that lists all damage, and `UserError` where there is no ledger or `base` is another base.
    """
    location = find_ledger(path)
    if problems := _problems(location):
        raise RunError("\n".join([f"{path} is damaged:", *problems]))
    ledger = location.open(hashes=False)
    nbytes = sum(record.size for record in ledger.records)
    good = [f"{location.ledger}: {ledger.cycles} cycle(s), {nbytes:,} bytes, all hashes and their chain as recorded"]
    if location.checkpoint is not None:
        good.append(f"{location.checkpoint}: fits its ledger, and all its files are intact")
    if base is not None:
        opened = open_base(base, ledger)
        good.append(f"{opened.folder}: is the base that the ledger starts from ({ledger.base_fingerprint[:16]}...)")
    return good


def _problems(location: LedgerLocation) -> list[str]:
    """All damaged files, then the first problem in the structure of the ledger."""
    cycles, vectors = read_records(location.ledger)
    records = [(location.ledger / each.file, each.size, each.sha256) for each in cycles]
    if vectors is not None:
        records.append((location.ledger / VECTORS_FILE, vectors.size, vectors.sha256))
    problems = [problem for record in records if (problem := file_problem(*record))]
    if location.checkpoint is not None and (location.checkpoint / MANIFEST).is_file():
        problems += [problem for problem in verify_manifest(location.checkpoint) if problem not in problems]
    try:
        _check_structure(location)
    except UserError as error:
        if not any(problem in str(error) for problem in problems):
            problems.append(str(error))
    return problems


def _check_structure(location: LedgerLocation) -> None:
    ledger = location.open(hashes=False)
    for cycle in range(ledger.cycles):
        for module in ledger.layers(cycle):
            if not torch.isfinite(ledger.square(cycle, module)).all():
                raise UserError(
                    f"{ledger.folder / ledger.records[cycle].file}: the MoRA matrix of {module} is not finite"
                )
    adapter = live_adapter(location)
    if location.checkpoint is not None and adapter is not None:
        AdapterTensors.open(location.checkpoint, adapter)
        expected = BaseReference.read(location.checkpoint).fingerprint
        if ledger.base_fingerprint != expected:
            raise UserError(f"{ledger.folder} belongs to another base than {location.checkpoint / BASE_JSON} names")


def open_base(folder: Path, ledger: Ledger) -> BaseCheckpoint:
    """Opens the base in `folder` and reads every byte. Raises `UserError` when the ledger starts from another base."""
    base = BaseCheckpoint.open(folder, "--base")
    if base.fingerprint() != ledger.base_fingerprint:
        raise UserError(
            f"--base: {folder} is not the base of {ledger.folder}: its weights have the fingerprint"
            f" {base.fingerprint()}, the ledger starts from {ledger.base_fingerprint}"
        )
    return base


# -- drop --------------------------------------------------------------------------------------------------------------


def drop(path: Path, cycles: Collection[int], output: Path | None = None, in_place: bool = False) -> list[str]:
    """Writes a ledger without `cycles`: the others renumbered and chained again, each with its own operators.

    From a ledger or a run `output` becomes a ledger folder; from a checkpoint a folder that `export_merged` takes, with
    that ledger, the live MoRA matrices and the other trained tensors. `in_place` replaces a ledger folder and keeps a
    backup next to it. Returns lines to print. Raises `UserError` naming the flag to change.
    """
    location = find_ledger(path)
    ledger = location.open()
    kept = _kept(ledger, cycles)
    if in_place == (output is not None):
        raise UserError("drop needs one of --output and --in_place")
    text = [f"kept {len(kept)} of {ledger.cycles} cycles: {', '.join(map(str, kept)) or 'none'}"]
    if output is None:
        if location.checkpoint is not None or (location.ledger.resolve().parent / ADAPTER_JSON).exists():
            raise UserError(f"--in_place: {path} belongs to a checkpoint, whose other files fit it; give --output")
        backup = _backup(ledger)
        with atomic_folder(ledger.folder.resolve()) as folder:
            copy_cycles(ledger, kept, folder, ledger.base_fingerprint)
        return [*text, f"wrote {ledger.folder}; backup: {backup}"]
    check_fresh(output)
    with atomic_folder(output.absolute()) as folder:
        if location.checkpoint is None:
            copy_cycles(ledger, kept, folder, ledger.base_fingerprint)
        else:
            copy_cycles(ledger, kept, folder / LEDGER_FOLDER, ledger.base_fingerprint)
            reference = BaseReference.read(location.checkpoint)
            reference.absolute(location.checkpoint).write(folder)
            dropped = [record.step for record in ledger.records if record.cycle not in kept]
            copy_adapter(location, folder, len(kept), "dropped_cycles_of_steps", dropped)
    return [*text, f"wrote {output}"]


def _kept(ledger: Ledger, cycles: Collection[int]) -> list[int]:
    unknown = sorted(set(cycles) - set(range(ledger.cycles)))
    if unknown or not cycles:
        known = f"cycles 0 to {ledger.cycles - 1}" if ledger.cycles else "no cycles"
        raise UserError(f"--cycles {' '.join(map(str, unknown))}: {ledger.folder} has {known}")
    return [cycle for cycle in range(ledger.cycles) if cycle not in cycles]


def _backup(ledger: Ledger) -> Path:
    """Copies the ledger, by hard links, to the first unused name next to it."""
    folder, number = ledger.folder.resolve(), 1
    while (backup := folder.with_name(f"{folder.name}.backup-{number}")).exists():
        number += 1
    return ledger.copy_to(backup).folder


def copy_cycles(ledger: Ledger, cycles: Iterable[int], folder: Path, base_fingerprint: str) -> Ledger:
    """Writes a ledger with these cycles, numbered from 0 and chained to `base_fingerprint`."""
    copy = Ledger.create(folder, base_fingerprint, ledger.vectors_path)
    for cycle in cycles:
        entries = ledger.layers(cycle)
        copy.append(ledger.records[cycle].step, entries, ((name, ledger.square(cycle, name)) for name in entries))
    return copy


def copy_adapter(location: LedgerLocation, folder: Path, cycles: int, fact: str, steps: list[int]) -> None:
    """Copies a checkpoint's adapter and tokenizer to `folder`, whose ledger has `cycles` cycles.

    `steps`: those of the cycles that are no longer in the ledger, recorded in adapter.json under `fact`.
    """
    adapter = live_adapter(location)
    assert adapter is not None and location.checkpoint is not None
    AdapterTensors.open(location.checkpoint, adapter)
    shutil.copyfile(location.checkpoint / ADAPTER_TENSORS, folder / ADAPTER_TENSORS)
    facts = {**adapter.facts, fact: [*adapter.facts.get(fact, []), *steps]}
    changed = replace(adapter, cycle=cycles, facts=facts)
    write_json_atomic(folder / ADAPTER_JSON, changed.to_dict())
    if tokenizer := tokenizer_of(location.checkpoint):
        copy_folder(tokenizer, folder / TOKENIZER_FOLDER)


def check_fresh(output: Path) -> None:
    """Raises `UserError` unless `output` is a new or an empty folder: nothing is ever replaced."""
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise UserError(f"--output {output} exists already; name a new folder")
