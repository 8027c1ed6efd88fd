"""When each setting has an effect. One that has none is a mistake of the user's: it is
refused by its name.

The keys of a recipe are of two kinds. What the recipe itself makes idle is refused like
a flag; what only a flag on the command line makes idle (`RECIPE.yaml --adapter full`)
is left out of the run, which says so once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mora_ds.adapters.registry import ADAPTERS, Control
from mora_ds.common.errors import validation_errors_of

if TYPE_CHECKING:
    from mora_ds.config.arguments import Arguments


@dataclass(frozen=True)
class Effect:
    """What some settings are for."""

    purpose: str
    """Follows "is for" in the message; {adapters}: the names of all."""
    present: Callable[[Arguments], bool]
    """Whether a run has it."""
    settings: str
    """Names of the settings, separated by blanks."""


def _trains_others(arguments: Arguments) -> bool:
    """Whether parameters are trained that --embedding_learning_rate is for."""
    adapter = arguments.adapter
    has_domains = bool(arguments.research.get("domain_adapters"))
    return not adapter.is_control and (adapter.trains_others or has_domains)


EFFECTS = (
    Effect(
        "an adapter (--adapter {adapters})",
        lambda run: not run.adapter.is_control,
        "mora_rank target_modules mora_dropout base_bits base_device merge_every "
        "train_embeddings train_norms train_head train_new_embeddings train_embedding_rank",
    ),
    Effect(
        "a run that trains something (not --adapter none)",
        lambda run: run.adapter.adapter != Control.NONE,
        "export_merged profile push_to_hub resume_from_checkpoint decay_from",
    ),
    Effect(
        "merges (--merge_every)",
        lambda run: not run.adapter.is_control and run.adapter.merge_every > 0,
        "restart_warmup_steps",
    ),
    Effect(
        "parameters that are trained with an adapter (--train_embeddings and its like)",
        _trains_others,
        "embedding_learning_rate",
    ),
    Effect(
        "a model that is named (--model_name_or_path, --model_config)",
        lambda run: run.model.is_named,
        "rope_scaling",
    ),
    Effect(
        "runs without --max_steps",
        lambda run: run.training.max_steps == -1,
        "num_train_epochs",
    ),
    Effect(
        "evaluation sets (--eval_files, --held_out_share)",
        lambda run: bool(run.data.eval_files) or run.data.held_out_share > 0,
        "max_eval_batches",
    ),
    Effect(
        "--streaming",
        # The file of a mixture may have streams among its sources.
        lambda run: run.data.streaming or run.data.mixture is not None,
        "shuffle_buffer",
    ),
    Effect(
        "evaluations during the run (--eval_steps)",
        lambda run: run.training.eval_steps > 0,
        "stop_when_forgotten best_by",
    ),
    Effect(
        "--eval_tasks", lambda run: bool(run.training.eval_tasks), "eval_tasks_steps"
    ),
)


def unused_options(arguments: Arguments) -> dict[str, str]:
    """{setting: message} of those that differ from their defaults, and have no
    effect."""
    name = arguments.adapter.adapter
    unused_of_schedule = arguments.schedule.unused
    if name not in (*ADAPTERS, *Control) or validation_errors_of(unused_of_schedule):
        return {}  # `validate` reports the names
    changed = set()
    for group in (
        arguments.model,
        arguments.adapter,
        arguments.data,
        arguments.training,
        arguments.schedule,
    ):
        defaults = vars(type(group)())
        changed |= {
            name for name, value in vars(group).items() if value != defaults[name]
        }
    purposes = unused_of_schedule()
    for adapter in ADAPTERS.values():
        purpose = f"{adapter.title} (--adapter {adapter.name})"
        purposes |= dict.fromkeys(adapter.settings, purpose)
    for setting in ADAPTERS[name].settings if name in ADAPTERS else ():
        purposes.pop(setting)
    for effect in EFFECTS:
        if not effect.present(arguments):
            purpose = effect.purpose.format(adapters=", ".join(ADAPTERS))
            purposes |= dict.fromkeys(effect.settings.split(), purpose)
    return {
        setting: f"--{setting} is for {purpose}, and has no effect here: leave it out"
        for setting, purpose in purposes.items()
        if setting in changed
    }
