"""Tasks of the lm-eval harness during a run: shared by all ranks, the results of the
exported model on one process.
"""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mora_ds.common.files import read_json
from mora_ds.train.replica import Replica
from mora_ds.train.tasks import TaskSuite, check_tasks, results_of, task_names
from tests.helpers.engines import ROWS, ds_config
from tests.helpers.errors import user_error
from tests.helpers.gloo import run_alone, run_ranks
from tests.helpers.jobs import research, rows, run
from tests.helpers.mixtures import mixture_flags, write_mixture
from tests.helpers.models import adapted_model
from tests.helpers.tables import parsed
from tests.helpers.tasks import task_files

RESULTS = """
results:
  a: {alias: a, "acc,none": 0.25, "acc_stderr,none": 0.1, "other,none": 3.0, sample_len: 4}
  b: {"word_perplexity,none": 7.0}
  c: {"error,none": 0.5}
  d: {"acc,none": 0.0}
higher_is_better: {a: {acc: true}, c: {error: false}}
"""


def test_results_become_costs():
    task_results = results_of(parsed(RESULTS), "abcd")
    costs = [task_results[name].cost for name in "abcd"]
    assert costs == [4.0, 7.0, 0.5, 1000.0]
    assert task_results["a"].metrics == {"acc": 0.25, "other": 3.0}
    with user_error("no metric"):
        results_of({"results": {"e": {"alias": "e"}}}, "e")


def test_a_file_is_known_by_the_task_in_it(tmp_path):
    files = task_files(tmp_path)
    assert task_names(["hellaswag", str(files["choices"])]) == ["hellaswag", "choices"]
    (tmp_path / "empty.yaml").write_text("a: 1\n")
    with user_error(r"--eval_tasks .*empty.yaml: the file names no task"):
        task_names([str(tmp_path / "empty.yaml")])


@pytest.mark.heavy
def test_a_task_that_is_missing_is_named(tmp_path):
    with user_error(r"--eval_tasks no_such_task: cannot be loaded: .*no_such_task"):
        check_tasks(["no_such_task"])
    broken = task_files(tmp_path)["choices"]
    (tmp_path / "rows.json").unlink()
    with user_error("cannot be loaded"):
        check_tasks([str(broken)])


@pytest.mark.heavy
@pytest.mark.parametrize("domains", [False, True])
def test_a_run_evaluates_what_its_export_scores(user, tmp_path, out, domains):
    """With domains the shared matrices' model is evaluated, whatever the rows of the
    training batch before were."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = task_files(tmp_path)
    flags = (
        "--eval_steps 2 --eval_tasks_steps 4 --best_by rolling:1 --stop_when_forgotten rolling:50",
        "--merge_every 3 --restart_warmup_steps 1 --export_merged --per_device_eval_batch_size 2",
        "--trust_remote_code --eval_tasks",
        *files.values(),
    )
    argv = user.flags(out, *flags)
    exported = out / "merged"
    if domains:
        mix = write_mixture(user, tmp_path / "mix.yaml")
        argv = research(
            mixture_flags(user, out, mix, *flags), tmp_path, domain_adapters=True
        )
        exported = exported / "shared"
    run(2, argv)
    scores = {row["step"]: row["tasks"] for row in rows(out) if "tasks" in row}
    assert list(scores) == [0, 4, 6]
    state = read_json(out / "checkpoints/latest/trainer_state.json")
    assert state["best_step"] in (4, 6)
    assert state["task_costs_last"].keys() == files.keys()
    model = AutoModelForCausalLM.from_pretrained(exported)
    wrapped = HFLM(
        pretrained=model,
        tokenizer=AutoTokenizer.from_pretrained(exported),
        batch_size=2,
    )
    manager = TaskManager(include_path=[str(tmp_path)])
    expected = lm_eval.simple_evaluate(
        model=wrapped, tasks=list(files), task_manager=manager, bootstrap_iters=0
    )
    for name, metrics in scores[6].items():
        assert metrics
        for metric, score in metrics.items():
            wanted = expected["results"][name][f"{metric},none"]
            assert score == pytest.approx(wanted, rel=1e-4)
    assert scores[0]["rolling"] != scores[6]["rolling"]


def random_states_around_tasks(files, folder):
    """Whether an evaluation leaves random states as they are; and its results, on an engine
    of ZeRO-3.
    """
    import mora_ds
    from mora_ds.data import load_tokenizer

    model = adapted_model(model={"vocab_size": 400})
    engine, *_ = mora_ds.initialize(
        model=model, config=ds_config(3, ROWS // dist.get_world_size(), 1)
    )
    suite = TaskSuite(
        files, Replica(engine), load_tokenizer(Path(folder)), batch_size=2
    )
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    results = suite.evaluate()
    same = (
        torch.equal(states[0], torch.get_rng_state()) and random.getstate() == states[2]
    )
    return same and bool((np.random.get_state()[1] == states[1]).all()), {
        k: vars(v) for k, v in results.items()
    }


@pytest.mark.heavy
def test_three_ranks_score_as_one_and_leave_random_states(user, tmp_path):
    files = [str(path) for path in task_files(tmp_path).values()]
    is_kept, alone = run_alone(random_states_around_tasks, files, str(user.model))
    assert is_kept
    assert len(alone) == 3
    for also_kept, results in run_ranks(
        3, random_states_around_tasks, files, str(user.model)
    ):
        assert also_kept
        for name, result in results.items():
            assert result["metrics"] == pytest.approx(alone[name]["metrics"], rel=1e-5)
