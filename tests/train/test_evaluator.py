"""An evaluation: which batches of a set count, when tasks are due, what is logged and kept
of it.
"""

import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

from mora_ds.adapters.domains import Domains
from mora_ds.checkpoint.state import TrainerState
from mora_ds.common.errors import Stopped
from mora_ds.config.forgetting import Watch
from mora_ds.config.training import TrainingArguments
from mora_ds.data import IGNORED
from mora_ds.train.evaluator import Evaluator
from mora_ds.train.replica import NotFinite
from mora_ds.train.tasks import TaskResult
from tests.helpers.errors import run_error

BATCHES = 7


def batches_of(eval_batches, before_batch, limit, index=0, count=1):
    """The batches of a set that replica `index` of `count` evaluates."""
    evaluation = Evaluator.__new__(Evaluator)
    evaluation.training = TrainingArguments(
        output_dir="out", per_device_eval_batch_size=2, max_eval_batches=limit
    )
    evaluation.replica = SimpleNamespace(index=index, count=count)
    data = SimpleNamespace(eval_batches=eval_batches)
    return evaluation.counted_batches(data, before_batch)


def counted(index, replicas, limit):
    """For each batch that replica `index` evaluates: whether its tokens count."""

    def eval_batches(index, replicas, size):
        for _ in range(-(-BATCHES // replicas)):
            yield {"labels": torch.ones(size, 4, dtype=torch.long)}

    batches = batches_of(eval_batches, lambda: None, limit, index, replicas)
    return [bool((batch["labels"] != IGNORED).all()) for batch in batches]


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, None])
def test_the_limit_counts_batches_over_all_replicas(replicas, limit):
    """Every replica has equally many batches, and together exactly `limit` of them count,
    the first ones.
    """
    counts = [counted(index, replicas, limit) for index in range(replicas)]
    assert len({len(batches) for batches in counts}) == 1
    in_order = [count for round_ in zip(*counts, strict=True) for count in round_]
    expected = len(in_order) if limit is None else limit
    assert sum(in_order[:expected]) == sum(in_order) == expected


def test_each_batch_is_announced_before_its_forward_and_none_beyond_the_limit():
    """A run that is asked to stop leaves an evaluation at the next batch."""
    calls = []

    def batches(index, replicas, size):
        for number in range(4):
            calls.append(f"made {number}")
            yield {"labels": torch.ones(size, 2, dtype=torch.long)}

    for limit, computed, beyond in ((None, 4, []), (2, 2, ["made 2"])):
        calls.clear()
        expected = []
        for _ in batches_of(batches, lambda: calls.append("asked"), limit):
            calls.append("computed")
        for number in range(computed):
            expected += [f"made {number}", "asked", "computed"]
        assert calls == expected + beyond


class Log:
    """The rows that an evaluation logs, in order."""

    def __init__(self):
        self.rows = []

    def evaluation(self, step, perplexities, before):
        self.rows.append((step, dict(perplexities), dict(before)))

    def record(self, kind, step, facts):
        self.rows.append((step, facts))


class Model:
    """Stands for the replica, whose mean loss is `nll`, and for the tasks, whose score is
    `score`.
    """

    def __init__(self):
        self.nll = 1.0
        self.score = 0.5
        self.read_as = []

    def mean_nll(self, batches, domain):
        self.read_as.append(domain)
        return self.nll

    def evaluate(self):
        return {"quiz": TaskResult({"acc": self.score}, 1 / self.score)}


def evaluator(weights, bounds=None, tasks_steps=4):
    model = Model()
    training = TrainingArguments(output_dir="out", eval_tasks_steps=tasks_steps)
    held_set = SimpleNamespace(eval_batches=lambda *share: iter(()))
    job = SimpleNamespace(
        arguments=SimpleNamespace(training=training),
        data=SimpleNamespace(evaluation={"held": held_set}),
        state=TrainerState(total_steps=6),
        loaded=SimpleNamespace(model=nn.Module()),
    )
    log = Log()
    evaluation = Evaluator(job, model, log)
    evaluation.tasks = model
    evaluation.domains = Domains(["held"])
    evaluation.watch = Watch(bounds or {}, weights)
    return evaluation


def at(evaluator, step, nll, score=0.5):
    evaluator.state.step = step
    evaluator.replica.nll = nll
    evaluator.replica.score = score
    before = evaluator.evaluate()
    if step == 0:  # as `Trainer` keeps it
        evaluator.state.perplexity_before = before


def test_tasks_are_due_at_the_start_at_every_interval_and_at_the_end():
    for tasks_steps, steps in ((4, [0, 4, 6]), (0, [0, 6])):
        evaluation = evaluator({}, tasks_steps=tasks_steps)
        for step in range(7):
            at(evaluation, step, 1.0)
        assert [row[0] for row in evaluation.log.rows if "quiz" in row[1]] == steps
        assert evaluation.log.rows[-1] == (6, {"quiz": {"acc": 0.5}})


def test_logged_results_have_the_start_for_comparison_and_are_kept():
    evaluation = evaluator({})
    at(evaluation, 0, 1.0)
    evaluation.state.evaluation_pending = True
    at(evaluation, 2, 2.0)
    start = {"held": math.exp(1)}
    now = {"held": math.exp(2)}
    assert evaluation.log.rows == [
        (0, start, start),
        (0, {"quiz": {"acc": 0.5}}),
        (2, now, start),
    ]
    assert evaluation.state.perplexity_last == now
    assert not evaluation.state.evaluation_pending
    assert evaluation.replica.read_as == ["held", "held"]


def test_the_best_step_has_the_lowest_sum_and_is_never_the_start(caplog):
    caplog.set_level("INFO")
    evaluation = evaluator({"held": 1.0})
    best_steps = []
    for step, nll in enumerate((1.0, 3.0, 2.0, 2.0, 2.5)):
        at(evaluation, step, nll)
        best_steps.append(evaluation.state.best_step)
    assert best_steps == [0, 1, 2, 2, 2]
    assert evaluation.state.best_score == pytest.approx(2.0)
    assert "step 2: the best so far by --best_by, 2.0000" in caplog.text
    assert "step 3: the best" not in caplog.text


def test_the_score_of_a_task_counts_where_it_is_evaluated():
    evaluation = evaluator({"held": 1.0, "quiz": 2.0}, {"quiz": 1.5})
    at(evaluation, 0, 1.0)
    for step in (2, 4):
        at(evaluation, step, 1.0, score=0.4)
    assert evaluation.state.best_step == 4
    assert evaluation.state.best_score == pytest.approx(1 - 2 * math.log(0.4))
    assert evaluation.forgotten is None
    assert evaluation.state.task_costs_before == {"quiz": 2.0}
    at(evaluation, 6, 1.0, score=0.25)
    forgotten = "the value of quiz is 4.000, 2.000 of the 2.000 it was at the start"
    assert forgotten in evaluation.forgotten


def test_a_loss_that_is_no_number_is_named_with_its_set():
    evaluation = evaluator({})
    with pytest.raises(NotFinite, match="the loss on 'held' is nan after step 2"):
        at(evaluation, 2, math.nan)
    before = "the loss on 'held' is inf after step 0, before any training"
    with run_error(before):
        at(evaluation, 0, math.inf)


def test_a_run_that_leaves_before_its_tasks_has_logged_nothing_of_the_evaluation():
    """The resumed run repeats the evaluation, at the same step."""
    evaluation = evaluator({})

    evaluation.state.evaluation_pending = True
    evaluation.state.step = 4
    with pytest.raises(Stopped):
        evaluation.evaluate(before_batch=mock.Mock(side_effect=Stopped("stopped")))
    assert evaluation.log.rows == []
    assert evaluation.state.evaluation_pending
