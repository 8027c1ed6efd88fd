"""Hugging Face's Trainer with MoRA: equal to a loop of its own, resumed bit for bit, the
base never sharded.
"""

from pathlib import Path

import pytest
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import mora_ds
from mora_ds.adapters.inject import frozen_buffers
from mora_ds.deploy.export import export_merged
from mora_ds.engine.traffic import CollectiveCounter
from mora_ds.hf import MoRACallback
from tests.helpers import hf
from tests.helpers.errors import user_error
from tests.helpers.gloo import run_ranks
from tests.helpers.resume import assert_same_tensors


def trained_both_ways(root):
    by_loop, losses = hf.own_loop(Path(root), hf.rates())
    for accumulation in (1, 2):
        trainer = hf.trainer_in(Path(root), f"by-{accumulation}", accumulation)
        trainer.train()
        callback = trainer.pop_callback(MoRACallback)
        assert callback.schedule.total_steps == hf.STEPS
        assert trainer.run.state.merges == hf.run_merges() == [3, 6]
        history = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert history == pytest.approx(losses, abs=1e-6)
        assert_close(hf.matrices(trainer.deepspeed), by_loop, rtol=0, atol=1e-6)


def test_a_run_by_trainer_is_the_run_by_a_loop(tmp_path):
    run_ranks(2, trained_both_ways, str(tmp_path))


def interrupted_and_not(root):
    """One run to its end, and another one that starts from its checkpoint-4, after one
    merge and before another."""
    every = dict.fromkeys(("save_strategy", "eval_strategy"), "steps")
    steps = {**every, "save_steps": 2, "eval_steps": 4}
    reference = hf.trainer_in(Path(root), "out", **steps)
    before = reference.evaluate()["eval_loss"]
    reference.train()
    expected = hf.matrices(reference.deepspeed)
    history = _later_rows(reference)
    reference.save_model(f"{root}/saved")
    counter = CollectiveCounter(frozen_buffers(reference.model).values())
    resumed = hf.trainer_in(Path(root), "out", **steps)
    with counter.counting():
        resumed.train(resume_from_checkpoint=f"{root}/out/checkpoint-4")
    resumed_history = _later_rows(resumed)
    with user_error("called before"):
        resumed.train()
    for step in (2, 4):  # before the first merge, and after it
        without = hf.trainer_in(Path(root), "out", **steps)
        without.remove_callback(MoRACallback)
        with user_error(
            rf"checkpoint-{step} is of a run that merges every 3 steps: add MoRACallback"
        ):
            without.train(resume_from_checkpoint=f"{root}/out/checkpoint-{step}")
    without_merges = hf.trainer_in(
        Path(root), "out", 1, 0, max_steps=7, save_strategy="no", learning_rate=0.5
    )
    without_merges.train(resume_from_checkpoint=f"{root}/out/checkpoint-4")
    return {
        "rates": [row["learning_rate"] for row in _later_rows(without_merges)],
        "without_merges": without_merges.run.state.merges,
        "evaluated": before,
        "seed": reference.run.identity["seed"],
        "expected": expected,
        "resumed": hf.matrices(resumed.deepspeed),
        "history": (history, resumed_history),
        "base_bytes": counter.base_bytes,
    }


def _later_rows(trainer):
    """The log after step 4, without times."""
    measured = ("runtime", "per_second", "preparation_time")
    return [
        {key: value for key, value in row.items() if not key.endswith(measured)}
        for row in trainer.state.log_history
        if row["step"] > 4 and "train_runtime" not in row
    ]


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    both = run_ranks(2, interrupted_and_not, str(tmp_path))
    for rank in both:
        assert rank["history"][0] == rank["history"][1]
        assert rank["base_bytes"] == 0
        assert rank["without_merges"] == [3], (
            "MoRACallback(0) ends the merges, that of step 6"
        )
        # After each of the last three steps, by the new arguments
        assert rank["rates"] == pytest.approx([1 / 7, 0.5 / 7, 0])
        assert rank["evaluated"] == pytest.approx(4.85, abs=0.1)
        assert rank["seed"] == 3
        assert_same_tensors(rank["resumed"], rank["expected"])
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tensors = both[0]["expected"]
    for name in tensors:
        if name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            d_out, d_in = tensors[name].shape
            spec = mora_ds.MoRAConfig(rank=4).operator_for(layer, d_in, d_out, 2)
            merged = tensors[name] + mora_ds.delta_weight(spec, tensors[layer])
            assert_close(saved.get_parameter(name), merged, rtol=0, atol=1e-6)
    export_merged(tmp_path / "out/checkpoint-8", tmp_path / "exported", verify=True)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    hf.assert_same_parameters(saved, exported)


def best_is_loaded(root):
    """The first checkpoint is the best one: a metric that grows with every evaluation, to
    be kept small.
    """
    calls = iter(range(100))
    trainer = hf.trainer_in(
        Path(root),
        "out",
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="rank",
        greater_is_better=False,
        save_total_limit=2,
    )
    trainer.compute_metrics = lambda predictions: {"rank": float(next(calls))}
    trainer.train()
    best = trainer.state.best_model_checkpoint
    live = hf.matrices(trainer.deepspeed)
    again = hf.trainer_in(Path(root), "out", max_steps=2)
    again.train(resume_from_checkpoint=best)
    return {
        "best": best,
        "live": live,
        "saved": hf.matrices(again.deepspeed),
        "merges": trainer.run.state.merges,
    }


@pytest.mark.heavy
def test_the_best_checkpoint_brings_its_base_back(tmp_path, out):
    for rank in run_ranks(2, best_is_loaded, str(tmp_path)):
        assert Path(rank["best"]).name == "checkpoint-2"
        assert rank["merges"] == []
        assert_same_tensors(rank["live"], rank["saved"])
    folders = {path.name for path in out.glob("checkpoint-*")}
    assert folders == {"checkpoint-2", "checkpoint-8"}
