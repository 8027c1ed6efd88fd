"""The control that trains nothing at all."""

import pytest

from mora_ds.common.files import read_json
from mora_ds.deploy.export import export_merged
from tests.helpers.jobs import assert_close_losses, rows, run
from tests.helpers.resume import assert_same_run, stop_and_resume

RELORA = "--adapter lora --max_steps 9 --merge_every 3 --restart_warmup_steps 1 --save_steps 2 --learning_rate 5e-2"


def test_relora_has_one_curve_for_1_and_2_ranks_is_resumed_and_exported(
    user, tmp_path, merged
):
    """Resumed right after a merge that is not saved yet, and in mid-cycle."""
    one = tmp_path / "1"
    two = tmp_path / "2"
    resumed = tmp_path / "resumed"
    run(1, user.flags(one, RELORA, "--per_device_train_batch_size 4"))
    summary = run(2, user.flags(two, RELORA))
    assert summary["merges"] == 2
    assert summary["base_bytes_gathered"] == 0
    steps = [row for row in rows(two)[1:] if "loss" in row]
    gathered = {row["bytes_gathered"] for row in steps}
    assert gathered == {summary["bytes_gathered_per_step"]}
    for row in steps:
        assert row["tokens_per_s"] == 2 * row["tokens_per_s_per_rank"]
        assert row["tokens_per_s"] * row["step_time_s"] == pytest.approx(4 * 32)
    assert_close_losses(two, one, rtol=2e-6)
    before = summary["perplexity_before"]["held"]
    assert summary["perplexity_after"]["held"] < 0.99 * before, "it learns"
    stop_and_resume(2, user.flags(resumed, RELORA), 3, 5)
    assert_same_run(resumed, two)
    assert export_merged(two, merged, verify=True).cycles == 2


# -- nothing ---------------------------------------------------------------------------


def test_none_reports_the_base(user, tmp_path):
    trained = run(1, user.flags(tmp_path / "trained", "--max_steps 2"))
    expected = pytest.approx(trained["perplexity_before"], rel=1e-6)
    for ranks in (1, 2):
        bare = tmp_path / f"bare-{ranks}"
        summary = run(ranks, user.flags(bare, "--adapter none"))
        assert summary["perplexity_before"] == summary["perplexity_after"] == expected
        assert summary["steps"] == summary["trainable_params"] == 0
        assert read_json(bare / "summary.json") == summary
        assert not (bare / "checkpoints").exists()
