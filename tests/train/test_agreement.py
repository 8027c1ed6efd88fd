"""All ranks begin together, or none does: settings that differ, and a failure of one rank
at each check of a start.
"""

import os
import shutil
import time
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from mora_ds.commands.pretrain import train
from mora_ds.common.errors import UserError
from mora_ds.config.arguments import parse
from mora_ds.models.base import BaseCheckpoint
from mora_ds.research.targets import TargetPlan
from mora_ds.runtime.ranks import Ranks
from mora_ds.train import pretrain, setup
from mora_ds.train.start_up import start_up
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import refused, research, run
from tests.helpers.mixtures import mixture_flags, write_mixture
from tests.helpers.pairwise import pairwise
from tests.helpers.tables import rows

SECONDS = 20.0
"""Within this time every rank must have refused a run whose ranks differ."""

MERGES = "--merge_every 2 --restart_warmup_steps 1"

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
"""Additional flags of rank 1, and what is in the message that both ranks end with."""


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
        with start_up():  # as launch/pretrain.py reads its command line
            parse(argv)
    except UserError as error:
        return "UserError", str(error)
    return refused(argv)


def test_ranks_with_different_settings(user, out):
    cases = [
        [user.flags(out, MERGES), user.flags(out, MERGES, *more.split())]
        for more, *_ in rows(DIFFERENT)
    ]
    results = run_ranks(2, refused_each, cases)
    for (more, *phrases), *ranks in zip(rows(DIFFERENT), *results, strict=True):
        for kind, message, seconds in ranks:
            assert kind == "UserError", (more, message)
            assert all(phrase in message for phrase in phrases), (more, message)
            assert seconds < SECONDS, more
    assert not out.exists(), "nothing was written"


def messages_of(work, *arguments):
    """The messages of the `UserError`s with which two ranks end."""
    ends = run_ranks(2, work, *arguments, timeout_s=60)
    assert [kind for kind, _ in ends] == ["UserError"] * 2, ends
    return [message for _, message in ends]


def other_version(argv):
    if dist.get_rank() == 1:
        setup.version = lambda name: "0.0.1" if name == "safetensors" else "1"
    return refused(argv)


def test_ranks_with_different_packages(user, out):
    for message in messages_of(other_version, user.flags(out)):
        assert "version of safetensors: " in message
        assert '"0.0.1" on rank 1' in message


def other_sources(argv, folder):
    if dist.get_rank() == 1:
        setup.PACKAGE = folder
    return refused(argv)


def test_nodes_with_other_sources_of_one_version(user, tmp_path, out):
    """Another state of a checkout trains until the first save otherwise."""
    copy = tmp_path / "mora_ds"
    shutil.copytree(setup.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    same = run_ranks(2, digest_of, copy)
    assert same[0] == same[1]
    with (copy / "models/loss.py").open("a") as file:
        file.write("# another line\n")
    for message in messages_of(other_sources, user.flags(out), copy):
        assert "give every rank the same\n  sources of mora_ds (digest): " in message
        assert message.endswith("on rank 1")


def digest_of(folder):
    if dist.get_rank() == 1:
        setup.PACKAGE = folder
    return setup._sources_digest()


def refused_in(folders, argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folders[dist.get_rank()])
        return refused(argv)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_relative_model_folder_that_one_node_does_not_have(
    user, tmp_path, out, missing
):
    """There the name is taken for one of the Hub's."""
    folders = [str(user.root), str(user.root)]
    folders[missing] = str(tmp_path)
    argv = user.flags(out, "--model_name_or_path model")
    for message in messages_of(refused_in, folders, argv):
        assert "--model_name_or_path is" in message
        assert f'Hub" on rank {missing}' in message
        assert f'"a folder" on rank {1 - missing}' in message


def refused_on_its_node(argv):
    """Every rank is the first one of a node, which tokenizes for itself."""
    os.environ["LOCAL_RANK"] = "0"
    return refused(argv[dist.get_rank()])


def test_texts_that_differ_under_one_name(user, tmp_path, out):
    changed_text = tmp_path / "train.jsonl"
    changed_text.write_text(user.train.read_text().replace("def", "fed"))
    argv = [
        user.flags(out),
        user.flags(
            out, "--train_files", changed_text, "--cache_dir", tmp_path / "cache"
        ),
    ]
    for message in messages_of(refused_on_its_node, argv):
        assert "training text" in message
        assert "on rank 1" in message


# -- a failure at each check -----------------------------------------------------------


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
            train(parse(argv))
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


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_at_some_checks(user, out, failing):
    assert_all_fail(2, user.flags(out, MERGES), [0, 2, 6, 12, 16], failing)
    assert not out.exists(), "the folder is as it was"


def planned_start(user, out, folder, world):
    """A run with a plan of targets."""
    plan = folder / "targets.yaml"
    fingerprint = BaseCheckpoint.open(user.model).fingerprint()
    TargetPlan(fingerprint, {"model.layers.0.mlp.up_proj": 8}).write(plan)
    return research(user.flags(out, MERGES), folder, targets=plan)


def resumed_start(user, out, folder, world):
    """A run that goes on, in its folder and in a copy of it."""
    argv = user.flags(out, MERGES, "--resume_from_checkpoint auto")
    run(world, [*argv, "--max_steps", "3"])
    shutil.copytree(out, folder / "healthy", symlinks=True)
    return argv


def mixed_start(user, out, folder, world):
    phases = "phases:\n  - {from_step: 3, weights: {new: 0.9, old: 0.1}}\n"
    mix = write_mixture(user, folder / "mix.yaml", phases)
    return mixture_flags(user, out, mix, MERGES)


@pytest.mark.heavy
@pairwise(
    {
        "start": [planned_start, resumed_start, mixed_start],
        "world": [2, 3],
        "last": [False, True],
    }
)
def test_a_failure_at_each_check(user, tmp_path, out, start, world, last):
    """Of the first rank or of the last one."""
    failing = world - 1 if last else 0
    argv = start(user, out, tmp_path, world)
    healthy = [*argv, "--output_dir", str(tmp_path / "healthy")]
    *checks, beginning = run_ranks(world, checks_of, healthy)[0]
    assert len(checks) >= 20
    # From there on the folder is the run's
    assert beginning == "beginning of the run"
    assert_all_fail(world, argv, list(range(len(checks))), failing)
    assert out.exists() == (start is resumed_start), "the folder is as it was"
