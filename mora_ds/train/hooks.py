"""What a run does besides MoRA: nothing, unless its recipe has a block `research:`.

plan              which layers get a MoRA matrix, and of what side
rows, domain_of   what layers compute besides their MoRA matrix: it may depend on the source of a row
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from mora_ds.adapters.config import AdapterConfig
from mora_ds.common import research
from mora_ds.config.arguments import Arguments
from mora_ds.models.load import LoadedBase
from mora_ds.runtime.ranks import Ranks

Inputs = Iterator[tuple[str, str | None]]
"""(flag or setting, the path or the name on the Hub that it has)"""


class Hooks:
    """The hooks of a run without a block `research:`; `mora_ds.research` derives its
    own."""

    def inputs(self) -> Inputs:
        """(setting, path) of every file and folder that is read."""
        yield from ()

    def read_files(self, ranks: Ranks) -> None:
        """Read files which may lie in the output folder, before that is touched.
        Collective. Raises `UserError`."""

    def plan(
        self, config: AdapterConfig, loaded: LoadedBase, ranks: Ranks
    ) -> AdapterConfig:
        """The adapter's config with its plan of targets, and with what layers compute
        besides their MoRA matrix. Collective. Raises `UserError`."""
        return config

    def dry_plan(self, config: AdapterConfig) -> AdapterConfig:
        """`plan` of a dry run, which reads no weights."""
        return config

    def injected(self, model: nn.Module) -> None:
        """The model has its adapter; no engine has it yet."""

    def rows(self, sources: Sequence[str]) -> AbstractContextManager[None]:
        """Surrounds forward and backward of a micro-batch whose rows come from these
        sources of the mixture; without a mixture there are none. Every other forward
        pass is one `beside_training`."""
        return nullcontext()

    def check(self, engine: Any, ids: Tensor) -> None:
        """A check of the live model before the first step, by a forward pass of `ids`
        (3, T). Collective. Raises `UserError`."""

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the merged models of the run; empty for one model without a name."""
        return ()

    @property
    def reference_domain(self) -> str | None:
        """The domain as which the first training rows are read where their loss is to
        tell whether all trained numbers are finite; None without domains."""
        return None

    def domain_of(self, name: str) -> str | None:
        """The domain as which an evaluation set is read; None: by the shared
        matrices."""
        return None


def hooks_of(arguments: Arguments) -> Hooks:
    """The hooks of a run. Raises `UserError` as `Arguments` do."""
    if not arguments.research:
        return Hooks()
    return research.load("run").ResearchHooks(arguments)
