"""The one condition on the nodes of a run: they all see the same output folder.

Every rank writes its part of a checkpoint there, and reads what rank 0 has made:
tokenizer, base.
"""

import platform
from pathlib import Path
from uuid import uuid4

from mora_ds.common.errors import RunError, UserError
from mora_ds.common.files import await_file, disk_errors
from mora_ds.runtime.ranks import Ranks


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Raise `UserError` on all ranks unless they see one `folder`. Collective.

    Rank 0 creates a file, and the others look for it. Its name is new in every run:
    clients of network file systems remember names that they did not find.
    """
    # All ranks take the name that rank 0 has drawn
    name = f".seen-by-all-{uuid4().hex}"

    def create() -> str:
        with disk_errors(folder):
            (folder / name).touch()
        return name

    try:
        marker = folder / ranks.on_first("output folder of the nodes", create)
        seen = ranks.gather(
            "visibility of the output folder",
            (_becomes_visible(marker), f"{folder} on {platform.node()}"),
        )
    except Exception as error:
        # The others still look for the file, and see this error where they meet next
        ranks.leave(error)
        raise
    finally:
        if ranks.is_first:
            (folder / name).unlink(missing_ok=True)
    _, first_place = seen[0]
    for rank, (is_visible, rank_folder) in enumerate(seen):
        if not is_visible:
            raise UserError(
                f"--output_dir: {rank_folder} (rank {rank}) is another folder than {first_place} (rank 0): name one on "
                "storage that all nodes share"
            )


def _becomes_visible(path: Path) -> bool:
    try:
        await_file(path, size=0)
    except RunError:
        return False
    return True
