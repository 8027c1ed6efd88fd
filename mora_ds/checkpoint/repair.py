"""Replaces damaged cycles of merge ledgers by copies that are intact.

Checkpoints of a run and its own ledger share each cycle's file by hard links, so one damaged byte damages all of them.
A file that was moved, copied to another disk or fetched from another node has its own bytes: every ledger has the hash
of each of its files on record, and any file with that hash is as good as the original.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from mora_ds.checkpoint.layout import CHECKPOINTS, LEDGER_FOLDER, complete_checkpoints
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.files import atomic_path, file_problem, link_or_copy, malformed, read_json
from mora_ds.remora.ledger import LEDGER_FILE, VECTORS_FILE


def repair(path: Path, sources: Sequence[Path] = ()) -> list[str]:
    """Repairs the ledgers of a run, or that of one checkpoint, at `path`; returns a line for each replaced file.

    Copies are looked for in the same run and in `sources`: runs, checkpoints or ledgers, such as a backup, which are
    only read. Raises `UserError` where there is no ledger, and `RunError` that lists the files without an intact copy.
    """
    targets = _ledgers(path)
    if not targets:
        raise UserError(f"{path} holds no ledger: name a checkpoint, a ledger or the output folder of a run")
    own = [ledger for folder in (path, *path.resolve().parents[:2]) for ledger in _ledgers(folder)]
    donors = list(dict.fromkeys([*own, *(ledger for source in sources for ledger in _ledgers(source))]))
    healed: dict[str, Path] = {}
    lines, lost = [], []
    for ledger in targets:
        for name, size, sha256 in _recorded(ledger):
            if not (problem := file_problem(ledger / name, size, sha256)):
                continue
            good = (donor / name for donor in donors if not file_problem(donor / name, size, sha256))
            if (ledger / name).is_dir() and not (ledger / name).is_symlink():
                lost.append(f"{ledger / name} is a folder, which stays: move it away")
                continue
            if sha256 in healed:
                link_or_copy(healed[sha256], ledger / name)
            elif (donor := next(good, None)) is not None:
                with atomic_path(ledger / name) as copy:  # a copy: the damaged bytes stay with whoever shares them
                    shutil.copyfile(donor, copy)
                healed[sha256] = ledger / name
            else:
                lost.append(problem)
                continue
            lines.append(f"{ledger / name}: replaced by an intact copy")
    if lost:
        raise RunError("\n".join([*lines, "no intact copy was found; name a backup with --repair FOLDER:", *lost]))
    return lines


def _ledgers(path: Path) -> list[Path]:
    """The folders of the ledgers at `path`: its own, that in it, those of the checkpoints in it."""
    roots = (path, path / CHECKPOINTS)
    candidates = [path, path / LEDGER_FOLDER]
    candidates += [folder / LEDGER_FOLDER for root in roots if root.is_dir() for folder in complete_checkpoints(root)]
    return [folder.resolve() for folder in candidates if (folder / LEDGER_FILE).is_file()]


def _recorded(ledger: Path) -> list[tuple[str, int, str]]:
    """(name, bytes, sha256) of each file that the ledger has on record."""
    path = ledger / LEDGER_FILE
    with malformed(path):
        content = read_json(path)
        files = [(f"cycle-{int(each['cycle']):05d}.safetensors", each) for each in content["cycles"]]
        files += [(VECTORS_FILE, content["vectors"])] if "vectors" in content else []
        return [(name, int(facts["size"]), str(facts["sha256"])) for name, facts in files]
