"""lm-eval tasks on the model during a run; the requests are split over all ranks.

Every rank runs the harness on a part of each task's requests, then all ranks gather all
answers. Ranks need different numbers of forward passes, but under ZeRO-3 each pass is
collective, because it gathers MoRA matrices. So before each pass the ranks check whether
any of them has work; a rank without work runs one token until no rank has any.

    rank 0    pass    pass    pass    done
    rank 1    pass    one token       done
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mora_ds.common.errors import UserError, reason
from mora_ds.common.files import load_yaml
from mora_ds.common.untrusted import expanded
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.non_fatal import eval_mode
from mora_ds.train.replica import Replica

logger = logging.getLogger(__name__)

FLAG = "--eval_tasks"
PREFERRED = ("acc_norm", "acc", "exact_match", "f1", "word_perplexity", "perplexity")
"""The main metric of a task is the first of these that it has, or else its first
metric."""
MIN_SCORE = 1e-3
"""Lower bound of a score before its reciprocal is taken."""


@dataclass(frozen=True)
class TaskResult:
    """One task's metrics after an evaluation."""

    metrics: dict[str, float]
    """Metric -> value, without standard errors."""
    cost: float
    """The main metric, or its reciprocal if higher is better: lower is better, as for
    perplexity."""


def check_tasks(names: Sequence[str]) -> None:
    """Load the tasks with their data, to fail early if something is missing. Raises
    `UserError`."""
    try:
        _loaded(names)
    except ImportError as error:
        raise UserError(
            f"{FLAG} needs the package lm-eval: pip install 'mora_ds[tasks]' ({error})"
        ) from error


def task_names(names: Sequence[str]) -> list[str]:
    """The names of the tasks in results; for a file, the value of its key "task".
    Raises `UserError`."""
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
    """Whether a value of --eval_tasks is a task's file, not its name."""
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
    # Loading a task's data can raise any error.
    except Exception as error:
        raise UserError(
            f"{FLAG} {' '.join(names)}: cannot be loaded: {reason(error)}"
        ) from error
    return manager


class TaskSuite:
    """The tasks of a run on its engine. Construction and calls are collective."""

    def __init__(
        self, names: Sequence[str], replica: Replica, tokenizer: Any, batch_size: int
    ) -> None:
        """`batch_size`: sequences of a forward pass."""
        self.names = task_names(names)
        self._manager = _loaded(names)
        self._replica = replica
        self._tokenizer = tokenizer
        self._batch_size = batch_size

    def evaluate(self) -> dict[str, TaskResult]:
        """Task (or group) -> its result, the same on all ranks. Collective. Keeps all
        random states."""
        import lm_eval

        engine = self._replica.engine
        module = getattr(engine, "module", engine)
        lockstep = _Lockstep(module, self._replica)
        with _kept_random_states(), eval_mode(engine, unsplit=True), lockstep:
            results = lm_eval.simple_evaluate(
                model=self._model(module, lockstep),
                tasks=list(self.names),
                task_manager=self._manager,
                log_samples=False,
                bootstrap_iters=0,
            )

        def facts() -> dict[str, Any]:
            by_task = results_of(results, self.names)
            return {name: asdict(result) for name, result in by_task.items()}

        gathered = Ranks.current().run_on_rank0("results of tasks", facts)
        return {name: TaskResult(**of_task) for name, of_task in gathered.items()}

    def _model(self, module: nn.Module, lockstep: _Lockstep) -> Any:
        """The model, wrapped for the harness."""
        from lm_eval.models.huggingface import HFLM

        replica = self._replica

        class DistributedLM(HFLM):
            """Answers this replica's part of the requests and gathers the others."""

            def loglikelihood(self, requests: Any, **_: Any) -> Any:
                return self._distributed(super().loglikelihood, requests)

            def loglikelihood_rolling(self, requests: Any, **_: Any) -> Any:
                return self._distributed(super().loglikelihood_rolling, requests)

            def generate_until(self, requests: Any, **_: Any) -> Any:
                return self._distributed(super().generate_until, requests)

            def _distributed(
                self, answer: Callable[..., list[Any]], requests: list[Any]
            ) -> list[Any]:
                own = requests[replica.index :: replica.count]
                answers = answer(own, disable_tqdm=True) if own else []
                lockstep.wait_for_all()
                by_rank = Ranks.current().gather("answers to tasks", answers)
                # All ranks of a replica have the same answers.
                by_replica = by_rank[:: replica.ranks_per_replica]
                joined: list[Any] = [None] * len(requests)
                for index, answers_of_replica in enumerate(by_replica):
                    joined[index :: replica.count] = answers_of_replica
                return joined

        # The harness would tie the weights again (lm_eval/models/huggingface.py), which
        # may be sharded here.
        vars(module)["tie_weights"] = lambda *args, **kwargs: None
        tokenizer = self._tokenizer
        try:
            return DistributedLM(
                pretrained=module, tokenizer=tokenizer, batch_size=self._batch_size
            )
        finally:
            del vars(module)["tie_weights"]


def results_of(results: Any, names: Sequence[str]) -> dict[str, TaskResult]:
    """Results by task. The harness's keys are "<metric>,<filter of answers>", such as
    "acc,none"."""
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
            cost = 1 / max(cost, MIN_SCORE)
        task_results[name] = TaskResult(values, cost)
    return task_results


@dataclass
class _Lockstep:
    """A context in which all ranks run the same number of forward passes."""

    module: nn.Module
    replica: Replica
    is_idle: bool = False

    def __enter__(self) -> _Lockstep:
        # The first hook, because DeepSpeed's hooks may gather.
        self._hook = self.module.register_forward_pre_hook(
            self._before_pass, prepend=True
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _before_pass(self, module: nn.Module, args: Any) -> None:
        if not self.is_idle:
            self._any_rank_works(True)

    def _any_rank_works(self, works: bool) -> bool:
        return self.replica.sum(works) > 0

    def wait_for_all(self) -> None:
        """Run passes of one token until every rank has called this."""
        self.is_idle = True
        device = self.replica.engine.device
        one_token = torch.zeros(1, 1, dtype=torch.long, device=device)
        try:
            while self._any_rank_works(False):
                self.module(input_ids=one_token, use_cache=False)
        finally:
            self.is_idle = False


@contextlib.contextmanager
def _kept_random_states() -> Iterator[None]:
    """A context that restores random states: the harness seeds Python, numpy and torch,
    which must not change the run's dropout."""
    python = random.getstate()
    numbers = np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
