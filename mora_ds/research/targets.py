"""Plans of targets: which layers get a MoRA matrix, and of what side, under a budget of parameters.

    targets.yaml      format, model, fingerprint, budget, by, operator, layers: {name: side}

A layer with side 0, or without a line, gets no matrix. People read and edit the file and give it to `research.targets`;
`auto` makes it from the base's weights. The same weights give the same bytes; comments are for people only. A plan
reaches the core as `MoRAConfig.layer_sizes`, which checkpoints, portable adapters and exports carry: a resumed run has
its sides from there, and a file or a budget that contradicts them is refused.

How a budget is divided:

    score     of a layer: what a parameter is worth there, from its weights or from gradients
    r_hat^2   = factor * score * (d_in + d_out)      MoRA's own size, r_hat^2 = rank * (d_in + d_out), with a rank in
                                                     proportion to the score; the factor uses the budget up

A layer gets a matrix if its rank factor * score is 1 or more, so that a small budget goes to the layers of the highest
scores; the side is at most the largest that adds anything.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import yaml

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import count_parameters
from mora_ds.adapters.layer import ExpertStack, linear_shape
from mora_ds.adapters.ops.spec import round_side
from mora_ds.adapters.target_modules import match_targets
from mora_ds.checkpoint.state import TrainerState
from mora_ds.common.errors import UserError, nearest
from mora_ds.common.files import atomic_path, load_yaml
from mora_ds.common.untrusted import MAX_SIDE, file_name, shown, typed
from mora_ds.models.base import BaseCheckpoint, NotOneToOne, map_model
from mora_ds.models.load import folder_config
from mora_ds.planning.step import Work, planned_model
from mora_ds.research.weights import Weight, analyse
from mora_ds.runtime.ranks import Ranks

logger = logging.getLogger(__name__)

TARGETS_FILE = "targets.yaml"
AUTO = "auto"
BY_WEIGHTS, BY_PROBE = "weights", "probe"

_TARGETS = "research.targets"
_BUDGET = "trainable_budget"
_HEAD = """\
# Which layers get a MoRA matrix, and of what side (r_hat; it has r_hat^2 parameters): research.targets of a recipe.
# You may edit it: 0, or no line, is no matrix; sides are even for rotate, and at most the layer's longer side.
"""


# -- the file ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TargetPlan:
    """Sides of the MoRA matrices of one model's layers."""

    model: str
    """Name of the model, for people."""
    fingerprint: str
    """`BaseCheckpoint.fingerprint` of the base that the plan is for."""
    sides: Mapping[str, int]
    """Layer -> r_hat, in the model's order; 0: no matrix."""
    budget: str = ""
    """The value of the budget, 0.5% or a number; "" for none."""
    by: str = ""
    """Where the scores come from: weights or probe."""
    operator: str = ""
    """The operator that the sides were made for; "" if unknown."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """For the comments in the file; not read back."""

    @property
    def parameters(self) -> int:
        return sum(side**2 for side in self.sides.values())

    def __str__(self) -> str:
        chosen = [side for side in self.sides.values() if side]
        within = f" of a budget of {self.budget}" if self.budget else ""
        return (
            f"plan{f' by {self.by}' if self.by else ''}: {len(chosen)} of {len(self.sides)} layers, sides "
            f"{min(chosen)} to {max(chosen)}, {self.parameters:,} parameters{within}"
        )

    def text(self) -> str:
        """The contents of the file."""
        facts = {
            "format": 1,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "budget": self.budget,
            "by": self.by,
            "operator": self.operator,
        }
        lines = []
        for name, side in self.sides.items():
            notes = [f"{side**2:,} parameters"] if side else []
            notes += [f"score {self.scores[name]:.3e}"] if name in self.scores else []
            quoted = yaml.safe_dump(name, width=10_000).removesuffix("\n").removesuffix("\n...")
            lines.append(f"  {quoted}: {side}" + (f"    # {', '.join(notes)}" if notes else ""))
        return "\n".join([_HEAD + yaml.safe_dump(facts, sort_keys=False).rstrip(), "layers:", *lines, ""])

    def write(self, path: Path) -> None:
        """Write the file atomically. Raises `RunError` on a full disk."""
        with atomic_path(path) as beside:
            beside.write_text(self.text(), encoding="utf-8")


def read_plan(path: Path) -> TargetPlan:
    """The plan in a file. Raises `UserError` naming the file where it is no YAML, or a key or a side is wrong."""
    where = f"{_TARGETS} {path}"
    content = load_yaml(str(path), _TARGETS)
    known = ("format", "model", "fingerprint", "budget", "by", "operator", "layers")
    for key in content:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}.{nearest(str(key), known)}")
    if content.get("format") != 1:
        raise UserError(f"{where}: format is {content.get('format')!r}, and only 1 is known")
    for key in ("fingerprint", "layers"):
        if not content.get(key):
            raise UserError(f"{where}: there is no {key!r} in it")
    if not isinstance(content["layers"], dict):
        raise UserError(f"{where}: layers must be lines of `name: side`")
    sides = {}
    for name, side in content["layers"].items():
        if isinstance(side, bool) or not isinstance(side, int) or not 0 <= side <= MAX_SIDE:
            raise UserError(f"{where}: the side of {name} must be a whole number, 0 for none, got {shown(side)}")
        sides[file_name(str(name), where)] = side
    if not any(sides.values()):
        raise UserError(f"{where}: no layer has a side above 0")
    texts = {key: typed(str, str(content.get(key) or ""), where) for key in known[1:6]}
    return TargetPlan(sides=sides, **texts)


def with_sizes(config: MoRAConfig, plan: TargetPlan) -> MoRAConfig:
    """`config` with MoRA matrices of the plan's sides on its layers and no others. Raises `UserError` for a side that
    the operator does not take."""
    return replace(config, layer_sizes=tuple((name, side) for name, side in plan.sides.items() if side))


# -- the budget --------------------------------------------------------------------------------------------------------


def parse_budget(text: str, parameters: int | None = None) -> int:
    """The number of parameters that "0.5%" (of the model's `parameters`) or "250000" stands for; without `parameters`
    the text is only checked. Raises `UserError` where it is no budget."""
    number = text.strip().removesuffix("%").replace("_", "")
    try:
        value = Decimal(number)
    except InvalidOperation:
        raise UserError(f"{_BUDGET} must be like 0.5% or 250000, got {text!r}") from None
    if not (value.is_finite() and 0 < value < 2**63):
        raise UserError(f"{_BUDGET} must be above 0 and below {2**63}, got {text!r}")
    if text.strip().endswith("%"):
        return int(value * (parameters or 0) / 100)
    if value != value.to_integral_value():
        raise UserError(f"{_BUDGET} {text} is no whole number of parameters: did you mean {text}%?")
    return int(value)


@dataclass(frozen=True)
class Candidate:
    """A layer that may get a MoRA matrix."""

    name: str
    d_in: int
    d_out: int
    largest: int
    """Largest side that adds anything there."""
    score: float = 1.0
    """Not negative; only ratios matter, and four digits count, so that rounding elsewhere changes no plan."""

    @property
    def value(self) -> float:
        """The score to four digits."""
        return float(f"{self.score:.3e}")

    @property
    def weight(self) -> float:
        return self.value * (self.d_in + self.d_out)

    def side(self, factor: float, smallest: int, multiple: int) -> int:
        """The side by the rule with this factor, rounded down; at least that of rank 1."""
        least = math.isqrt(self.d_in + self.d_out)
        wanted = max(least, math.isqrt(int(min(factor * self.weight, 1e18))))
        return max(smallest, round_side(min(wanted, self.largest), multiple, smallest))


def spend(candidates: Sequence[Candidate], budget: int, smallest: int = 1, multiple: int = 1) -> dict[str, int]:
    """Name -> side (0: no matrix), in the order of `candidates`; ties go by name.

    `smallest` and `multiple`: as for `round_side`. The sum of squares is at most the budget. Multiples of 8 and then
    every side are taken where those of `multiple` leave more than a hundredth of it. Raises `UserError` for a budget
    that is too small for one matrix, or more than all layers can hold.
    """
    layers = sorted((each for each in candidates if each.weight > 0), key=lambda each: (-each.value, each.name))
    if not layers:
        raise UserError(f"{_BUDGET}: no layer has a score above 0")
    first = min(layers, key=lambda each: (each.side(0, smallest, 1), each.name))
    least = first.side(0, smallest, 1)
    if budget < least**2:
        raise UserError(
            f"{_BUDGET}: {budget:,} parameters are too few for one MoRA matrix: the smallest, of side {least} on "
            f"{first.name}, has {least**2:,}"
        )
    capacity = _cost(layers, math.inf, smallest, 1)
    if budget > capacity:
        raise UserError(
            f"{_BUDGET}: {budget:,} parameters are more than the {len(layers)} layers can hold: {capacity:,}, with the "
            "largest matrices that add anything"
        )
    sides: dict[str, int] = {}
    for step in (multiple, min(multiple, 8), 1):
        sides = _sides(layers, budget, smallest, step)
        if sum(side**2 for side in sides.values()) >= 0.99 * budget:
            break
    return {each.name: sides.get(each.name, 0) for each in candidates}


def _cost(layers: Iterable[Candidate], factor: float, smallest: int, multiple: int) -> int:
    return sum(each.side(factor, smallest, multiple) ** 2 for each in layers)


def _sides(layers: Sequence[Candidate], budget: int, smallest: int, multiple: int) -> dict[str, int]:
    """Sides of the first layers, as many of them as have a rank of 1 or more."""
    count = len(layers)
    while count > 1 and (
        budget / math.fsum(each.weight for each in layers[:count]) * layers[count - 1].value < 1
        and _cost(layers[: count - 1], math.inf, smallest, multiple) >= budget
    ):
        count -= 1
    chosen = [each for each in layers[:count] if each.side(0, smallest, multiple) ** 2 <= budget]
    while len(chosen) > 1 and _cost(chosen, 0, smallest, multiple) > budget:
        chosen.pop()
    low, high = 0.0, budget / min(each.weight for each in chosen) + 1
    for _ in range(200):  # bisection of the factor; what full layers cannot take goes to the others
        middle = (low + high) / 2
        if _cost(chosen, middle, smallest, multiple) <= budget:
            low = middle
        else:
            high = middle
    sides = {each.name: each.side(low, smallest, multiple) for each in chosen}
    rest = budget - sum(side**2 for side in sides.values())
    while True:  # then one step for each layer that it still fits, those furthest below the rule first
        grown = 0
        for each in sorted(chosen, key=lambda each: sides[each.name] ** 2 - low * each.weight):
            side = sides[each.name]
            if side >= each.largest:
                continue
            above = side + 1
            while above < each.largest and round_side(above, multiple, smallest) <= side:
                above += 1
            above = round_side(above, multiple, smallest)
            if 0 < above**2 - side**2 <= rest:
                rest -= above**2 - side**2
                grown += 1
                sides[each.name] = above
        if not grown:
            return sides


# -- a model -----------------------------------------------------------------------------------------------------------


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
        candidates = [
            Candidate(name, each.d_in, each.d_out, config.largest_size(each.d_in, each.d_out), scores[name])
            for name, each in self.weights.items()
        ]
        sides = spend(candidates, parse_budget(budget, self.parameters), config.step, config.r_hat_multiple)
        fingerprint = self.base.fingerprint()
        return TargetPlan(self.base.folder.name, fingerprint, sides, budget, by, config.operator_name, dict(scores))

    def check_budget(self, config: MoRAConfig, budget: str) -> None:
        """Raise `UserError` for a budget that the layers cannot take, before scores are known."""
        self.plan(dict.fromkeys(self.weights, 1.0), BY_WEIGHTS, config, budget)

    def plan_of_weights(self, config: MoRAConfig, budget: str) -> TargetPlan:
        """Spend the budget by the scores that `analyse` gives the weights."""
        self.check_budget(config, budget)
        scores = {each.module: each.score for each in analyse(self.base, self.weights)}
        return self.plan(scores, BY_WEIGHTS, config, budget)


def open_model(
    folder: Path, patterns: Iterable[str], trust_remote_code: bool = False, flag: str = "MODEL"
) -> OpenModel:
    """Open a Hugging Face folder. Raises `UserError` where its files do not hold the model's weights one to one."""
    base = BaseCheckpoint.open(folder, flag)
    config = folder_config(folder, trust_remote_code, flag)
    model = planned_model(Work(config, None, seq_len=1, trust_remote_code=trust_remote_code))
    try:
        keys = map_model(base, model, [name for name, _ in model.named_parameters(remove_duplicate=False)])
    except NotOneToOne as error:
        raise UserError(
            f"{flag}: {error}. They are converted as the model is loaded: name the base that a run of it has written, "
            "OUTPUT_DIR/base"
        ) from error
    return OpenModel.of(model, base, keys, patterns)


# -- a run -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunTargets:
    """Decides which plan holds in a run with `research.targets`."""

    targets: str
    budget: str | None
    patterns: Sequence[str]
    """--target_modules."""
    file_plan: TargetPlan | None
    """The plan of a file."""
    folder: Path
    """The run's output folder."""
    checkpoint: Path | None
    ranks: Ranks

    def planned(self, config: MoRAConfig, model: Any, base: BaseCheckpoint, keys: Mapping[str, str]) -> MoRAConfig:
        """`config` with the sides of the plan, the same on every process. Collective.

        Raises `UserError` for a plan of another model or with layers that it does not have, a budget that cannot be
        met, and a resumed run whose plan is not its checkpoint's.
        """

        def decide() -> TargetPlan:
            opened = OpenModel.of(model, base, keys, self.patterns)
            plan = self._auto(opened, config) if self.file_plan is None else self._checked(self.file_plan, opened)
            if not _holds(self.folder / TARGETS_FILE, plan):
                plan.write(self.folder / TARGETS_FILE)
            return plan

        plan = self.ranks.on_first("plan of targets", decide, long=True)
        logger.info(plan)
        return with_sizes(config, plan)

    @property
    def _saved(self) -> dict[str, int]:
        """The sides in the checkpoint; {} for a new run and for one without a plan."""
        if self.checkpoint is None:
            return {}
        adapter = TrainerState.read(self.checkpoint).identity.get("adapter") or {}
        return dict(adapter.get("layer_sizes") or {})

    def _checked(self, plan: TargetPlan, opened: OpenModel) -> TargetPlan:
        """The file's plan, compared with the model and the checkpoint."""
        fingerprint = opened.base.fingerprint()
        if plan.fingerprint != fingerprint:
            raise UserError(
                f"{_TARGETS} {self.targets} is a plan for {plan.model or 'a model'} with the fingerprint "
                f"{plan.fingerprint}; {opened.base.folder} has {fingerprint}: make one for it (mora-ds analyze --write)"
            )
        if self.checkpoint is not None:
            self._require_same(plan, self.targets)
        return plan

    def _auto(self, opened: OpenModel, config: MoRAConfig) -> TargetPlan:
        """A plan from the weights, or in a resumed run the one with which it began."""
        budget = str(self.budget)
        if self.checkpoint is None:
            logger.info(f"{_TARGETS} auto: reading the base's weights, layer by layer")
            return opened.plan_of_weights(config, budget)
        saved = self._saved
        if not saved:
            raise UserError(f"{self.checkpoint} has no plan of MoRA matrices: drop {_TARGETS}, as at its start")
        if outside := [name for name in saved if name not in opened.weights]:
            raise UserError(f"--target_modules leaves out {outside[0]}, which has a MoRA matrix in {self.checkpoint}")
        path = self.folder / TARGETS_FILE
        if path.is_file():
            plan = read_plan(path)
            self._require_same(plan, str(path))
            if plan.budget != budget:
                raise UserError(
                    f"research.{_BUDGET} {budget}: {self.checkpoint} was trained under {plan.budget}, and a resumed "
                    f"run keeps its matrices: give {plan.budget}, or begin a new run"
                )
            return plan
        sides = {name: saved.get(name, 0) for name in opened.weights}
        fingerprint = opened.base.fingerprint()
        return TargetPlan(opened.base.folder.name, fingerprint, sides, budget, BY_WEIGHTS, config.operator_name)

    def _require_same(self, plan: TargetPlan, where: str) -> None:
        saved = self._saved
        names = sorted({*saved, *plan.sides})
        different = [name for name in names if saved.get(name, 0) != plan.sides.get(name, 0)]
        if different:
            lines = [
                f"{name}: side {saved.get(name, 0)} there, {plan.sides.get(name, 0)} in the plan"
                for name in different[:3]
            ]
            more = [f"and {len(different) - 3} more"] if len(different) > 3 else []
            head = f"{_TARGETS}: {self.checkpoint} was trained by another plan than {where}:"
            raise UserError("\n  ".join([head, *lines, *more]))


def _holds(path: Path, plan: TargetPlan) -> bool:
    """Whether the file holds this plan already, perhaps with comments."""
    try:
        other = read_plan(path)
    except UserError:
        return False  # there is none, or it is damaged: it is written anew
    return (other.fingerprint, dict(other.sides)) == (plan.fingerprint, dict(plan.sides))
