"""Tasks of the lm-eval harness on the live model, during a run: all ranks share the
work.

Every rank runs the harness with a part of each task's requests, and all get all
answers. Ranks need unequal numbers of forward passes, but under ZeRO-3 each pass
gathers MoRA matrices from all ranks: before each one they agree whether any still has
work, and a rank without computes along with a row of one token, until none has.

    rank 0    pass    pass    pass    done
    rank 1    pass    one token       done
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mora_ds.common.errors import UserError, reason
from mora_ds.common.files import load_yaml
from mora_ds.common.untrusted import expanded
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.beside import beside_training
from mora_ds.train.loader import Replica

logger = logging.getLogger(__name__)

FLAG = "--eval_tasks"
PREFERRED = ("acc_norm", "acc", "exact_match", "f1", "word_perplexity", "perplexity")
"""The metric that stands for a task: the first of these that it has, else its first
one."""
SMALLEST = 1e-3
"""A score counts as at least this where its reciprocal is taken."""


@dataclass(frozen=True)
class TaskResult:
    """One task's metrics after an evaluation."""

    metrics: dict[str, float]
    """Metric -> value, without errors of estimation."""
    cost: float
    """The main metric, or its reciprocal where high is good: low is good, as of
    perplexity."""


def check_tasks(names: Sequence[str]) -> None:
    """Load the tasks, with their data, so that nothing is missing later. Raises
    `UserError`."""
    try:
        _loaded(names)
    except ImportError as error:
        raise UserError(
            f"{FLAG} needs the package lm-eval: pip install 'mora_ds[tasks]' ({error})"
        ) from error


def task_names(names: Sequence[str]) -> list[str]:
    """What the tasks are called in results: names as they are, files by their key
    "task". Raises `UserError`."""
    called = []
    for name in names:
        task = (
            load_yaml(name, f"{FLAG} {name}").get("task")
            if is_task_file(name)
            else name
        )
        if not isinstance(task, str):
            raise UserError(f"{FLAG} {name}: the file names no task (key: task)")
        called.append(task)
    return called


def is_task_file(name: str) -> bool:
    """Whether a value of --eval_tasks is a file of a task, not a name."""
    return name.endswith((".yaml", ".yml"))


def _loaded(names: Sequence[str]) -> Any:
    """The harness's manager of the tasks."""
    from lm_eval.tasks import TaskManager, get_task_dict

    files = [expanded(name, FLAG).resolve() for name in names if is_task_file(name)]
    folders = sorted({str(file.parent) for file in files})
    known = task_names(names)
    manager = TaskManager(include_path=folders or None)
    try:
        get_task_dict(known, manager)
    # Whatever a task's data leads to.
    except Exception as error:
        raise UserError(
            f"{FLAG} {' '.join(names)}: cannot be loaded: {reason(error)}"
        ) from error
    return manager


class TaskSuite:
    """The tasks of a run on its engine. All ranks make it, and call it, together."""

    def __init__(
        self, names: Sequence[str], replica: Replica, tokenizer: Any, batch_size: int
    ) -> None:
        """`batch_size`: rows of a pass."""
        self.names = task_names(names)
        self._manager = _loaded(names)
        self._replica = replica
        self._tokenizer = tokenizer
        self._batch_size = batch_size

    def evaluate(self) -> dict[str, TaskResult]:
        """Task (or group) -> its result, the same on all ranks. Collective. Random
        states stay as they are."""
        import lm_eval

        engine = self._replica.engine
        module = getattr(engine, "module", engine)
        in_step = _InStep(module, self._replica)
        with _same_random_states(), beside_training(engine, whole=True), in_step:
            results = lm_eval.simple_evaluate(
                model=self._model(module, in_step),
                tasks=list(self.names),
                task_manager=self._manager,
                log_samples=False,
                bootstrap_iters=0,
            )
        ranks = Ranks.current()
        return ranks.on_first(
            "results of tasks", lambda: results_of(results, self.names)
        )

    def _model(self, module: nn.Module, in_step: _InStep) -> Any:
        """The live model as the harness sees it."""
        from lm_eval.models.huggingface import HFLM

        replica = self._replica

        class Shared(HFLM):
            """Answers this replica's part of the requests, and gets the other parts."""

            def loglikelihood(self, requests: Any, **_: Any) -> Any:
                return self._shared(super().loglikelihood, requests)

            def loglikelihood_rolling(self, requests: Any, **_: Any) -> Any:
                return self._shared(super().loglikelihood_rolling, requests)

            def generate_until(self, requests: Any, **_: Any) -> Any:
                return self._shared(super().generate_until, requests)

            def _shared(
                self, answer: Callable[..., list[Any]], requests: list[Any]
            ) -> list[Any]:
                share = requests[replica.index :: replica.count]
                answers = answer(share, disable_tqdm=True) if share else []
                in_step.wait_for_all()
                by_rank = Ranks.current().gather("answers to tasks", answers)
                # Ranks of one replica have the same answers.
                by_replica = by_rank[:: replica.processes_per_replica]
                joined: list[Any] = [None] * len(requests)
                for index, answers_of_replica in enumerate(by_replica):
                    joined[index :: replica.count] = answers_of_replica
                return joined

        # The harness ties a model's weights (lm_eval/models/huggingface.py). They are
        # tied already, and may be sharded by now.
        vars(module)["tie_weights"] = lambda *args, **kwargs: None
        tokenizer = self._tokenizer
        try:
            return Shared(
                pretrained=module, tokenizer=tokenizer, batch_size=self._batch_size
            )
        finally:
            del vars(module)["tie_weights"]


def results_of(results: Any, names: Sequence[str]) -> dict[str, TaskResult]:
    """The harness keys a metric as "acc,none": its name and the filter of answers."""
    task_results = {}
    for name in names:
        values = {
            key.partition(",")[0]: float(value)
            for key, value in results["results"][name].items()
            if isinstance(value, (int, float)) and "_stderr" not in key and "," in key
        }
        if not values:
            raise UserError(f"{FLAG} {name}: the task has no metric that is a number")
        known = [metric for metric in PREFERRED if metric in values]
        main = known[0] if known else next(iter(values))
        is_score = results.get("higher_is_better", {}).get(name, {}).get(main)
        if is_score is None:
            is_score = not main.endswith("perplexity")
        cost = values[main]
        if is_score:
            cost = 1 / max(cost, SMALLEST)
        task_results[name] = TaskResult(values, cost)
    return task_results


class _InStep:
    """While it is entered, a pass of the model begins on all ranks together, or on
    none."""

    def __init__(self, module: nn.Module, replica: Replica) -> None:
        self._module = module
        self._replica = replica
        self._is_idle = False

    def __enter__(self) -> _InStep:
        # First of the hooks: DeepSpeed's own may gather already.
        self._hook = self._module.register_forward_pre_hook(
            self._before_pass, prepend=True
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _before_pass(self, module: nn.Module, args: Any) -> None:
        if not self._is_idle:
            self._anyone_works(True)

    def _anyone_works(self, works: bool) -> bool:
        return self._replica.sum(works) > 0

    def wait_for_all(self) -> None:
        """Compute along until every rank has come here."""
        self._is_idle = True
        device = self._replica.engine.device
        one_token = torch.zeros(1, 1, dtype=torch.long, device=device)
        try:
            while self._anyone_works(False):
                self._module(input_ids=one_token, use_cache=False)
        finally:
            self._is_idle = False


@contextlib.contextmanager
def _same_random_states() -> Iterator[None]:
    """The harness seeds Python, numpy and torch; a run's dropout must not notice."""
    python = random.getstate()
    numbers = np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
