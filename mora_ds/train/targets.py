"""--targets: which plan of MoRA matrices holds in a run, in a dry run and in mora-ds analyze.

a new run        --targets FILE: read before anything is touched; --targets auto: made from the base's weights by rank
                 0, before injection; all processes have rank 0's plan, which is written to OUTPUT_DIR/targets.yaml
a resumed run    the sides of the checkpoint's matrices; a FILE, or a budget, that contradicts them is refused
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mora_ds.adapters.config import AdapterConfig, MoRAConfig
from mora_ds.adapters.inject import count_parameters
from mora_ds.adapters.layer import ExpertStack, linear_shape
from mora_ds.adapters.rank_allocation import TOLERANCE, Candidate, check_budget, spend
from mora_ds.adapters.target_modules import match_targets
from mora_ds.adapters.target_plan import (
    AUTO,
    BY_WEIGHTS,
    TARGETS_FILE,
    TargetPlan,
    check_model,
    parse_budget,
    read_plan,
    with_sizes,
)
from mora_ds.checkpoint.state import TrainerState
from mora_ds.common.errors import UserError
from mora_ds.common.untrusted import expanded
from mora_ds.config.adapter import AdapterArguments
from mora_ds.eval.weights import Weight, analyse
from mora_ds.models.base import BaseCheckpoint, NotOneToOne, map_model
from mora_ds.models.load import folder_config
from mora_ds.planning.step import Work, planned_model
from mora_ds.runtime.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenModel:
    """A model's weights on disk and the names of its layers; no weight is read yet."""

    base: BaseCheckpoint
    weights: Mapping[str, Weight]
    """Name of a layer that may be adapted -> its weight."""
    parameters: int
    """Parameters of the complete model, each tied tensor once."""

    @classmethod
    def of(cls, model: Any, base: BaseCheckpoint, keys: Mapping[str, str], patterns: Iterable[str]) -> OpenModel:
        """`model`: before injection; `keys`: parameter name -> key in `base`; `patterns`: --target_modules."""
        layers: dict[str, Any] = dict(match_targets(model, tuple(patterns)))
        if stacks := [name for name, module in layers.items() if isinstance(module, ExpertStack)]:
            raise UserError(
                f"--target_modules includes {stacks[0]}, experts, whose ranks no plan chooses: leave them out"
            )
        weights = {name: Weight(keys[f"{name}.weight"], *linear_shape(module)) for name, module in layers.items()}
        return cls(base, weights, count_parameters(model))

    def plan(self, scores: Mapping[str, float], by: str, config: MoRAConfig, budget: str) -> TargetPlan:
        """Spend the budget by these scores. Raises `UserError` for a budget that the layers cannot take."""
        parameters = parse_budget(budget, self.parameters)
        sides = spend(self._candidates(config, scores), parameters, config.step, config.r_hat_multiple)
        name, fingerprint = self.base.folder.name, self.base.fingerprint()
        return TargetPlan(name, fingerprint, sides, budget, by, config.operator_name, dict(scores))

    def check_budget(self, config: MoRAConfig, budget: str) -> None:
        """Raise `UserError` for a budget that the layers cannot take, as far as it shows without scores."""
        even = dict.fromkeys(self.weights, 1.0)
        check_budget(self._candidates(config, even), parse_budget(budget, self.parameters), config.step)

    def _candidates(self, config: MoRAConfig, scores: Mapping[str, float]) -> list[Candidate]:
        return [
            Candidate(name, each.d_in, each.d_out, config.largest_size(each.d_in, each.d_out), scores[name])
            for name, each in self.weights.items()
        ]

    def plan_of_weights(self, config: MoRAConfig, budget: str) -> TargetPlan:
        """Spend the budget by the scores that `analyse` gives the weights."""
        self.check_budget(config, budget)
        scores = {each.module: each.score for each in analyse(self.base, self.weights)}
        return self.plan(scores, BY_WEIGHTS, config, budget)


def open_model(
    folder: Path, patterns: Iterable[str], trust_remote_code: bool = False, flag: str = "MODEL"
) -> OpenModel:
    """Open a Hugging Face folder. Raises `UserError` where its files do not hold the model's weights one to one."""
    base, config = BaseCheckpoint.open(folder, flag), folder_config(folder, trust_remote_code, flag)
    model = planned_model(Work(config, None, seq_len=1, trust_remote_code=trust_remote_code))
    try:
        keys = map_model(base, model, [name for name, _ in model.named_parameters(remove_duplicate=False)])
    except NotOneToOne as error:
        raise UserError(
            f"{flag}: {error}. They are converted as the model is loaded: name the base that a run of it has written, "
            "OUTPUT_DIR/base"
        ) from error
    return OpenModel.of(model, base, keys, patterns)


def plan_of_file(adapter: AdapterArguments) -> TargetPlan | None:
    """The plan of --targets FILE, None without a file. Raises `UserError` for sides that the operator cannot have."""
    if adapter.targets in (None, AUTO):
        return None
    plan = read_plan(expanded(str(adapter.targets), "--targets"))
    config = adapter.config(seed=0)
    if isinstance(config, MoRAConfig):
        with_sizes(config, plan.sides, f"--targets {adapter.targets}")
    return plan


@dataclass(frozen=True)
class RunTargets:
    """Decides which plan holds in a run."""

    adapter: AdapterArguments
    file_plan: TargetPlan | None
    """The plan of --targets FILE."""
    folder: Path
    """The run's output folder."""
    checkpoint: Path | None
    ranks: Ranks

    def planned(
        self, config: AdapterConfig, model: Any, base: BaseCheckpoint, keys: Mapping[str, str]
    ) -> AdapterConfig:
        """`config` with the sides of the plan, if there is one; the same on every process. Collective.

        Raises `UserError` for a plan of another model or with layers that it does not have, a budget that cannot be
        met, and a resumed run whose plan is not its checkpoint's.
        """
        if not isinstance(config, MoRAConfig):
            return config
        saved = {} if self.checkpoint is None else saved_sides(self.checkpoint)
        if self.adapter.targets is None:
            if saved:
                raise UserError(f"{self.checkpoint} has MoRA matrices by a plan: give --targets, as at its start")
            return config

        def decide() -> TargetPlan:
            opened = OpenModel.of(model, base, keys, self.adapter.target_modules)
            plan = self._auto(opened, config, saved) if self.file_plan is None else self._checked(opened, saved)
            if not _is_same(self.folder / TARGETS_FILE, plan):
                plan.write(self.folder / TARGETS_FILE)
            return plan

        plan = self.ranks.on_first("plan of targets", decide, long=True)
        logger.info(plan)
        return with_sizes(config, plan.sides)

    def _checked(self, opened: OpenModel, saved: Mapping[str, int]) -> TargetPlan:
        """The file's plan, compared with the model and the checkpoint."""
        assert self.file_plan is not None
        path = Path(str(self.adapter.targets))
        check_model(self.file_plan, path, str(opened.base.folder), opened.base.fingerprint())
        if self.checkpoint is not None:
            _check_same(self.checkpoint, saved, self.file_plan.sides, str(path))
        return self.file_plan

    def _auto(self, opened: OpenModel, config: MoRAConfig, saved: Mapping[str, int]) -> TargetPlan:
        """The plan of --targets auto: from the weights, or in a resumed run the one with which it began."""
        budget = str(self.adapter.trainable_budget)
        if self.checkpoint is None:
            logger.info("--targets auto: reading the base's weights, layer by layer")
            return opened.plan_of_weights(config, budget)
        if not saved:
            raise UserError(f"{self.checkpoint} has no plan of MoRA matrices: drop --targets, as at its start")
        if outside := [name for name in saved if name not in opened.weights]:
            raise UserError(f"--target_modules leaves out {outside[0]}, which has a MoRA matrix in {self.checkpoint}")
        used, wanted = sum(side**2 for side in saved.values()), parse_budget(budget, opened.parameters)
        if not (1 - TOLERANCE) * wanted <= used <= wanted:
            raise UserError(
                f"--trainable_budget {budget} is {wanted:,} parameters, and the MoRA matrices of {self.checkpoint} "
                f"have {used:,}: a run keeps the plan with which it began"
            )
        if (path := self.folder / TARGETS_FILE).is_file():
            _check_same(self.checkpoint, saved, (plan := read_plan(path)).sides, str(path))
            return plan
        sides, base = {name: saved.get(name, 0) for name in opened.weights}, opened.base
        return TargetPlan(base.folder.name, base.fingerprint(), sides, budget, BY_WEIGHTS, config.operator_name)


def saved_sides(checkpoint: Path) -> dict[str, int]:
    """Layer -> side of its MoRA matrix in the plan of the checkpoint's run; {} for a run without a plan."""
    adapter = TrainerState.read(checkpoint).identity.get("adapter") or {}
    return dict(adapter.get("layer_sizes") or {})


def _is_same(path: Path, plan: TargetPlan) -> bool:
    """Whether the file holds this plan already, perhaps with comments."""
    try:
        other = read_plan(path)
    except UserError:
        return False  # there is none, or it is damaged: it is written anew
    return (other.fingerprint, dict(other.sides)) == (plan.fingerprint, dict(plan.sides))


def _check_same(checkpoint: Path, saved: Mapping[str, int], wanted: Mapping[str, int], where: str) -> None:
    names = [name for name in sorted({*saved, *wanted}) if saved.get(name, 0) != wanted.get(name, 0)]
    if names:
        lines = [f"{name}: side {saved.get(name, 0)} there, {wanted.get(name, 0)} in the plan" for name in names[:3]]
        more = [f"and {len(names) - 3} more"] if len(names) > 3 else []
        raise UserError(
            "\n  ".join([f"--targets: {checkpoint} was trained by another plan than {where}:", *lines, *more])
        )


def planned_config(
    adapter: AdapterArguments, config: AdapterConfig, model: str, trust_remote_code: bool
) -> AdapterConfig:
    """`config` as a run of the folder `model` would have it, for a dry run. Raises `UserError`.

    The fingerprint of a file is not compared, which would read every weight.
    """
    if adapter.targets is None or not isinstance(config, MoRAConfig):
        return config
    plan = plan_of_file(adapter)
    if plan is None:
        folder = expanded(model, "--model_name_or_path")
        if not folder.is_dir():
            raise UserError(f"--targets auto reads weights, and {model} is no folder: give a plan's file to --dry_run")
        opened = open_model(folder, adapter.target_modules, trust_remote_code, "--model_name_or_path")
        plan = opened.plan_of_weights(config, str(adapter.trainable_budget))
    return with_sizes(config, plan.sides)
