"""`--merge_when stalled` in real runs on two ranks: merges when its rule says so, and resumes to the same bits."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mora_ds.config.arguments import parse
from mora_ds.engine import zero
from mora_ds.remora.stall import StallRule, StallSignal
from tests.helpers.engines import new_engine, one_step
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, printed, refusal, rows, run
from tests.helpers.resume import assert_same_run, interrupted_job

pytestmark = pytest.mark.gloo

STEPS, WARMUP, REWARMUP, WINDOW = 20, 1, 2, 4
STALLED = (
    "--merge_when", "stalled", "--max_steps", STEPS, "--restart_warmup_steps", REWARMUP, "--stall_window", WINDOW,
    "--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 2, "--merge_at_end", "true",
)  # fmt: skip
SIGNALS = {"loss": ("--stall_tolerance", 0.009), "update": ("--stall_signal", "update", "--stall_tolerance", 0.4)}


@pytest.fixture(scope="module")
def wholes(user: Playground, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An uninterrupted run by each signal."""
    root = tmp_path_factory.mktemp("wholes")
    for signal, more in SIGNALS.items():
        run(2, user.flags(root / signal, *STALLED, *more, "--save_steps", 3))
    return {signal: root / signal for signal in SIGNALS}


def merges(out: Path) -> list[int]:
    return [row["step"] for row in rows(out) if "merge" in row]


def state(out: Path, step: int) -> dict[str, Any]:
    return json.loads((out / "checkpoints" / f"step-{step:06d}" / "trainer_state.json").read_text())


def merges_by_hand(out: Path, rule: StallRule) -> list[int]:
    """What the rule says about the values that the run logged, without the schedule or the trainer."""
    values = {row["step"]: row["stall"]["value"] for row in rows(out) if "stall" in row}
    found: list[int] = []
    history: list[float] = []
    resting = WARMUP
    for step in range(1, STEPS + 1):
        if resting:
            resting -= 1
            continue
        history.append(values[step])
        if len(history) >= WINDOW and rule.stalled(history[-WINDOW:]) and STEPS - step > REWARMUP:
            found.append(step)
            history, resting = [], REWARMUP
    return [*found, STEPS]


@pytest.mark.parametrize("signal", SIGNALS)
def test_merges_come_when_the_rule_says_so(wholes: dict[str, Path], signal: str) -> None:
    out = wholes[signal]
    rule = StallRule(StallSignal(signal), WINDOW, float(SIGNALS[signal][-1]))
    assert merges(out) == merges_by_hand(out, rule) == state(out, STEPS)["merges"]
    assert len(merges(out)) >= 3, "two on the way, and the one at the end"
    assert merges(out)[0] > WARMUP + WINDOW or signal == "loss", "not only as early as can be"
    stalls = [row for row in rows(out) if "stall" in row]
    assert [row["step"] for row in stalls] == list(range(1, STEPS + 1))
    assert [row["step"] for row in stalls if row["stall"]["merges"]] == merges(out)[:-1]


def test_the_loss_that_is_judged_is_the_loss_that_is_logged(wholes: dict[str, Path]) -> None:
    losses = {row["step"]: row["loss"] for row in rows(wholes["loss"]) if "loss" in row}
    values = {row["step"]: row["stall"]["value"] for row in rows(wholes["loss"]) if "stall" in row}
    assert all(value in (None, losses[step]) for step, value in values.items())


def test_every_merge_is_followed_by_a_rewarmup(user: Playground, wholes: dict[str, Path]) -> None:
    schedule = parse(user.flags("out", *STALLED)).schedule(STEPS)
    rates = {row["step"]: row["learning_rate"] for row in rows(wholes["update"]) if "loss" in row}
    for merge in merges(wholes["update"])[:-1]:
        top = schedule.curve(merge + REWARMUP)
        assert [rates[merge + k] for k in (1, 2, 3)] == pytest.approx([top / 3, 2 * top / 3, top])


@pytest.mark.parametrize("signal", [pytest.param("update", marks=pytest.mark.heavy), "loss"])
def test_a_resumed_run_decides_as_the_uninterrupted_one(
    user: Playground, wholes: dict[str, Path], tmp_path: Path, signal: str
) -> None:
    """Stopped in the middle of a window and behind a merge; the window comes back from the checkpoint."""
    whole, out = wholes[signal], tmp_path / "out"
    flags = user.flags(out, *STALLED, *SIGNALS[signal], "--save_steps", 3, "--resume_from_checkpoint", "auto")
    run_ranks(2, interrupted_job, flags, 4)
    assert len(state(out, 3)["stall_window"]) == 2
    run_ranks(2, interrupted_job, flags, merges(whole)[1])
    run(2, flags)
    assert_same_run(out, whole)
    windows = [[state(each, step)["stall_window"] for step in range(3, STEPS, 3)] for each in (out, whole)]
    assert windows[0] == windows[1] and any(windows[0])


def test_one_rank_merges_at_the_same_steps(user: Playground, wholes: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "one"
    run(1, user.flags(out, *STALLED, *SIGNALS["update"], "--per_device_train_batch_size", 8,
                      "--gradient_accumulation_steps", 1))  # fmt: skip
    assert merges(out) == merges(wholes["update"])


def test_the_longest_cycle_ends_one_that_does_not_stall(user: Playground, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = user.flags(out, *STALLED, "--stall_tolerance", 1e-6, "--merge_at_latest", 8, "--merge_at_end", "false")
    told = run_ranks(1, printed, flags)[0]
    assert merges(out) == [8, 16]
    assert "a cycle has at least 6 steps and at most 8; none before step 5, none after step 17" in told
    assert "at its longest (--merge_at_latest)" in told and "is too noisy to detect a stall" in told


def test_a_run_extended_past_its_last_merge_warms_up_again(
    user: Playground, wholes: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "longer"
    checkpoint = wholes["loss"] / "checkpoints" / f"step-{STEPS:06d}"
    flags = user.flags(
        out, *STALLED, *SIGNALS["loss"], "--max_steps", STEPS + 4, "--resume_from_checkpoint", checkpoint
    )
    run(2, flags)
    schedule = parse(flags).schedule(STEPS + 4)
    rates = [row["learning_rate"] for row in rows(out) if "loss" in row]
    top = schedule.curve(STEPS + REWARMUP)
    assert rates == pytest.approx([top / 3, 2 * top / 3, top, schedule.curve(STEPS + 3)])


def test_the_rule_must_not_change_in_mid_run(user: Playground, wholes: dict[str, Path]) -> None:
    flags = user.flags(wholes["loss"], *STALLED, "--resume_from_checkpoint", "latest")
    changes = ("--stall_tolerance", 0.5, "--stall_window", 5, "--stall_signal", "update", "--merge_at_latest", 9)
    message = refusal([*flags, *map(str, changes)], ranks=2)
    assert all(str(name).removeprefix("--") in message for name in changes[::2])
    assert "merge_when: 'stalled' there" in refusal([*flags, "--merge_when", "steps", "--stall_window", "200"], ranks=2)


def norms(stage: int) -> list[tuple[float, float]]:
    """(norm of group 0 from all ranks' shares, the same of the gathered master) in every dtype."""
    found = []
    for dtype in ("float32", "bfloat16", "float16"):
        engine = new_engine(stage, dtype)
        one_step(engine)
        share = torch.tensor(zero.group_energy(engine, 0), dtype=torch.float64)
        dist.all_reduce(share)
        found.append((share.sqrt().item(), zero.full_fp32(engine, engine.module.first).double().norm().item()))
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_norm_of_a_group_is_put_together_from_all_ranks(stage: int) -> None:
    """25 values on two ranks: one place is no value, and ZeRO-3 leaves in it what the memory held."""
    for together, whole in itertools.chain(*run_ranks(2, norms, stage)):
        assert together == pytest.approx(whole, rel=1e-6) and whole > 1
