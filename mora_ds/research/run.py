"""The hooks of a run with a `research:` block in its recipe (`train.hooks`)."""

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
    """Hooks for target plans and domain adapters."""

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
        """The target plan, if any. Raises `UserError` for sides that the operator does
        not support."""
        if self.settings.targets is None:
            return None
        plan = read_plan(expanded(self.settings.targets, SETTING))
        plan.apply_to(self.arguments.adapter.mora_config(seed=0))
        return plan

    def plan(
        self, config: AdapterConfig, loaded: LoadedBase, ranks: Ranks
    ) -> AdapterConfig:
        if self._plan is not None:
            self._plan.check_base(loaded.base, loaded.base.fingerprint(ranks=ranks))
        return self._planned(config)

    def dry_plan(self, config: AdapterConfig) -> AdapterConfig:
        """Does not compare fingerprints, which would read every weight."""
        self._plan = self._read_plan()
        return self._planned(config)

    def _planned(self, config: AdapterConfig) -> AdapterConfig:
        # Validation rejects these settings for other adapters
        if not isinstance(config, MoRAConfig):
            return config
        if self.settings.domain_adapters:
            config = replace(config, domains=domain_names(self.arguments))
        return config if self._plan is None else self._plan.apply_to(config)

    def injected(self, model: nn.Module) -> None:
        self.domains = domains_of(model)
        if names := self.domains.names:
            logger.info(
                f"{len(names)} domains, each with its own MoRA matrix in every layer: {', '.join(names)}"
            )

    # -- domains -----------------------------------------------------------------------

    def check(self, engine: Any, ids: Tensor) -> None:
        """Check that the input of every adapted layer is a batch of full sequences in
        `token_nll`."""
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
        """The context includes backward, where gradient checkpointing reads the domains
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
        """Any domain: a NaN in the matrix of any domain makes the loss NaN."""
        return self.domains.names[0] if self.domains.names else None

    def domain_of(self, name: str) -> str | None:
        """The domain with the set's name, or the domain from which the set was held
        out."""
        for domain in (name, name.removeprefix(f"{HELD_OUT}_")):
            if domain in self.domains.names:
                return domain
        return None
