"""Where a run happens: its folder, its processes, and what it starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mora_ds.adapters.target_plan import TargetPlan
from mora_ds.runtime.nodes import Followers
from mora_ds.runtime.ranks import Ranks


@dataclass(frozen=True)
class Place:
    """The place of one run, as this process sees it; paths are ones that it can read."""

    followers: Followers
    checkpoint: Path | None
    """The checkpoint that the run resumes from."""
    base: Path | None = None
    """The base in place of the model that the flags name: the result of --full_rank_steps."""
    targets: TargetPlan | None = None
    """The plan of --targets FILE: which layers have a MoRA matrix, and its side."""

    @property
    def folder(self) -> Path:
        """The run's folder; on a node that does not see --output_dir one of its own."""
        return self.followers.folder

    @property
    def ranks(self) -> Ranks:
        return self.followers.ranks
