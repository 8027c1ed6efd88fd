"""Checks of all settings that need no file's contents; every problem is reported at once.

    settings without effect     effects.py
    own values of a group       `problems()` of its class
    several groups at once      validate_adapter.py (adapter and run), validate_run.py (model, text and run)

Files, tokenizers and models are checked where they are read; DeepSpeed's JSON file by `engine/ds_config.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from mora_ds.common import research
from mora_ds.common.errors import refuse
from mora_ds.config.arguments import Arguments
from mora_ds.config.effects import idle_settings
from mora_ds.config.validate_adapter import adapter_problems
from mora_ds.config.validate_run import run_problems
from mora_ds.remora.schedule import conflicts

_UNKNOWN_LENGTH = 2**62
"""Stands for the number of steps of a run that depends on the data."""


def validate(arguments: Arguments) -> None:
    """Raises one `UserError` that lists everything wrong with `arguments`, one problem a line; where nothing is, the
    settings that have no effect."""
    model, adapter, data, training = arguments.model, arguments.adapter, arguments.data, arguments.training
    refuse(
        [
            *model.problems(),
            *data.problems(),
            *adapter.problems(),
            *training.problems(),
            *adapter_problems(adapter, training),
            *(research.load("settings").problems(arguments) if arguments.research else ()),
            *run_problems(model, data, training),
            *_schedule_problems(arguments),
        ]
    )
    refuse(idle_settings(arguments).values())


def _schedule_problems(arguments: Arguments) -> Iterator[str]:
    adapter, training = arguments.adapter, arguments.training
    steps = training.max_steps if training.max_steps > 0 else _UNKNOWN_LENGTH
    yield from conflicts(steps, training.first_warmup(steps), adapter.merge_every, adapter.restart_warmup_steps)
