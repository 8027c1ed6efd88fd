"""The hooks of a run whose recipe has a block `research:` (`train.hooks`)."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mora_ds.adapters.config import AdapterConfig, MoRAConfig
from mora_ds.adapters.domain_names import SHARED
from mora_ds.adapters.domains import Domains, domains_of
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.untrusted import expanded
from mora_ds.config.arguments import Arguments
from mora_ds.config.mixture import HELD_OUT
from mora_ds.models.load import LoadedBase
from mora_ds.models.loss import token_nll
from mora_ds.research.settings import NAME, ResearchSettings, domain_names
from mora_ds.research.targets import SETTING, TargetPlan, read_plan
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.beside import beside_training
from mora_ds.train.hooks import Hooks, Inputs

logger = logging.getLogger(__name__)


class ResearchHooks(Hooks):
    """Plans of targets and domains."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        self.settings = ResearchSettings(**arguments.research)
        self.domains = Domains(())
        self._plan: TargetPlan | None = None

    def inputs(self) -> Inputs:
        yield SETTING, self.settings.targets

    def read_files(self, ranks: Ranks) -> None:
        self._plan = ranks.on_first(SETTING, self._read_plan)

    def _read_plan(self) -> TargetPlan | None:
        """The plan of targets, if there is one. Raises `UserError` for sides that the
        operator cannot have."""
        if self.settings.targets is None:
            return None
        plan = read_plan(expanded(self.settings.targets, SETTING))
        plan.put_into(self.arguments.adapter.mora_config(seed=0))
        return plan

    def plan(
        self, config: AdapterConfig, loaded: LoadedBase, ranks: Ranks
    ) -> AdapterConfig:
        if self._plan is not None:
            self._plan.check_base(loaded.base, loaded.base.fingerprint(ranks=ranks))
        return self._planned(config)

    def dry_plan(self, config: AdapterConfig) -> AdapterConfig:
        """Fingerprints are not compared, since that would read every weight."""
        self._plan = self._read_plan()
        return self._planned(config)

    def _planned(self, config: AdapterConfig) -> AdapterConfig:
        # Settings that are for MoRA matrices are refused beside another adapter
        if not isinstance(config, MoRAConfig):
            return config
        if self.settings.domain_adapters:
            config = replace(config, domains=domain_names(self.arguments))
        return config if self._plan is None else self._plan.put_into(config)

    def injected(self, model: nn.Module) -> None:
        self.domains = domains_of(model)
        if names := self.domains.names:
            logger.info(
                f"{len(names)} domains, each with its own MoRA matrix in every layer: {', '.join(names)}"
            )

    # -- domains -----------------------------------------------------------------------

    def check(self, engine: Any, ids: Tensor) -> None:
        """Whether every adapted layer reads complete rows, as `token_nll` runs it."""
        if not self.domains.names:
            return
        positions = torch.arange(ids.shape[1]).expand_as(ids).to(ids)
        batch = {"input_ids": ids, "position_ids": positions, "labels": ids}
        first, second = self.domains.names[:2]
        try:
            with beside_training(engine), self.rows([first, second, first]):
                token_nll(engine, batch)
        except RunError as error:
            raise UserError(f"{NAME}domain_adapters: {error}") from error

    @property
    def variants(self) -> tuple[str, ...]:
        return (SHARED, *self.domains.names) if self.domains.names else ()

    @contextmanager
    def rows(self, sources: Sequence[str]) -> Iterator[None]:
        """Until backward has ended, in which gradient checkpointing reads them
        again."""
        if not self.domains.names:
            yield
            return
        self.domains.set(sources)
        try:
            yield
        finally:
            self.domains.set_all(None)

    @property
    def reference_domain(self) -> str | None:
        """Any domain: a NaN in the matrix of another one makes the loss NaN too."""
        return self.domains.names[0] if self.domains.names else None

    def domain_of(self, name: str) -> str | None:
        """The domain with the set's name, or that the set was held out of."""
        for domain in (name, name.removeprefix(f"{HELD_OUT}_")):
            if domain in self.domains.names:
                return domain
        return None
