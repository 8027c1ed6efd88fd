"""Checks the only requirement on the nodes of a run, that all see the same output folder,
and writes there what all of them read: tokenizer, base, ledger.
"""

import platform
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from mora_ds.common.errors import RunError, UserError
from mora_ds.common.files import await_file, disk_errors, file_sizes
from mora_ds.runtime.ranks import Ranks, Result


def write_on_rank0(
    ranks: Ranks, check: str, folder: Path, write: Callable[[], Result]
) -> Result:
    """Call `write` on rank 0, return its result on all ranks, and wait until each of
    them sees all files of `folder`. Collective. Raises `RunError` where a node does not
    see one in time."""

    def written() -> tuple[Result, dict[str, int]]:
        result = write()
        return result, file_sizes(folder) if folder.is_dir() else {}

    def look() -> None:
        for name, size in sizes.items():
            await_file(folder / name, size)

    result, sizes = ranks.run_on_rank0(check, written, long=True)
    ranks.agree(f"{check}, as every node sees it", look, long=True)
    return result


def check_shared(folder: Path, ranks: Ranks, flag: str = "--output_dir") -> None:
    """Raise `UserError` on all ranks unless they all see the same `folder`, which
    `flag` names. Collective.

    Rank 0 creates a file, and the others wait for it. Its name is random, because
    clients of network file systems cache missing names.
    """
    # Every rank draws a name; rank 0's is used
    name = f".seen-by-all-{uuid4().hex}"

    def create() -> str:
        with disk_errors(folder):
            (folder / name).touch()
        return name

    try:
        marker = folder / ranks.run_on_rank0("output folder of the nodes", create)
        seen = ranks.gather(
            "visibility of the output folder",
            (_is_found(marker), f"{folder} on {platform.node()}"),
        )
    except Exception as error:
        # The other ranks still wait for the file; their next check raises this error
        ranks.abort(error)
        raise
    finally:
        if ranks.is_rank0:
            (folder / name).unlink(missing_ok=True)
    _, first_place = seen[0]
    for rank, (is_visible, rank_folder) in enumerate(seen):
        if not is_visible:
            raise UserError(
                f"{flag}: {rank_folder} (rank {rank}) is another folder than {first_place} (rank 0): name one on "
                "storage that all nodes share"
            )


def _is_found(path: Path) -> bool:
    try:
        await_file(path, size=0)
    except RunError:
        return False
    return True
