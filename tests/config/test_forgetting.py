"""Forgetting: each set against its start, the stop at a bound, the best checkpoint, which
stays.
"""

import math

import pytest

from mora_ds.checkpoint.state import TrainerState
from mora_ds.common.files import read_json
from mora_ds.config.forgetting import Watch, report
from tests.helpers.errors import user_error
from tests.helpers.gloo import run_alone
from tests.helpers.jobs import printed, rows, run
from tests.helpers.resume import assert_same_run, interrupted_job


def test_bounds_and_scores():
    watch = Watch.of(["old:1.5"], ["old:0.25", "new:0.75"])
    start = {"old": 100.0, "new": 50.0}
    assert watch.forgotten(start, {"old": 150.0, "new": 500.0}) is None
    assert watch.forgotten(start, {"old": 150.1})
    assert watch.score({"old": math.e, "new": math.e**2}) == pytest.approx(0.25 + 1.5)
    assert Watch.of([], []).score(start) is None
    assert watch.score({"old": 1.0}) is None, "a set that was left out"
    assert (
        watch.forgotten({"new": 1.0}, start)
        is None
        is watch.forgotten(start, {"new": 1e9})
    )
    assert Watch.of(["a:b:1.5"], []).bounds == {"a:b": 1.5}
    lines = report(start, {"old": 110.0, "new": 40.0, "late": 1.0})
    assert [line.split()[-1] for line in lines] == ["(+10.00%)", "(-20.00%)"]
    assert not report({}, start)
    for bounds, weights, words in (
        (["old:1.1", "old:5"], [], "old is given twice"),
        ([], ["old:0", "new:0"], "one weight must be above 0"),
    ):
        with user_error(words):
            Watch.of(bounds, weights)


def forgetting(user, out, *more):
    """A run that memorizes two letters and, from its third step on, forgets the
    rest.
    """
    odd = user.root / "odd.txt"
    odd.write_text("zq " * 4000)
    all_of_it = (
        "--train_embeddings true --train_head true --learning_rate 0.03 --max_steps 12"
    )
    return user.flags(
        out, "--train_files", odd, all_of_it, "--eval_steps 2 --save_steps 3", *more
    )


def test_a_run_stops_when_a_set_is_forgotten(user, out):
    auto = "--resume_from_checkpoint auto"
    argv = forgetting(user, out, "--stop_when_forgotten held:1.2", auto)
    run_alone(interrupted_job, argv, 1)
    output = run_alone(printed, argv)
    summary = read_json(out / "summary.json")
    step = summary["steps"]
    assert step < 12
    assert f"stopping after step {step} of 12: the value of held is" in output
    ratios = [
        row["eval_perplexity"]["held"] / summary["perplexity_before"]["held"]
        for row in rows(out)
        if "eval_perplexity" in row
    ]
    assert ratios[-1] > 1.2 >= max(ratios[:-1]), (
        "at the first evaluation beyond the bound, made once"
    )
    assert summary["perplexity_change_percent"]["held"] == pytest.approx(
        100 * (ratios[-1] - 1)
    )
    assert "perplexity on" in output
    assert f"{100 * (ratios[-1] - 1):+.2f}%" in output
    state = TrainerState.read(out / "checkpoints/latest")
    assert state.finished
    assert state.step == step
    again = run_alone(printed, argv)
    assert "--stop_when_forgotten allows 1.2" in again
    assert len(rows(out)) == len(ratios) + step
    run(1, [*argv, "--stop_when_forgotten", "held:1e9"])
    assert read_json(out / "summary.json")["steps"] == 12, "a higher bound goes on"


def test_the_best_checkpoint_stays(user, tmp_path, out):
    """Best at step 2, before the rest is forgotten; named at once, kept beyond
    --save_total_limit, resumed alike.
    """
    more = "--save_total_limit 1 --best_by held:1 short:0.5"
    full = tmp_path / "full"
    summary = run(1, forgetting(user, full, more))
    scores = {
        row["step"]: math.log(row["eval_perplexity"]["held"])
        + 0.5 * math.log(row["eval_perplexity"]["short"])
        for row in rows(full)
        if "eval_perplexity" in row and row["step"] > 0
    }
    best = min(scores, key=lambda step: scores[step])
    assert 0 < best < 9, scores
    assert summary["best_step"] == best
    root = full / "checkpoints"
    assert (root / "best").resolve().name == f"step-{best:06d}"
    assert sorted(path.name for path in root.glob("step-*")) == [
        f"step-{best:06d}",
        "step-000012",
    ]
    assert TrainerState.read(root / "best").step == best
    argv = forgetting(user, out, more, "--resume_from_checkpoint auto --async_save")
    for step in (5, 8):
        run_alone(interrupted_job, argv, step)
    (out / "checkpoints/best").unlink()  # as a kill between two renames would leave it
    run(1, argv)
    assert_same_run(out, full)
    assert (out / "checkpoints/best").resolve().name == f"step-{best:06d}"
