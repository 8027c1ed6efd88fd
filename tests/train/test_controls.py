"""The controls on the same engine: LoRA, ReLoRA, nothing at all, and a full-rank warm start before an adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mora_ds.config.arguments import parse
from mora_ds.data import PackedDataset
from mora_ds.deploy.export import export_merged
from mora_ds.train.warm_start import _first_part
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, curve, job, losses, printed, refusal, rows, run
from tests.helpers.resume import assert_same_run, interrupted_job, stop_and_resume

pytestmark = pytest.mark.gloo

RELORA = (
    "--adapter", "lora", "--max_steps", 9, "--merge_every", 3, "--restart_warmup_steps", 1, "--save_steps", 2,
    "--learning_rate", "5e-2",
)  # fmt: skip


def test_relora_has_one_curve_for_1_and_2_ranks_and_is_exported(user: Playground, tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    run(1, user.flags(one, *RELORA, "--per_device_train_batch_size", 4))
    summary = run(2, user.flags(two, *RELORA))
    assert summary["merges"] == 2 and summary["base_bytes_gathered"] == 0
    torch.testing.assert_close(losses(two), losses(one), rtol=2e-6, atol=0)
    assert summary["perplexity_after"]["held"] < 0.99 * summary["perplexity_before"]["held"], "it learns"
    report = export_merged(two, tmp_path / "merged", verify=True)
    assert report.cycles == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize("step", [3, 5])
def test_relora_interrupted_and_resumed_is_the_same_run(user: Playground, tmp_path: Path, step: int) -> None:
    """Before the next checkpoint: right after a merge, and in mid-cycle."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(2, user.flags(whole, *RELORA))
    stop_and_resume(2, user.flags(resumed, *RELORA), step)
    assert_same_run(resumed, whole)


def test_as_many_parameters_at_the_same_rank(user: Playground, tmp_path: Path) -> None:
    flags = ("--max_steps", 2, "--eval_on_start", "false")
    mora = run(1, user.flags(tmp_path / "mora", *flags))["trainable_params"]
    lora = run(1, user.flags(tmp_path / "lora", *flags, "--adapter", "lora"))["trainable_params"]
    wider = run(1, user.flags(tmp_path / "wider", *flags, "--adapter", "lora", "--mora_rank", 4))["trainable_params"]
    assert 0.6 * lora < mora <= lora and wider == 2 * lora


def test_an_adapter_of_another_kind_does_not_continue_a_run(user: Playground, tmp_path: Path) -> None:
    run(1, user.flags(tmp_path, "--max_steps", 2))
    resume = ("--max_steps", 4, "--resume_from_checkpoint", "auto")
    assert "--adapter: 'mora' there, 'lora' here" in refusal(user.flags(tmp_path, *resume, "--adapter", "lora"))
    assert "--operator: 'auto' there, 'share'" in refusal(user.flags(tmp_path, *resume, "--operator", "share"))


# -- nothing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_none_reports_the_base(user: Playground, tmp_path: Path, ranks: int) -> None:
    trained, bare = tmp_path / "trained", tmp_path / "bare"
    expected = run(1, user.flags(trained, "--max_steps", 2))["perplexity_before"]
    summary = run(ranks, user.flags(bare, "--adapter", "none"))
    assert summary["perplexity_before"] == summary["perplexity_after"] == pytest.approx(expected, rel=1e-6)
    assert summary["steps"] == summary["trainable_params"] == 0
    assert json.loads((bare / "summary.json").read_text()) == summary
    assert not (bare / "checkpoints").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--adapter", "none", "--merge_every", 3), "--merge_every"),
        (("--adapter", "none", "--export_merged", "true"), "--export_merged"),
        (("--adapter", "none", "--resume_from_checkpoint", "auto"), "--resume_from_checkpoint"),
        (("--adapter", "full", "--full_rank_steps", 3), "--full_rank_steps"),
        (("--full_rank_steps", 6), "--max_steps, got 6"),
        (("--full_rank_steps", 2, "--full_rank_learning_rate", 0), "--full_rank_learning_rate"),
        (("--adapter", "lora", "--mora_rank", 0), "--mora_rank"),
        (("--adapter", "lora", "--lora_alpha", -1), "--lora_alpha"),
        (("--adapter", "lroa"), "lora"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    user: Playground, tmp_path: Path, flags: tuple[str | int, ...], named: str
) -> None:
    assert named in refusal(user.flags(tmp_path / "out", *flags))
    assert not (tmp_path / "out").exists()


# -- a full-rank warm start --------------------------------------------------------------------------------------------

WARM = (
    "--full_rank_steps", 3, "--max_steps", 9, "--merge_every", 2, "--restart_warmup_steps", 1, "--save_steps", 2,
    "--full_rank_learning_rate", "2e-3",
)  # fmt: skip


def batches_of(argv: list[str]) -> list[int]:
    """The step numbers of the batches that a run reads, in order."""
    asked, batch = [], PackedDataset.batch

    def noted(data: PackedDataset, step: int, *rest: object) -> object:
        asked.append(step)
        return batch(data, step, *rest)  # type: ignore[arg-type]

    PackedDataset.batch = noted  # type: ignore[method-assign, assignment]  # in this forked rank alone
    job(argv)
    return asked


def test_the_adapter_goes_on_where_the_full_rank_steps_end(user: Playground, tmp_path: Path) -> None:
    flags = user.flags(tmp_path, *WARM, "--export_merged", "true", "--save_steps", 0)
    (asked,) = run_ranks(1, batches_of, flags)
    # each part looks at the batch to come before its checkpoint
    assert asked == [0, 1, 2, 3, *range(3, 9), 9]
    first, second = rows(tmp_path / "full_rank"), rows(tmp_path)
    assert [row["step"] for row in first if "loss" in row] == [1, 2, 3]
    assert [row["step"] for row in second if "loss" in row] == list(range(1, 7))
    ends = [row["eval"] for row in first if "eval" in row][-1]
    begins = next(row["eval"] for row in second if "eval" in row)
    assert begins == pytest.approx(ends, rel=1e-6)
    base = json.loads((tmp_path / "checkpoints/latest/base.json").read_text())["folder"]
    assert Path(base) == (tmp_path / "full_rank" / "merged").resolve()
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_the_full_rank_part_is_not_uploaded() -> None:
    """Its merged model is the base of the adapter, not the result of the run."""
    given = parse(
        ["--full_rank_steps", "3", "--max_steps", "9", "--push_to_hub", "someone/model", "--merge_every", "2"]
    )
    first = _first_part(given)
    assert first.training.push_to_hub is None and first.training.export_merged
    assert (first.training.max_steps, first.adapter.merge_every) == (3, 0)
    assert first.training.learning_rate == pytest.approx(0.1 * given.training.learning_rate)


def test_what_the_full_rank_steps_forget_ends_the_run(user: Playground, tmp_path: Path) -> None:
    """At once and when it is resumed, until the bound is raised; by the evaluation after their last step, too."""
    more = (*WARM, "--full_rank_learning_rate", 0.3, "--warmup_steps", 0)
    out, late, bound = tmp_path / "out", tmp_path / "late", ("--stop_when_forgotten", "held:1.01", "--eval_steps")
    flags = user.flags(out, *more, "--resume_from_checkpoint", "auto")
    told = run_ranks(1, printed, [*flags, *bound, "1"])[0]
    assert "stopping after step 1 of 3: the perplexity on held is" in told
    assert f"its model is {out}/full_rank/merged" in told
    assert run(1, [*flags, *bound, "1"])["steps"] == 1 and not (out / "run.yaml").exists()
    assert run(1, flags)["steps"] == 6 and len(losses(out / "full_rank")) == 3
    assert run(1, user.flags(late, *more, *bound, 3))["steps"] == 3 and not (late / "run.yaml").exists()


def test_both_parts_resume(user: Playground, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = user.flags(resumed, *WARM)
    run(2, user.flags(whole, *WARM))
    run_ranks(2, interrupted_job, flags, 2)  # in the first part
    assert not (resumed / "full_rank" / "merged").exists()
    stop_and_resume(2, flags, 4)  # in the second part: the first one has three steps
    assert curve(resumed / "full_rank") == curve(whole / "full_rank")
    assert_same_run(resumed, whole)
    shutil.rmtree(resumed / "checkpoints")
    again = [*flags, "--resume_from_checkpoint", "auto", "--full_rank_steps", "4"]
    assert "was trained for 3 steps" in refusal(again)
