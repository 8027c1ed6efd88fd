"""The controls on the same engine: LoRA, ReLoRA, and nothing at all."""

import pytest
from transformers import AutoModelForCausalLM

from mora_ds.common.files import read_json
from mora_ds.deploy.export import export_merged
from tests.helpers.jobs import assert_close_losses, run
from tests.helpers.resume import assert_same_run, stop_and_resume

RELORA = "--adapter lora --max_steps 9 --merge_every 3 --restart_warmup_steps 1 --save_steps 2 --learning_rate 5e-2"


def test_relora_has_one_curve_for_1_and_2_ranks_and_is_exported(user, tmp_path):
    one = tmp_path / "1"
    two = tmp_path / "2"
    run(1, user.flags(one, RELORA, "--per_device_train_batch_size 4"))
    summary = run(2, user.flags(two, RELORA))
    assert summary["merges"] == 2
    assert summary["base_bytes_gathered"] == 0
    assert_close_losses(two, one, rtol=2e-6)
    assert (
        summary["perplexity_after"]["held"] < 0.99 * summary["perplexity_before"]["held"]
    ), "it learns"
    report = export_merged(two, tmp_path / "merged", verify=True)
    assert report.cycles == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_relora_interrupted_and_resumed_is_the_same_run(user, tmp_path):
    """Right after a merge that is not saved yet, and in mid-cycle."""
    whole = tmp_path / "whole"
    resumed = tmp_path / "resumed"
    run(2, user.flags(whole, RELORA))
    stop_and_resume(2, user.flags(resumed, RELORA), 3, 5)
    assert_same_run(resumed, whole)


# -- nothing -----------------------------------------------------------------------------------------------------------


def test_none_reports_the_base(user, tmp_path):
    expected = run(1, user.flags(tmp_path / "trained", "--max_steps 2"))[
        "perplexity_before"
    ]
    for ranks in (1, 2):
        bare = tmp_path / f"bare-{ranks}"
        summary = run(ranks, user.flags(bare, "--adapter none"))
        assert (
            summary["perplexity_before"]
            == summary["perplexity_after"]
            == pytest.approx(expected, rel=1e-6)
        )
        assert summary["steps"] == summary["trainable_params"] == 0
        assert read_json(bare / "summary.json") == summary
        assert not (bare / "checkpoints").exists()
