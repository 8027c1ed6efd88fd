"""The kill matrix: SIGKILL at every named moment, then the same command again ends as if
nothing had happened.

pytest tests/train/test_kill.py              every sixth moment once, on two ranks
pytest tests/train/test_kill.py -m heavy     every moment with each of: one rank or all, 2 and 3 ranks, fp32 and bf16
"""

import shutil

import pytest

from mora_ds.common.files import replace_symlink
from tests.helpers.jobs import run
from tests.helpers.kills import (
    MOMENTS,
    STEPS,
    Passes,
    RunStart,
    call_of,
    calls_named,
    killed_run,
)
from tests.helpers.outcome import assert_same_outcome
from tests.helpers.pairwise import pairwise_cases
from tests.helpers.stores import shown, stored
from tests.helpers.tables import heavy

PRECISIONS = {"fp32": "--bf16 false", "bf16": "--bf16 true"}
AUTO = "--resume_from_checkpoint auto"
OVERWRITE = "--overwrite_output_dir true"


def command(user, out, precision, *more):
    texts = ("--eval_files", f"short={user.other}")
    return user.flags(out, STEPS, *texts, PRECISIONS[precision], *more)


@pytest.fixture(scope="module")
def reference_of(user, tmp_path_factory):
    """(ranks, precision, more flags) -> the output folder of a run that nothing has
    disturbed.
    """
    done = {}

    def reference(ranks, precision, more):
        key = (ranks, precision, more)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("reference") / "out"
            run(ranks, command(user, done[key], precision, *more, AUTO))
        return done[key]

    return reference


def prepare(out, reference, start):
    if start in (RunStart.FINISHED, RunStart.UNNAMED):
        shutil.copytree(reference, out, symlinks=True)
    if start is RunStart.UNNAMED:
        (out / "summary.json").unlink()
        shutil.rmtree(out / "merged")
        replace_symlink(out / "checkpoints/latest", "step-000005")
    if out.exists():
        stored(out)
    if start is RunStart.ANOTHER:
        folders = (
            "checkpoints/step-000009/one",
            "ledger/two",
            "base/three",
            "merged/x",
        )
        for name in ("run.yaml", "metrics.jsonl", *folders):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("of another run")
        owns = [
            "run.yaml",
            "metrics.jsonl",
            *(name.partition("/")[0] for name in folders),
        ]
        # The mark of a run
        (out / "run.yaml").write_text(f"versions: {{}}\nresolved: {{owns: {owns}}}\n")


def kill_and_run_again(user, out, reference, moment, victims, ranks, precision):
    cache = out.parent / "cache"
    start = MOMENTS[moment].start
    prepare(out, reference, start)
    how = OVERWRITE if start is RunStart.ANOTHER else AUTO
    own_cache = (
        ("--cache_dir", cache) if moment.startswith(("tokens", "corpus")) else ()
    )
    again = command(user, out, precision, *MOMENTS[moment].more, how, *own_cache)
    killed_run(ranks, again, moment, victims)
    run(ranks, again)
    shown(out)
    assert_same_outcome(out, reference)
    names = {path.name for path in cache.rglob("*")}
    assert not [name for name in names if "partial" in name or name.startswith("tmp")]


def victims_of(moment, ranks):
    """{who is killed: its ranks}"""
    if MOMENTS[moment].passes is not Passes.ALL:
        return {"first": [0], "all": list(range(ranks))}
    return {"first": [0], "last": [ranks - 1], "all": list(range(ranks))}


def once(moments):
    """Every sixth moment, with one set of victims each."""
    for index, moment in enumerate(moments[::6]):
        groups = list(victims_of(moment, 2))
        yield moment, groups[index % len(groups)], 2, "fp32"


ONCE = list(once([name for name, facts in MOMENTS.items() if not facts.only_heavy]))
"""All others are heavy."""


EVERY = [
    tuple(case.values())
    for case in pairwise_cases(
        {
            "moment": list(MOMENTS),
            "who": ["first", "last", "all"],
            "ranks": [2, 3],
            "precision": list(PRECISIONS),
        },
        lambda moment, who, ranks, precision: who in victims_of(moment, ranks),
    )
]
HEAVY = [
    pytest.param(*case, marks=pytest.mark.heavy(seconds=4))
    for case in EVERY
    if case not in ONCE
]


@pytest.mark.parametrize("call", sorted(set(calls_named())))
def test_every_moment_is_in_a_function_that_exists(call):
    owner, function, _ = call_of(call)
    assert callable(getattr(owner, function))


@pytest.mark.parametrize("moment, who, ranks, precision", [*ONCE, *HEAVY])
def test_a_killed_run_resumes_to_the_same_bits(
    user, reference_of, out, moment, who, ranks, precision
):
    reference = reference_of(ranks, precision, MOMENTS[moment].more)
    victims = victims_of(moment, ranks)[who]
    kill_and_run_again(user, out, reference, moment, victims, ranks, precision)


IN_MEMORY = ["before_the_rename", "ledger_half_restored", "before_the_last_latest"]
IN_MEMORY_HEAVY = [
    "matrices_are_gathered", "engine_shard_half_written", "after_the_shards", "adapter_half_written",
    "ledger_half_copied", "before_the_manifest", "before_the_first_latest", "after_the_best", "right_after_a_merge",
    "cycle_not_in_the_ledger", "before_the_rebuild", "old_run_set_aside", "before_the_summary",
]  # fmt: skip


@pytest.mark.parametrize("out", ["memory"], indirect=True)
@pytest.mark.parametrize(
    "moment", [*IN_MEMORY, *(heavy(moment) for moment in IN_MEMORY_HEAVY)]
)
def test_a_killed_run_resumes_with_checkpoints_in_memory(
    user, reference_of, out, moment
):
    reference = reference_of(2, "fp32", MOMENTS[moment].more)
    kill_and_run_again(user, out, reference, moment, [0], 2, "fp32")


def test_a_run_that_another_had_set_aside_goes_on(user, reference_of, out):
    """--overwrite_output_dir was a mistake and was killed before its run began; then the
    old run is resumed.
    """
    reference = reference_of(2, "fp32", ())
    prepare(out, reference, RunStart.UNNAMED)
    overwriting = command(user, out, "fp32", OVERWRITE)
    killed_run(2, overwriting, "old_run_set_aside", [0, 1])
    assert not (out / "checkpoints").exists()
    run(2, command(user, out, "fp32", AUTO))
    assert_same_outcome(out, reference)
