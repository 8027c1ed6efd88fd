"""Evaluation during a run: the perplexity of every evaluation set, the best checkpoint, and forgetting."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from mora_ds.checkpoint.state import TrainerState
from mora_ds.config.forgetting import Watch
from mora_ds.data import IGNORED, PackedDataset
from mora_ds.models.loss import perplexity
from mora_ds.train.hooks import Hooks
from mora_ds.train.loader import Replica, require_finite
from mora_ds.train.metrics import MetricsLog
from mora_ds.train.tasks import TaskSuite

logger = logging.getLogger(__name__)


@dataclass
class Evaluator:
    """Evaluates the model of one engine on all evaluation sets, and keeps the results in the run's state."""

    replica: Replica
    sets: Mapping[str, PackedDataset]
    state: TrainerState
    log: MetricsLog
    batch_size: int
    """Sequences per replica and batch."""
    max_batches: int | None = None
    """Batches per evaluation set, over all replicas; None for all."""
    watch: Watch = field(default_factory=lambda: Watch({}, {}))
    """What --stop_when_forgotten and --best_by ask for."""
    hooks: Hooks = field(default_factory=Hooks)
    tasks: TaskSuite | None = None
    """The tasks of --eval_tasks."""
    tasks_steps: int = 0
    """Optimizer steps between evaluations of tasks; 0: at the start and at the end."""

    def evaluate(self, before_batch: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Log and return the perplexity of each set over all processes. Collective; `before_batch` is called too."""
        step = self.state.step
        perplexities = {}
        for name, data in self.sets.items():
            nll = self.replica.mean_nll(self._batches(data, before_batch), self.hooks.domain_of(name))
            require_finite(nll, f"the loss on {name!r} is {nll} after step {step}", step)
            perplexities[name] = perplexity(nll)
        tasks = self.tasks if self._tasks_are_due() else None
        if tasks is not None:
            before_batch()  # before anything is logged, as it may end the run, which then evaluates again
        if perplexities:
            # The first evaluation is what the others are compared with: its own change of 0 begins each curve.
            before = self.state.perplexity_before if step else perplexities
            self.log.evaluation(step, perplexities, before)
        costs = {} if tasks is None else self._evaluate_tasks(tasks)
        self.state.perplexity_last = perplexities
        self.state.evaluation_pending = False
        score = self.watch.score({**perplexities, **costs})
        if score is not None and step > 0 and (self.state.best_score is None or score < self.state.best_score):
            self.state.best_step = step
            self.state.best_score = score
            logger.info(f"step {step}: the best so far by --best_by, {score:.4f}")
        return perplexities

    @property
    def forgotten(self) -> str | None:
        """Why the run has to end after the last evaluation, by --stop_when_forgotten; None where it goes on."""
        state = self.state
        before = {**state.perplexity_before, **state.task_costs_before}
        now = {**state.perplexity_last, **state.task_costs_last}
        return self.watch.forgotten(before, now, state.task_costs_last)

    def _tasks_are_due(self) -> bool:
        state = self.state
        at_end = 0 < state.step == state.total_steps
        return state.step == 0 or at_end or (bool(self.tasks_steps) and state.step % self.tasks_steps == 0)

    def _evaluate_tasks(self, tasks: TaskSuite) -> dict[str, float]:
        """{task: cost}, also in the run's state. Collective."""
        state = self.state
        results = tasks.evaluate()
        costs = {name: result.cost for name, result in results.items()}
        self.log.tasks(state.step, {name: result.metrics for name, result in results.items()})
        if state.step == 0:
            state.task_costs_before = costs
        state.task_costs_last = costs
        return costs

    def _batches(self, data: PackedDataset, before_batch: Callable[[], None]) -> Iterator[dict[str, Tensor]]:
        """The batches of this replica; every process has equally many, as ZeRO-3 needs."""
        index = self.replica.index
        count = self.replica.count
        limit = self.max_batches or sys.maxsize
        for round_, batch in enumerate(data.eval_batches(index, count, self.batch_size)):
            if round_ * count >= limit:
                break
            before_batch()
            if round_ * count + index >= limit:  # the limit counts batches over all replicas
                batch["labels"].fill_(IGNORED)
            yield batch
