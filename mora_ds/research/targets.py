"""Plans of targets: which layers get a MoRA matrix, and of what side, under a budget of parameters.

    targets.yaml      format, model, fingerprint, layers: {name: side}

A layer with side 0, or without a line, gets no matrix. People read and edit the file and give it to `research.targets`;
`auto` makes it from the base's weights. The same weights give the same bytes; comments are for people only. A plan
reaches the core as `MoRAConfig.layer_sizes`, which checkpoints, portable adapters and exports carry: a resumed run
must have the sides of its checkpoint, and the budget under which it began.

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
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any

import yaml

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import count_parameters
from mora_ds.adapters.layer import ExpertStack, linear_shape
from mora_ds.adapters.ops.spec import round_side
from mora_ds.adapters.target_modules import match_targets
from mora_ds.checkpoint.state import TrainerState
from mora_ds.common.errors import Bounds, UserError, named_as_flags
from mora_ds.common.files import atomic_path, load_yaml
from mora_ds.common.untrusted import MAX_SIDE, FileName, shown, typed
from mora_ds.models.base import BaseCheckpoint, NotOneToOne, map_model
from mora_ds.models.load import LoadedBase, folder_config
from mora_ds.planning.step import Work, planned_model
from mora_ds.research.weights import Weight, analyse

logger = logging.getLogger(__name__)

TARGETS_FILE = "targets.yaml"
AUTO = "auto"

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
    origin: str = ""
    """How the plan was made, for people: a comment in the file, which is not read back."""

    @property
    def parameters(self) -> int:
        return sum(side**2 for side in self.sides.values())

    def __str__(self) -> str:
        chosen = [side for side in self.sides.values() if side]
        return (
            f"plan: {len(chosen)} of {len(self.sides)} layers, sides {min(chosen)} to {max(chosen)}, "
            f"{self.parameters:,} parameters{self.origin and f', {self.origin}'}"
        )

    def text(self) -> str:
        """The contents of the file."""
        head = _HEAD + (f"# {self.origin}\n" if self.origin else "")
        content = {
            "format": 1,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "layers": dict(self.sides),
        }
        return head + yaml.safe_dump(content, sort_keys=False, width=10_000)

    def write(self, path: Path) -> None:
        """Write the file atomically. Raises `RunError` on a full disk."""
        with atomic_path(path) as beside:
            beside.write_text(self.text(), encoding="utf-8")


@dataclass(frozen=True)
class _PlanFile:
    """The file as YAML reads it."""

    format: int
    fingerprint: str
    layers: dict[FileName, Annotated[int, Bounds(least=0, most=MAX_SIDE)]]
    model: str = "a model"


def read_plan(path: Path) -> TargetPlan:
    """The plan in a file. Raises `UserError` naming the file where it is no YAML, or a key or a side is wrong."""
    where = f"{_TARGETS} {path}"
    content: _PlanFile = typed(_PlanFile, load_yaml(str(path), _TARGETS), where)
    if content.format != 1:
        raise UserError(f"{where}: format is {content.format}, and only 1 is known")
    if not any(content.layers.values()):
        raise UserError(f"{where}: no layer has a side above 0")
    return TargetPlan(content.model, content.fingerprint, content.layers)


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


def spend(
    candidates: Sequence[Candidate],
    budget: int,
    smallest: int = 1,
    multiple: int = 1,
) -> dict[str, int]:
    """Name -> side (0: no matrix), in the order of `candidates`; ties go by name.

    `smallest` and `multiple`: as for `round_side`. The sum of squares is at most the budget. Multiples of 8 and then
    every side are taken where those of `multiple` leave more than a hundredth of it. Raises `UserError` for a budget
    that is too small for one matrix, or more than all layers can hold.
    """
    layers = [layer for layer in candidates if layer.weight > 0]
    layers.sort(key=lambda layer: (-layer.value, layer.name))
    if not layers:
        raise UserError(f"{_BUDGET}: no layer has a score above 0")
    cheapest = min(layers, key=lambda layer: (layer.side(0, smallest, 1), layer.name))
    least = cheapest.side(0, smallest, 1)
    if budget < least**2:
        raise UserError(
            f"{_BUDGET}: {budget:,} parameters are too few for one MoRA matrix: the smallest, of side {least} on "
            f"{cheapest.name}, has {least**2:,}"
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
    return {layer.name: sides.get(layer.name, 0) for layer in candidates}


def _cost(layers: Iterable[Candidate], factor: float, smallest: int, multiple: int) -> int:
    return sum(layer.side(factor, smallest, multiple) ** 2 for layer in layers)


def _sides(layers: Sequence[Candidate], budget: int, smallest: int, multiple: int) -> dict[str, int]:
    """Sides of the first layers, as many of them as have a rank of 1 or more."""
    # Without its last layer the rest has a larger rank each. The last one goes while its rank would be below 1, unless
    # the others, all full, could not use the budget up.
    count = len(layers)
    while count > 1 and (
        budget / math.fsum(layer.weight for layer in layers[:count]) * layers[count - 1].value < 1
        and _cost(layers[: count - 1], math.inf, smallest, multiple) >= budget
    ):
        count -= 1
    chosen = [layer for layer in layers[:count] if layer.side(0, smallest, multiple) ** 2 <= budget]
    # Matrices of rank 1 are the smallest there are: as many layers as can pay them.
    while len(chosen) > 1 and _cost(chosen, 0, smallest, multiple) > budget:
        chosen.pop()
    # Bisection of the factor: what full layers cannot take goes to the others.
    low = 0.0
    high = budget / min(layer.weight for layer in chosen) + 1
    for _ in range(200):
        middle = (low + high) / 2
        if _cost(chosen, middle, smallest, multiple) <= budget:
            low = middle
        else:
            high = middle
    sides = {layer.name: layer.side(low, smallest, multiple) for layer in chosen}
    # Rounding down has left a little: it buys single steps, first for the layers furthest below the rule.
    unspent = budget - sum(side**2 for side in sides.values())
    has_grown = True
    while has_grown:
        has_grown = False
        for layer in sorted(chosen, key=lambda layer: sides[layer.name] ** 2 - low * layer.weight):
            side = sides[layer.name]
            larger = next(
                (
                    rounded
                    for wanted in range(side + 1, layer.largest + 1)
                    if (rounded := round_side(wanted, multiple, smallest)) > side
                ),
                side,
            )
            price = larger**2 - side**2
            if 0 < price <= unspent:
                unspent -= price
                sides[layer.name] = larger
                has_grown = True
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
    def of(
        cls,
        model: Any,
        base: BaseCheckpoint,
        keys: Mapping[str, str],
        patterns: Iterable[str],
    ) -> OpenModel:
        """`model`: before injection; `keys`: parameter name -> key in `base`; `patterns`: --target_modules."""
        with named_as_flags("target_modules"):
            layers: dict[str, Any] = dict(match_targets(model, tuple(patterns)))
        if stacks := [name for name, module in layers.items() if isinstance(module, ExpertStack)]:
            raise UserError(
                f"--target_modules includes {stacks[0]}, experts, whose ranks no plan chooses: leave them out"
            )
        weights = {name: Weight(keys[f"{name}.weight"], *linear_shape(module)) for name, module in layers.items()}
        return cls(base, weights, count_parameters(model))

    @classmethod
    def in_folder(
        cls,
        folder: Path,
        patterns: Iterable[str],
        trust_remote_code: bool = False,
        flag: str = "MODEL",
    ) -> OpenModel:
        """Open a Hugging Face folder. Raises `UserError` where its files do not hold the model's weights one to one."""
        base = BaseCheckpoint.open(folder, flag)
        config = folder_config(folder, trust_remote_code, flag)
        model = planned_model(Work(config, None, seq_len=1, trust_remote_code=trust_remote_code))
        try:
            keys = map_model(
                base,
                model,
                [name for name, _ in model.named_parameters(remove_duplicate=False)],
            )
        except NotOneToOne as error:
            raise UserError(
                f"{flag}: {error}. They are converted as the model is loaded: name the base that a run of it has "
                "written, OUTPUT_DIR/base"
            ) from error
        return cls.of(model, base, keys, patterns)

    def sides(self, scores: Mapping[str, float], config: MoRAConfig, budget: str) -> dict[str, int]:
        """Spend the budget by these scores. Raises `UserError` for a budget that the layers cannot take."""
        candidates = [
            Candidate(
                name,
                weight.d_in,
                weight.d_out,
                config.largest_size(weight.d_in, weight.d_out),
                scores[name],
            )
            for name, weight in self.weights.items()
        ]
        return spend(
            candidates,
            parse_budget(budget, self.parameters),
            config.step,
            config.r_hat_multiple,
        )

    def check_budget(self, config: MoRAConfig, budget: str) -> None:
        """Raise `UserError` for a budget that the layers cannot take, before scores are known."""
        self.sides(dict.fromkeys(self.weights, 1.0), config, budget)

    def plan(
        self,
        scores: Mapping[str, float],
        scored_by: str,
        config: MoRAConfig,
        budget: str,
    ) -> TargetPlan:
        """The plan by the scores of weights or of a probe."""
        origin = f"by {scored_by}, for {config.operator_name}, within a budget of {budget}"
        sides = self.sides(scores, config, budget)
        return TargetPlan(self.base.folder.name, self.base.fingerprint(), sides, origin)

    def plan_of_weights(self, config: MoRAConfig, budget: str) -> TargetPlan:
        """The plan by the scores that `analyse` gives the weights, which takes long."""
        self.check_budget(config, budget)
        scores = {measures.module: measures.score for measures in analyse(self.base, self.weights)}
        return self.plan(scores, "weights", config, budget)


# -- a run -------------------------------------------------------------------------------------------------------------


def plan_of_run(
    file_plan: TargetPlan | None,
    budget: str | None,
    patterns: Iterable[str],
    config: MoRAConfig,
    loaded: LoadedBase,
    folder: Path,
    checkpoint: Path | None,
) -> TargetPlan:
    """The plan that holds in a run with `research.targets`; it is in the run's `folder` afterwards.

    `file_plan`: of the file that the setting names; None for auto, where the weights decide within the `budget`, or in
    a resumed run the plan with which it began. `patterns`: --target_modules. Raises `UserError` for a plan of another
    model, a budget that cannot be met, and a resumed run whose plan is not its checkpoint's.
    """
    copy_in_folder = folder / TARGETS_FILE
    if file_plan is not None:
        plan = file_plan
        fingerprint = loaded.base.fingerprint()
        if plan.fingerprint != fingerprint:
            raise UserError(
                f"{_TARGETS}: the plan is for {shown(plan.model)} with the fingerprint {shown(plan.fingerprint)}; "
                f"{loaded.base.folder} has {fingerprint}: make one for it (mora-ds analyze --write)"
            )
    elif checkpoint is None:
        logger.info(f"{_TARGETS} auto: reading the base's weights, layer by layer")
        opened = OpenModel.of(loaded.model, loaded.base, loaded.keys, patterns)
        plan = opened.plan_of_weights(config, str(budget))
    elif copy_in_folder.is_file():
        plan = read_plan(copy_in_folder)
    else:
        plan = TargetPlan(
            loaded.base.folder.name,
            loaded.base.fingerprint(),
            _sides_in(checkpoint),
        )
    if checkpoint is not None:
        _check_same_sides(plan, checkpoint)
    if checkpoint is None or not copy_in_folder.is_file():
        plan.write(copy_in_folder)
    return plan


def _sides_in(checkpoint: Path) -> dict[str, int]:
    """Layer -> side of its matrix. Raises `UserError` for a run that had no plan."""
    sides = (TrainerState.read(checkpoint).identity.get("adapter") or {}).get("layer_sizes")
    if not sides:
        raise UserError(f"{checkpoint} has no plan of MoRA matrices: drop {_TARGETS}, as at its start")
    return dict(sides)


def _check_same_sides(plan: TargetPlan, checkpoint: Path) -> None:
    saved = _sides_in(checkpoint)
    for name in sorted({*saved, *plan.sides}):
        before = saved.get(name, 0)
        now = plan.sides.get(name, 0)
        if now != before:
            raise UserError(
                f"{_TARGETS}: {checkpoint} was trained by another plan:\n"
                f"  {name}: side {before} there, {now} in the plan"
            )
