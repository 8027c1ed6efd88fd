"""--targets in a run, in a dry run and in tools/analyze_weights.py: which plan holds, and where it comes from.

a new run        --targets FILE: read before anything is touched; --targets auto: made of the base's weights by rank
                 0, before injection; either way all ranks have rank 0's, and it is OUTPUT_DIR/targets.yaml
a resumed run    the sides that the checkpoint holds; a FILE, or a budget, that says otherwise is refused
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mora_ds.adapters.config import AdapterConfig, MoRAConfig
from mora_ds.adapters.inject import count_parameters
from mora_ds.adapters.layer import linear_shape
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
    sized,
)
from mora_ds.checkpoint.state import TrainerState
from mora_ds.config.adapter import AdapterArguments
from mora_ds.errors import UserError
from mora_ds.eval.weights import Weight, analyse
from mora_ds.models.base import BaseCheckpoint, NotOneToOne, renamed_keys
from mora_ds.models.load import folder_config
from mora_ds.planning.step import Work, planned_model
from mora_ds.runtime.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenModel:
    """A model's weights on disk and what its layers are called; none of them is read."""

    base: BaseCheckpoint
    weights: Mapping[str, Weight]
    """Of the layers that may be adapted."""
    parameters: int
    """Of the whole model, each tied tensor once."""

    @classmethod
    def of(cls, model: Any, base: BaseCheckpoint, keys: Mapping[str, str], patterns: Iterable[str]) -> OpenModel:
        """`model`: bare; `keys`: parameter name -> key in `base`; `patterns`: --target_modules."""
        layers: dict[str, Any] = dict(match_targets(model, tuple(patterns)))
        weights = {name: Weight(keys[f"{name}.weight"], *linear_shape(module)) for name, module in layers.items()}
        return cls(base, weights, count_parameters(model))

    def plan(self, scores: Mapping[str, float], by: str, config: MoRAConfig, budget: str) -> TargetPlan:
        """The budget spent by these scores. Raises `UserError` for a budget that the layers do not take."""
        sides = spend(self._candidates(config, scores), parse_budget(budget, self.parameters), config.step)
        name, fingerprint = self.base.folder.name, self.base.fingerprint()
        return TargetPlan(name, fingerprint, sides, budget, by, config.operator_name, dict(scores))

    def check_budget(self, config: MoRAConfig, budget: str) -> None:
        """What of that can be told without scores."""
        even = dict.fromkeys(self.weights, 1.0)
        check_budget(self._candidates(config, even), parse_budget(budget, self.parameters), config.step)

    def _candidates(self, config: MoRAConfig, scores: Mapping[str, float]) -> list[Candidate]:
        return [
            Candidate(name, each.d_in, each.d_out, config.largest_size(each.d_in, each.d_out), scores[name])
            for name, each in self.weights.items()
        ]

    def plan_of_weights(self, config: MoRAConfig, budget: str) -> TargetPlan:
        """The same by what `analyse` finds."""
        self.check_budget(config, budget)
        scores = {each.module: each.score for each in analyse(self.base, self.weights)}
        return self.plan(scores, BY_WEIGHTS, config, budget)


def open_model(
    folder: Path, patterns: Iterable[str], trust_remote_code: bool = False, flag: str = "MODEL"
) -> OpenModel:
    """Of a Hugging Face folder. Raises `UserError` where its files do not hold the model's weights one to one."""
    base, config = BaseCheckpoint.open(folder, flag), folder_config(folder, trust_remote_code)
    model = planned_model(Work(config, None, seq_len=1, trust_remote_code=trust_remote_code))
    ties = dict(getattr(model, "all_tied_weights_keys", {}) or {})
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    try:
        keys = base.map_parameters(names, model.base_model_prefix, ties, renamed_keys(model, base.keys()))
    except NotOneToOne as error:
        raise UserError(
            f"{flag}: {error}. They are converted as the model is loaded: name the base that a run of it has written, "
            "OUTPUT_DIR/base"
        ) from error
    return OpenModel.of(model, base, keys, patterns)


def plan_of_file(adapter: AdapterArguments) -> TargetPlan | None:
    """That of --targets FILE, its sides fit for the operator; None for no file. Raises `UserError`."""
    if adapter.targets in (None, AUTO):
        return None
    plan = read_plan(Path(str(adapter.targets)).expanduser())
    config = adapter.config(seed=0)
    if isinstance(config, MoRAConfig):
        sized(config, plan.sides, f"--targets {adapter.targets}")
    return plan


@dataclass(frozen=True)
class RunTargets:
    """What decides in a run."""

    adapter: AdapterArguments
    given: TargetPlan | None
    folder: Path
    """The run's output folder."""
    checkpoint: Path | None
    ranks: Ranks

    def planned(
        self, config: AdapterConfig, model: Any, base: BaseCheckpoint, keys: Mapping[str, str]
    ) -> AdapterConfig:
        """`config` with the squares of the plan, if there is one; the same on every rank. Collective.

        Raises `UserError` for a plan of another model or with layers that it does not have, a budget that cannot be
        held, and a resumed run that has another plan than its checkpoint.
        """
        if not isinstance(config, MoRAConfig):
            return config
        held = {} if self.checkpoint is None else held_sides(self.checkpoint)
        if self.adapter.targets is None and not held:
            return config
        if self.adapter.targets is None:
            raise UserError(f"{self.checkpoint} has squares by a plan: give --targets, as at its start")

        def decide() -> TargetPlan:
            opened = OpenModel.of(model, base, keys, self.adapter.target_modules)
            found = self._given(opened, held) if self.given else self._auto(opened, config, held)
            if not _holds(self.folder / TARGETS_FILE, found):
                found.write(self.folder / TARGETS_FILE)
            return found

        plan = self.ranks.on_first(decide)
        logger.info(plan)
        return sized(config, plan.sides)

    def _given(self, opened: OpenModel, held: Mapping[str, int]) -> TargetPlan:
        assert self.given is not None
        path, base = Path(str(self.adapter.targets)), opened.base
        check_model(self.given, path, str(base.folder), base.fingerprint())
        if self.checkpoint is not None:
            _check_same(self.checkpoint, held, self.given.sides, str(path))
        return self.given

    def _auto(self, opened: OpenModel, config: MoRAConfig, held: Mapping[str, int]) -> TargetPlan:
        budget = str(self.adapter.trainable_budget)
        if self.checkpoint is None:
            logger.info("--targets auto: reading the base's weights, layer by layer")
            return opened.plan_of_weights(config, budget)
        if not held:
            raise UserError(f"{self.checkpoint} has no plan of squares: drop --targets, as at its start")
        if outside := [name for name in held if name not in opened.weights]:
            raise UserError(f"--target_modules leaves out {outside[0]}, which has a square in {self.checkpoint}")
        used, wanted = sum(side**2 for side in held.values()), parse_budget(budget, opened.parameters)
        if not (1 - TOLERANCE) * wanted <= used <= wanted:
            raise UserError(
                f"--trainable_budget {budget} is {wanted:,} parameters, and the squares of {self.checkpoint} have "
                f"{used:,}: a run keeps the plan that it has begun with"
            )
        if (path := self.folder / TARGETS_FILE).is_file():
            _check_same(self.checkpoint, held, (plan := read_plan(path)).sides, str(path))
            return plan
        sides = {name: held.get(name, 0) for name in opened.weights}
        return TargetPlan(
            opened.base.folder.name, opened.base.fingerprint(), sides, budget, BY_WEIGHTS, config.operator_name
        )


def held_sides(checkpoint: Path) -> dict[str, int]:
    """The plan that a checkpoint's run has; {} for none."""
    adapter = TrainerState.read(checkpoint).identity.get("adapter") or {}
    return dict(adapter.get("layer_sizes") or {})


def _holds(path: Path, plan: TargetPlan) -> bool:
    """Whether the file says the same already, perhaps with notes."""
    try:
        found = read_plan(path)
    except UserError:
        return False  # none, or not one: it is written anew
    return (found.fingerprint, dict(found.sides)) == (plan.fingerprint, dict(plan.sides))


def _check_same(checkpoint: Path, held: Mapping[str, int], wanted: Mapping[str, int], where: str) -> None:
    names = [name for name in sorted({*held, *wanted}) if held.get(name, 0) != wanted.get(name, 0)]
    if names:
        lines = [f"{name}: side {held.get(name, 0)} there, {wanted.get(name, 0)} in the plan" for name in names[:3]]
        more = [f"and {len(names) - 3} more"] if len(names) > 3 else []
        raise UserError(
            "\n  ".join([f"--targets: {checkpoint} was trained by another plan than {where}:", *lines, *more])
        )


def planned_config(
    adapter: AdapterArguments, config: AdapterConfig, model: str, trust_remote_code: bool
) -> AdapterConfig:
    """`config` as a run of the model (its folder) would have it, for a dry run. A file's fingerprint is not compared:
    that would read every weight. Raises `UserError`."""
    if adapter.targets is None or not isinstance(config, MoRAConfig):
        return config
    plan = plan_of_file(adapter)
    if plan is None:
        folder = Path(model).expanduser()
        if not folder.is_dir():
            raise UserError(f"--targets auto reads weights, and {model} is no folder: give a plan's file to --dry_run")
        opened = open_model(folder, adapter.target_modules, trust_remote_code, "--model_name_or_path")
        plan = opened.plan_of_weights(config, str(adapter.trainable_budget))
    return sized(config, plan.sides)
