"""The steps at which a Trainer merges, and the re-warmup of its learning rate."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from mora_ds.common.errors import UserError, whole_number
from mora_ds.config.lr_schedule import Schedule, ScheduleKind, rewarmed

if TYPE_CHECKING:
    from mora_ds.hf.trainer import MoRATrainer


class MoRACallback(TrainerCallback):
    """ReMoRA: a merge every `merge_every` optimizer steps, before that step's
    evaluation and checkpoint.

    The learning rate is that of `lr_scheduler_type`; after a merge a re-warmup of
    `restart_warmup_steps` raises it to that curve again (`config.lr_schedule`). There is
    no merge in a warm-up, or so late that its re-warmup would not finish. Every merge
    is logged as `merge_*`. Only for trainers derived from `MoRATrainer`. Raises
    `UserError` for contradicting numbers when the length of the run is known.
    """

    def __init__(self, merge_every: int = 0, restart_warmup_steps: int = 10) -> None:
        self.merge_every = whole_number(merge_every, 0, "MoRACallback: `merge_every`")
        self.restart_warmup_steps = restart_warmup_steps
        self.trainer: MoRATrainer | None = None
        """Set by the trainer, before its first step."""

    def plan(self, args: TrainingArguments, total_steps: int) -> None:
        """Compute the steps of merges in a run of `total_steps`."""
        self.schedule = Schedule(
            kind=ScheduleKind.CONSTANT,
            peak=args.learning_rate,
            total_steps=total_steps,
            warmup_steps=args.get_warmup_steps(total_steps),
            merge_every=self.merge_every,
            restart_warmup_steps=self.restart_warmup_steps,
        )

    def rewarmed(self, curve: Callable[[int], float]) -> Callable[[int], float]:
        """`curve` (0-based optimizer step -> factor of the learning rate) with a
        re-warmup after every merge so far."""

        def factor(step: int) -> float:
            run = None if self.trainer is None else self.trainer.run
            merges = [] if run is None else run.state.merges
            return rewarmed(curve, step, merges, self.restart_warmup_steps)

        return factor

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.trainer is None:
            raise UserError(
                "MoRACallback is for a trainer with MoRATrainer: class Trainer(MoRATrainer, ...)"
            )
        if self.schedule.merges_after(state.global_step):
            self.trainer.merge()
