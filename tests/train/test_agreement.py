"""All ranks begin together, or none does: settings that differ, and a failure of one rank
at each check of a start.
"""

import os
import shutil
import time
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from mora_ds.common.errors import UserError
from mora_ds.config.arguments import parse
from mora_ds.models.base import BaseCheckpoint
from mora_ds.research.targets import TargetPlan
from mora_ds.runtime.ranks import Ranks
from mora_ds.train import pretrain, setup
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import refused, research, run
from tests.helpers.mixtures import mixture_flags, write_mixture
from tests.helpers.tables import rows

SECONDS = 20.0
"""Within this time every rank must have refused a run whose ranks differ."""

MERGES = ("--merge_every", 2, "--restart_warmup_steps", 1)

DIFFERENT = """
--seed 7 | --seed: 42 on rank 0; 7 on rank 1
--learning_rate 0.5 | --learning_rate: 0.01 on rank 0; 0.5 on rank 1
--merge_every 3 | --merge_every: 2 on rank 0; 3 on rank 1
--max_steps 8 | --max_steps: 6 on rank 0; 8 on rank 1
--operator share | --operator | "share" on rank 1
--gradient_accumulation_steps 2 | --gradient_accumulation_steps: 1 on rank 0; 2 on rank 1
--mora_rank 0 | rank 1: --mora_rank must be at least 1
--deepspeed /nowhere.json | rank 1: | the DeepSpeed file /nowhere.json
--train_files /nowhere.txt | rank 1: | /nowhere.txt
--model_name_or_path /nowhere | rank 1: | --model_name_or_path /nowhere
"""
"""What rank 1 is given in addition, and what is in the message that both ranks end with."""


def refused_each(cases):
    """(kind of error, message, seconds) of each case, whose list has the arguments of every
    rank.
    """
    results = []
    for argv in cases:
        since = time.monotonic()
        kind, message = _refused_in_start_up(argv[dist.get_rank()])
        results.append((kind, message, time.monotonic() - since))
    return results


def _refused_in_start_up(argv):
    try:
        with setup.start_up():  # as launch/pretrain.py reads its command line
            parse(argv)
    except UserError as error:
        return "UserError", str(error)
    return refused(argv)


def test_ranks_with_different_settings(user, out):
    cases = [
        [user.flags(out, *MERGES), user.flags(out, *MERGES, *more.split())]
        for more, *_ in rows(DIFFERENT)
    ]
    results = run_ranks(2, refused_each, cases)
    for (more, *phrases), *ranks in zip(rows(DIFFERENT), *results, strict=True):
        for kind, message, seconds in ranks:
            assert kind == "UserError", (more, message)
            assert all(phrase in message for phrase in phrases), (more, message)
            assert seconds < SECONDS, more
    assert not out.exists(), "nothing was written"


def other_version(argv):
    if dist.get_rank() == 1:
        setup.version = lambda name: "0.0.1" if name == "safetensors" else "1"
    return refused(argv)


def test_ranks_with_different_packages(user, tmp_path):
    for kind, message in run_ranks(2, other_version, user.flags(tmp_path / "out")):
        assert kind == "UserError"
        assert "version of safetensors: " in message
        assert '"0.0.1" on rank 1' in message


def refused_in(folders, argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folders[dist.get_rank()])
        return refused(argv)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_relative_model_folder_that_one_node_does_not_have(user, tmp_path, missing):
    """There the name is taken for one of the Hub's."""
    folders = [str(user.root), str(user.root)]
    folders[missing] = str(tmp_path)
    argv = user.flags(tmp_path / "out", "--model_name_or_path model")
    for kind, message in run_ranks(2, refused_in, folders, argv, timeout_s=60):
        assert kind == "UserError"
        assert "--model_name_or_path is" in message
        assert f'Hub" on rank {missing}' in message
        assert f'"a folder" on rank {1 - missing}' in message


def refused_on_its_node(argv):
    """Every rank is the first one of a node, which tokenises for itself."""
    os.environ["LOCAL_RANK"] = "0"
    return refused(argv[dist.get_rank()])


def test_texts_that_differ_under_one_name(user, tmp_path, out):
    changed_text = tmp_path / "train.jsonl"
    changed_text.write_text(user.train.read_text().replace("def", "fed"))
    argv = [
        user.flags(out),
        user.flags(out, "--train_files", changed_text, "--cache_dir", tmp_path / "cache"),
    ]
    for kind, message in run_ranks(2, refused_on_its_node, argv):
        assert kind == "UserError"
        assert "training text" in message
        assert "on rank 1" in message


# -- a failure at each check -------------------------------------------------------------------------------------------


@contextmanager
def before_meetings(act):
    """`act(number, check)` is called whenever this rank is about to meet the others."""
    original = Ranks._meet
    numbers = iter(range(10_000))

    def watched(self, check, *more, **named):
        if check is not None:
            act(next(numbers), check)
        return original(self, check, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "_meet", watched)
        yield


class Begun(Exception):
    """The first step would be trained now."""


def checks_of(argv):
    """The checks of a start, in order; nothing is trained."""
    names = []

    def begin(*_):
        raise Begun

    with (
        before_meetings(lambda number, check: names.append(str(check))),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(pretrain, "_run", begin)
        with pytest.raises(Begun):
            pretrain.pretrain(parse(argv))
    return names


def walk(argv, numbers, failing):
    """The errors of this rank where rank `failing` fails before the check of each
    number.
    """

    def act_at(wanted):
        def act(number, check):
            if dist.get_rank() == failing and number == wanted:
                raise UserError(f"injected before {number}")

        return act

    results = []
    for wanted in numbers:
        with before_meetings(act_at(wanted)):
            results.append(refused(argv))
    return results


def assert_all_fail(world, argv, numbers, failing):
    results = run_ranks(world, walk, argv, numbers, failing, timeout_s=900)
    where = "" if failing == 0 else f"rank {failing}: "
    for result in results:
        assert result == [
            ("UserError", f"{where}injected before {number}") for number in numbers
        ]


def assert_all_fail_at_each(world, argv, healthy, failing):
    """At each check that the same start, in the folder `healthy`, comes to."""
    names = run_ranks(world, checks_of, [*argv, "--output_dir", str(healthy)])[0]
    assert len(names) >= 20
    assert_all_fail(world, argv, list(range(len(names))), failing)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_at_some_checks(user, tmp_path, failing):
    argv = user.flags(tmp_path / "out", *MERGES)
    names = (
        run_ranks(2, checks_of, user.flags(tmp_path / "healthy", *MERGES))[0]
        if failing
        else [""] * 20
    )
    assert len(names) >= 20
    assert_all_fail(2, argv, [0, 2, 6, 12, len(names) - 1 if failing else 16], failing)
    assert not (tmp_path / "out").exists(), "the folder is as it was"


AT_EACH = pytest.mark.parametrize("world, failing", [(2, 0), (2, 1), (3, 0), (3, 2)])


@pytest.mark.heavy
@AT_EACH
def test_a_failure_at_each_check(user, tmp_path, world, failing):
    plan = tmp_path / "targets.yaml"
    TargetPlan(
        BaseCheckpoint.open(user.model).fingerprint(), {"model.layers.0.mlp.up_proj": 8}
    ).write(plan)
    argv = research(
        user.flags(tmp_path / "out", *MERGES), tmp_path, targets=plan, alignment_weight=0.1
    )
    assert_all_fail_at_each(world, argv, tmp_path / "healthy", failing)
    assert not (tmp_path / "out").exists()


@pytest.mark.heavy
@AT_EACH
def test_a_failure_at_each_check_of_a_resumed_run(user, tmp_path, world, failing):
    argv = user.flags(tmp_path / "out", *MERGES, "--resume_from_checkpoint auto")
    run(world, [*argv, "--max_steps", "3"])
    shutil.copytree(tmp_path / "out", tmp_path / "healthy", symlinks=True)
    assert_all_fail_at_each(world, argv, tmp_path / "healthy", failing)


@pytest.mark.heavy
@AT_EACH
def test_a_failure_at_each_check_of_a_mixture(user, tmp_path, world, failing):
    mix = write_mixture(
        user,
        tmp_path / "mix.yaml",
        "phases:\n  - {from_step: 3, weights: {new: 0.9, old: 0.1}}\n",
    )
    argv = mixture_flags(user, tmp_path / "out", mix, *MERGES)
    assert_all_fail_at_each(world, argv, tmp_path / "healthy", failing)
    assert not (tmp_path / "out").exists()
