"""Evaluation during a run: perplexity, tasks, the best checkpoint, and forgetting."""

import logging
import sys
from collections.abc import Callable, Iterator

from mora_ds.adapters.domains import domains_of
from mora_ds.config.forgetting import Watch
from mora_ds.config.mixture import HELD_OUT
from mora_ds.data import IGNORED, PackedDataset
from mora_ds.data.documents import Batch
from mora_ds.models.loss import perplexity
from mora_ds.train.metrics import MetricsLog
from mora_ds.train.replica import Replica, require_finite
from mora_ds.train.tasks import TaskSuite
from mora_ds.train.training_setup import TrainingSetup

logger = logging.getLogger(__name__)


class Evaluator:
    """Evaluates the model on all evaluation sets and stores the results in the run's
    state."""

    def __init__(self, setup: TrainingSetup, replica: Replica, log: MetricsLog) -> None:
        training = setup.arguments.training
        self.training = training
        self.replica = replica
        self.log = log
        self.sets = setup.data.evaluation
        self.state = setup.state
        self.domains = domains_of(setup.loaded.model)
        self.watch = Watch.of(training.stop_when_forgotten, training.best_by)
        self.tasks: TaskSuite | None = None
        if training.eval_tasks:
            tokenizer = setup.data.tokenizer
            batch_size = training.per_device_eval_batch_size
            self.tasks = TaskSuite(training.eval_tasks, replica, tokenizer, batch_size)

    def evaluate(
        self, before_batch: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Log and return the perplexity of each set over all ranks. Collective, and so
        is `before_batch`, which is called before every batch."""
        step = self.state.step
        perplexities = {}
        for name, data in self.sets.items():
            batches = self.counted_batches(data, before_batch)
            nll = self.replica.mean_nll(batches, self.domain_of(name))
            require_finite(
                nll, f"the loss on {name!r} is {nll} after step {step}", step
            )
            perplexities[name] = perplexity(nll)
        tasks = self.tasks if self._tasks_are_due else None
        if tasks is not None:
            # This may stop the run. When resumed, it evaluates again, so nothing may be
            # logged before.
            before_batch()
        if perplexities:
            # Later evaluations are compared with the first one, whose own change is 0.
            before = self.state.perplexity_before if step else perplexities
            self.log.evaluation(step, perplexities, before)
        costs = {} if tasks is None else self._evaluate_tasks(tasks)
        self.state.perplexity_last = perplexities
        self.state.evaluation_pending = False
        score = self.watch.score({**perplexities, **costs})
        best = self.state.best_score
        if score is not None and step > 0 and (best is None or score < best):
            self.state.best_step = step
            self.state.best_score = score
            logger.info(f"step {step}: the best so far by --best_by, {score:.4f}")
        return perplexities

    def domain_of(self, name: str) -> str | None:
        """The domain as which an evaluation set is read: that with its name, or that it
        was held out of; None: by the shared matrices."""
        candidates = (name, name.removeprefix(f"{HELD_OUT}_"))
        return next((name for name in candidates if name in self.domains.names), None)

    @property
    def forgotten(self) -> str | None:
        """The reason if --stop_when_forgotten ends the run after the last
        evaluation."""
        state = self.state
        before = {**state.perplexity_before, **state.task_costs_before}
        now = {**state.perplexity_last, **state.task_costs_last}
        return self.watch.forgotten(before, now)

    @property
    def _tasks_are_due(self) -> bool:
        """True at the start, every --eval_tasks_steps, and at the end."""
        step = self.state.step
        every = self.training.eval_tasks_steps
        return step in (0, self.state.total_steps) or (every > 0 and step % every == 0)

    def _evaluate_tasks(self, tasks: TaskSuite) -> dict[str, float]:
        """Return {task: cost} and store it in the run's state. Collective."""
        state = self.state
        results = tasks.evaluate()
        metrics = {name: result.metrics for name, result in results.items()}
        costs = {name: result.cost for name, result in results.items()}
        self.log.record("tasks", state.step, metrics)
        for name, values in metrics.items():
            cells = [f"{metric} {value:.4f}" for metric, value in values.items()]
            logger.info("  ".join([f"step {state.step}", name, *cells]))
        if state.step == 0:
            state.task_costs_before = costs
        state.task_costs_last = costs
        return costs

    def counted_batches(
        self, data: PackedDataset, before_batch: Callable[[], None]
    ) -> Iterator[Batch]:
        """The batches of this replica. Every rank gets the same number, as ZeRO-3
        requires."""
        index = self.replica.index
        count = self.replica.count
        limit = self.training.max_eval_batches or sys.maxsize
        batches = data.eval_batches(
            index, count, self.training.per_device_eval_batch_size
        )
        for round_, batch in enumerate(batches):
            if round_ * count >= limit:
                break
            before_batch()
            # The limit counts the batches of all replicas. In the last round, replicas
            # beyond it compute a batch without labels.
            if round_ * count + index >= limit:
                batch["labels"].fill_(IGNORED)
            yield batch
