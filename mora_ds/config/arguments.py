"""All settings of a training run: five dataclasses, parsed strictly, written to
run.yaml.

    [recipe.yaml] --flags -> parse -> Arguments -> validate -> the groups of fields that each module needs
                                         \\-> dump -> run.yaml

Flag names are Hugging Face's where it has one. `dump` writes what `parse` reads: the
`run.yaml` of a run is a recipe.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mora_ds.common.files import packaged
from mora_ds.config.adapter import AdapterArguments
from mora_ds.config.data import DataArguments, ModelArguments
from mora_ds.config.effects import unused_options
from mora_ds.config.flags import Settings, parse_flat
from mora_ds.config.lr_schedule import Schedule, ScheduleArguments
from mora_ds.config.research import RESEARCH, ResearchSettings
from mora_ds.config.training import TrainingArguments


@dataclass(frozen=True)
class Arguments:
    """All settings of a run. Functions take the groups or fields that they need of
    it."""

    model: ModelArguments
    adapter: AdapterArguments
    data: DataArguments
    training: TrainingArguments
    schedule: ScheduleArguments
    research: Settings = field(default_factory=dict)
    """The settings of the recipe's block `research:`; nearly always there is none."""
    set_by_user: frozenset[str] = frozenset()
    """Names of the fields that flags or recipe set; all others have their defaults."""
    left_out: tuple[str, ...] = ()
    """Keys of the recipe that have defaults, as flags leave them no effect
    (`effects`)."""

    @property
    def is_demo(self) -> bool:
        """Whether neither a model nor training data is named: the run is the demo."""
        return not (self.model.model_name_or_path or self.data.names_text)

    def schedule_of(self, total_steps: int, decay_start: int | None = None) -> Schedule:
        """As `ScheduleArguments.of_run`, with the peak and the merges of this run."""
        return self.schedule.of_run(
            total_steps,
            self.training.peak_learning_rate,
            self.adapter.merge_every,
            self.adapter.restart_warmup_steps,
            decay_start,
        )


_GROUPS: dict[str, Any] = {
    "model": ModelArguments,
    "adapter": AdapterArguments,
    "data": DataArguments,
    "training": TrainingArguments,
    "schedule": ScheduleArguments,
}


_PACKAGED = ("deepspeed", "mixture", "model_config")
"""Settings whose file may be one of the package's own (`files.packaged`)."""


def parse(argv: Sequence[str]) -> Arguments:
    """Arguments from a command line (without the program's name): an optional YAML
    recipe first, then flags.

    Raises `UserError` for anything unknown or of a wrong type. `-h` prints help and
    raises SystemExit(0).
    """
    groups = list(_GROUPS.values())
    recipe, flags = parse_flat(groups, {RESEARCH: ResearchSettings}, argv)
    for settings in (recipe, flags):
        for name in _PACKAGED:
            if settings.get(name) is not None:
                settings[name] = packaged(settings[name])
    return with_flags(recipe, flags)


def with_flags(recipe: Settings, flags: Settings) -> Arguments:
    """Arguments from {field: value} of a recipe, and of flags, which win over it and
    may leave keys of it without effect."""
    # What the recipe itself leaves without effect, `validate` refuses.
    mistakes = unused_options(from_flat(recipe)).keys()
    idle = (
        unused_options(from_flat({**recipe, **flags})).keys() - mistakes - flags.keys()
    )
    effective = {name: value for name, value in recipe.items() if name not in idle}
    left_out = tuple(name for name in recipe if name in idle)
    return dataclasses.replace(from_flat({**effective, **flags}), left_out=left_out)


def from_flat(settings: Settings) -> Arguments:
    """Arguments from {field: value} of the right types; the other fields have
    defaults."""
    groups = {}
    for name, group in _GROUPS.items():
        names = settings.keys() & {entry.name for entry in dataclasses.fields(group)}
        groups[name] = group(**{key: settings[key] for key in names})
    return Arguments(
        **groups, research=settings.get(RESEARCH, {}), set_by_user=frozenset(settings)
    )


def dump(arguments: Arguments) -> Settings:
    """{field: value} in plain types for `run.yaml`: a recipe that repeats the
    run."""
    flat: Settings = {}
    for name in _GROUPS:
        flat |= dataclasses.asdict(getattr(arguments, name))
    if arguments.research:
        flat[RESEARCH] = arguments.research
    return flat
