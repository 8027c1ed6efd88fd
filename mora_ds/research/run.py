"""The hooks of a run whose recipe has a block `research:` (`train.hooks`)."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mora_ds.adapters.config import AdapterConfig, MoRAConfig
from mora_ds.adapters.domain_names import SHARED
from mora_ds.adapters.domains import Domains, domains_of
from mora_ds.adapters.inject import inject
from mora_ds.checkpoint.adapter_files import Adapter
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.untrusted import expanded
from mora_ds.config.arguments import Arguments
from mora_ds.config.forgetting import require_set
from mora_ds.config.mixture import HELD_OUT
from mora_ds.models.base import MODEL_FLAG
from mora_ds.models.load import LoadedBase
from mora_ds.models.loss import token_nll
from mora_ds.research.alignment import Alignment, Leading, aligned_layers, factor_bytes, leading_of_base
from mora_ds.research.init_adapter import FLAG, check_same_files, open_initial, put_initial
from mora_ds.research.settings import NAME, ResearchSettings, domain_names, eval_entries
from mora_ds.research.targets import AUTO, OpenModel, TargetPlan, plan_of_run, read_plan, with_sizes
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.beside import beside_training
from mora_ds.train.hooks import Hooks

logger = logging.getLogger(__name__)


class ResearchHooks(Hooks):
    """Plans of targets, the alignment loss and domains."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        self.settings = ResearchSettings(**arguments.research)
        self.domains = Domains(())
        self.read_as: dict[str, str | None] = {}
        """Evaluation set -> the domain whose MoRA matrices read it."""
        self._plan: TargetPlan | None = None
        """That of a file."""
        self._leading: dict[str, Leading] = {}
        """What the alignment loss aligns with."""
        self._initial: Adapter | None = None

    def inputs(self) -> Iterator[tuple[str, str | None]]:
        yield f"{NAME}init_adapter", self.settings.init_adapter
        yield f"{NAME}targets", None if self.settings.targets == AUTO else self.settings.targets

    def read_files(self, ranks: Ranks) -> None:
        self._plan = ranks.on_first(f"{NAME}targets", self._read_plan)

    def _read_plan(self) -> TargetPlan | None:
        """The plan of a file, None without one. Raises `UserError` for sides that the operator cannot have."""
        if self.settings.targets in (None, AUTO):
            return None
        plan = read_plan(expanded(str(self.settings.targets), f"{NAME}targets"))
        config = self.arguments.adapter.config(seed=0)
        assert isinstance(config, MoRAConfig), "validated"
        with_sizes(config, plan)
        return plan

    def plan(
        self,
        config: AdapterConfig,
        loaded: LoadedBase,
        folder: Path,
        checkpoint: Path | None,
        ranks: Ranks,
    ) -> AdapterConfig:
        if not isinstance(config, MoRAConfig):
            return config
        planned = with_domains = self._with_domains(config)
        if self.settings.targets is not None:
            budget = self.settings.trainable_budget
            patterns = self.arguments.adapter.target_modules

            def decide() -> TargetPlan:
                return plan_of_run(
                    self._plan,
                    budget,
                    patterns,
                    with_domains,
                    loaded,
                    folder,
                    checkpoint,
                )

            plan = ranks.on_first("plan of targets", decide, long=True)
            logger.info(plan)
            planned = with_sizes(with_domains, plan)
        if self.settings.alignment_weight:
            self._leading = leading_of_base(planned, loaded, self.settings.alignment_rank, ranks)
        return planned

    def _with_domains(self, config: MoRAConfig) -> MoRAConfig:
        if not self.settings.domain_adapters:
            return config
        return replace(
            config,
            domains=domain_names(self.arguments),
            freeze=self.settings.freeze,
        )

    def dry_plan(self, config: AdapterConfig, model: str, trust_remote_code: bool) -> AdapterConfig:
        """The fingerprint of a plan's file is not compared, which would read every weight."""
        if not isinstance(config, MoRAConfig):
            return config
        config = self._with_domains(config)
        if self.settings.targets is None:
            return config
        plan = self._read_plan()
        if plan is None:
            folder = expanded(model, MODEL_FLAG)
            if not folder.is_dir():
                raise UserError(
                    f"{NAME}targets auto reads weights, and {model} is no folder: give a plan's file to --dry_run"
                )
            patterns = self.arguments.adapter.target_modules
            opened = OpenModel.in_folder(folder, patterns, trust_remote_code, MODEL_FLAG)
            plan = opened.plan_of_weights(config, str(self.settings.trainable_budget))
        return with_sizes(config, plan)

    def dry_lines(self, model: nn.Module, config: AdapterConfig | None) -> list[str]:
        if not (self.settings.alignment_weight and isinstance(config, MoRAConfig)):
            return []
        rank = self.settings.alignment_rank
        aligned_layers(model, config, rank)
        inject(model, config)
        return [
            f"{NAME}alignment_weight: {factor_bytes(model, rank) / 1e6:,.2f} MB of factors on each rank, which the "
            "figures below leave out"
        ]

    def identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = {}
        if self.settings.alignment_weight:
            identity["alignment"] = [self.settings.alignment_weight, self.settings.alignment_rank]
        if self.settings.trainable_budget is not None:
            identity["trainable_budget"] = self.settings.trainable_budget
        return identity

    def injected(self, model: nn.Module, config: AdapterConfig) -> None:
        self.domains = domains_of(model)
        if names := self.domains.names:
            logger.info(f"{len(names)} domains, each with its own MoRA matrix in every layer: {', '.join(names)}")
        if self.settings.alignment_weight and isinstance(config, MoRAConfig):
            self.term = Alignment(model, self._leading, self.settings.alignment_weight)

    # -- domains -------------------------------------------------------------------------------------------------------

    def check_sets(self, sets: Sequence[str]) -> None:
        """Decides which domain's MoRA matrices read each evaluation set; None for the shared ones alone.

        A set that `eval_domains` does not name belongs to the domain with its name, or that it was held out of.
        """
        domains = domain_names(self.arguments) if self.settings.domain_adapters else ()
        for name in sets:
            names = (name, name.removeprefix(f"{HELD_OUT}_"))
            self.read_as[name] = next((domain for domain in names if domain in domains), None)
        for name, domain in eval_entries(self.settings.eval_domains):
            require_set(f"{NAME}eval_domains", name, sets)
            self.read_as[name] = None if domain == SHARED else domain
        if domains and self.read_as:
            read_as = ", ".join(f"{name}: {domain or SHARED}" for name, domain in self.read_as.items())
            logger.info(f"evaluation sets are read as: {read_as}")

    def check_files(self, ranks: Ranks) -> None:
        if self.settings.init_adapter is not None:
            check_same_files(Path(self.settings.init_adapter), ranks)

    def fit(self, model: nn.Module, fingerprint: str, ranks: Ranks) -> None:
        path = self.settings.init_adapter
        if path is not None:
            self._initial = ranks.agree(FLAG, lambda: open_initial(Path(path), model, fingerprint))

    def begin(self, engine: Any) -> None:
        if self._initial is not None:
            logger.info(put_initial(self._initial, engine))

    def check(self, engine: Any, ids: Tensor) -> None:
        """Whether every adapted layer reads complete rows, as `token_nll` runs it."""
        if not self.domains.names:
            return
        positions = torch.arange(ids.shape[1]).expand_as(ids).to(ids)
        first, second = self.domains.names[:2]
        try:
            with beside_training(engine), self.rows([first, second, first]):
                token_nll(engine, {"input_ids": ids, "position_ids": positions, "labels": ids})
        except RunError as error:
            raise UserError(f"{NAME}domain_adapters: {error}") from error

    @property
    def variants(self) -> tuple[str, ...]:
        return (SHARED, *self.domains.names) if self.domains.names else ()

    @contextmanager
    def rows(self, sources: Sequence[str]) -> Iterator[None]:
        """Until backward has ended: gradient checkpointing reads the rows' domains there again."""
        if not self.domains.names:
            yield
            return
        self.domains.set(sources)
        try:
            yield
        finally:
            self.domains.set_all(None)

    @property
    def probe_domain(self) -> str | None:
        """Any domain: a NaN in the matrix of another one makes the loss NaN too."""
        return self.domains.names[0] if self.domains.names else None

    def domain_of(self, name: str) -> str | None:
        return self.read_as.get(name)
