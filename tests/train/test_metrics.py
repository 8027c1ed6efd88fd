"""What is logged: rows that any JSON reader takes, a resumed file that reads as one,
TensorBoard, and nothing twice.
"""

import json
import math
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mora_ds.checkpoint.state import TrainerState
from mora_ds.models.loss import perplexity
from mora_ds.train import trainer as trainer_module
from mora_ds.train.hooks import Hooks
from mora_ds.train.loader import MicroBatch
from mora_ds.train.metrics import (
    MetricsLog,
    PhaseMemory,
    source_facts,
    step_line,
)
from mora_ds.train.trackers import Tracker
from mora_ds.train.trainer import Trainer
from tests.helpers.jobs import rows


def metrics(step, loss=2.0, **more):
    """The row of a step."""
    return {
        "step": step, "loss": loss, "perplexity": perplexity(loss), "learning_rate": 1e-3, "grad_norm": 0.5,
        "tokens": 64 * step, "tokens_per_s": 128.0, "tokens_per_s_per_rank": 64.0,
        "step_time_s": 0.5, "peak_memory_bytes": 2**30,
        "bytes_gathered": 1_000_000, **more,
    }  # fmt: skip


def board_log(folder, start_step, pending=()):
    """The log of a run with TensorBoard."""
    first_step = start_step + 1 if start_step and not pending else start_step
    board = Tracker("tensorboard", folder, {}, first_step, [])
    return MetricsLog(folder, 9, True, start_step, [board], pending)


def test_a_row_is_in_the_file_at_once(tmp_path):
    """A kill loses none that was logged."""
    log = MetricsLog(tmp_path, 9, enabled=True)
    log.step(metrics(1))
    log.record("tasks", 1, {"quiz": 0.25})
    assert rows(tmp_path) == [metrics(1), {"step": 1, "tasks": {"quiz": 0.25}}]
    log.close()


def test_a_step_is_logged_with_the_figures_of_all_ranks(monkeypatch):
    """One step of every --logging_steps is logged, and always the last one."""
    logged = []
    trainer = Trainer.__new__(Trainer)
    vars(trainer).update(
        state=TrainerState(step=3, tokens=384), rows_per_step=8, train_data=SimpleNamespace(seq_len=16), engine=None,
        replica=SimpleNamespace(world=4), log=SimpleNamespace(step=logged.append), bytes_gathered_per_step=7,
        hooks=Hooks(), _mixture=None, training=SimpleNamespace(logging_steps=3), memory=SimpleNamespace(peak=2**30),
        total_steps=8, job=SimpleNamespace(utilization=lambda speed: speed / 200),
    )  # fmt: skip
    monkeypatch.setattr(trainer_module.zero, "gradient_norm", lambda engine: 0.5)
    trainer._log_step(2.0, 1e-3, 2.0, [])
    assert logged == [
        metrics(3, tokens=384, tokens_per_s=64.0, tokens_per_s_per_rank=16.0,
            step_time_s=2.0, bytes_gathered=7, mfu=0.32),
    ]  # fmt: skip
    assert [step for step in range(1, 9) if trainer._is_logged(step)] == [3, 6, 8]


def test_each_phase_on_a_gpu_has_a_peak_of_its_own(monkeypatch):
    """A stand-in replaces the allocator; it holds 5 bytes after its peak is reset."""
    peaks = iter([7, 30, 12, 9, 20, 5, 5])
    restarts = []
    memory = PhaseMemory()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    memory.end("start")
    assert memory.by_phase == {}, "nothing without a GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda: restarts.append(True)
    )
    for phase in ("start", "forward", "step", "between", "forward", "step"):
        memory.end(phase)
    assert memory.by_phase == {"start": 7, "forward": 30, "step": 12, "between": 9}
    assert len(restarts) == 6
    assert memory.peak == 30


def test_losses_are_summed_by_source(monkeypatch):
    monkeypatch.setattr(trainer_module, "row_nll", lambda engine, losses: losses)
    trainer = Trainer.__new__(Trainer)
    vars(trainer).update(
        engine=None, replica=SimpleNamespace(on_device=lambda rows: rows), _mixture=True
    )
    by_source = torch.zeros(2, 3, dtype=torch.float64)
    losses = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    assert trainer._nll(
        MicroBatch(losses, [2, 4, 6], [0, 1, 0]), by_source
    ).requires_grad
    trainer._nll(MicroBatch(torch.tensor([4.0]), [2], [1]), by_source)
    assert not by_source.requires_grad
    assert by_source.tolist() == [[4.0, 6.0, 0.0], [8.0, 6.0, 0.0]]
    facts = source_facts(by_source.flatten().tolist(), {"a": 8, "b": 6, "idle": 0})
    assert facts["a"] == {
        "loss": 0.5,
        "perplexity": pytest.approx(math.exp(0.5)),
        "tokens": 8,
    }
    assert facts["b"]["loss"] == 1.0
    assert facts["idle"] == {"loss": None, "perplexity": None, "tokens": 0}


def test_console_line_of_a_step():

    assert step_line(metrics(7), 100) == (
        "step   7/100  loss 2.0000  ppl 7.39  lr 1.00e-03  grad 0.500  128 tok/s  1.00 GiB  "
        "gathered 1.00 MB  0:00:46 left"
    )
    assert "gathered" not in step_line(metrics(7, bytes_gathered=0), 100)
    assert "tok/s  MFU 41.2%  1.00 GiB" in step_line(metrics(7, mfu=0.4123), 100)


def test_nan_and_infinity_are_written_as_null(tmp_path):
    """NaN and Infinity are no JSON, and a perplexity may well overflow."""
    assert perplexity(800.0) == math.inf
    log = MetricsLog(tmp_path, 1, enabled=True)
    log.step(metrics(1, loss=800.0, grad_norm=math.nan))
    log.evaluation(1, {"held": math.inf})
    log.close()
    first, second = rows(tmp_path)
    assert first["perplexity"] is first["grad_norm"] is None
    assert first["loss"] == 800.0
    assert second["eval"] == {"held": None}


def write_rows(path, steps, tail=""):
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps) + tail)


def test_a_resumed_file_reads_as_one(tmp_path):
    write_rows(tmp_path / "metrics.jsonl", [0, 1, 2, 2, 3, 4], tail='{"step": 5, "lo')
    log = MetricsLog(tmp_path, 9, enabled=True, start_step=2)
    log.step(metrics(3))
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 2, 3]


def test_a_run_from_the_beginning_keeps_nothing_of_an_older_one(tmp_path):
    write_rows(tmp_path / "metrics.jsonl", [0, 1, 2])
    log = MetricsLog(tmp_path, 9, enabled=True)
    log.evaluation(0, {"held": 3.0})
    log.close()
    assert rows(tmp_path) == [{"step": 0, "eval": {"held": 3.0}}]


def test_what_was_pending_at_a_resume_is_there_once(tmp_path):
    for start in (0, 2):
        log = board_log(tmp_path, start, pending=["merge", "eval"] if start else [])
        for step in range(start + 1, 3):
            log.step(metrics(step))
        log.record("merge", 2, {"cycle": 0})
        log.evaluation(2, {"held": 3.0})
        log.close()
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [1, 2]
    assert rows(tmp_path)[2:] == [
        {"step": 2, "merge": {"cycle": 0}},
        {"step": 2, "eval": {"held": 3.0}},
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for tag in board.Tags()["scalars"]:
        steps = [2] if tag.startswith(("2_", "4_")) else [1, 2]
        assert [event.step for event in board.Scalars(tag)] == steps, tag
    assert len(board.Tags()["scalars"]) == 12


def test_weights_and_biases_does_not_get_the_other_rows_of_a_pending_step(
    tmp_path, monkeypatch
):
    """W&B has these rows already."""
    wandb = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = MetricsLog(tmp_path, 9, True)
    log.step(metrics(2))
    log.close()
    tracker = Tracker("wandb", tmp_path, {}, 2, [])
    log = MetricsLog(tmp_path, 9, True, 2, [tracker], ["eval"])
    log.evaluation(2, {"held": 3.0})
    log.close()
    wandb.init.return_value.log.assert_called_once_with(
        {"2_evaluation/perplexity/held": 3.0}, step=2
    )


def test_tensorboard_shows_one_curve_after_a_resume(tmp_path):
    # Interrupted at 4, resumed from a checkpoint at 2
    for start, stop, loss in ((0, 4, 2.0), (2, 5, 1.0)):
        log = board_log(tmp_path, start)
        for step in range(start + 1, stop + 1):
            log.step(metrics(step, loss))
        log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("1_loss/training")] == [
        (1, 2.0), (2, 2.0), (3, 1.0), (4, 1.0), (5, 1.0),
    ]  # fmt: skip


def test_trackers_get_every_number_in_the_unit_of_its_curve(tmp_path, caplog):
    calls = []
    tracker = SimpleNamespace(
        log=lambda numbers, step: calls.append((dict(numbers), step)),
        close=lambda: calls.append("closed"),
    )
    log = MetricsLog(tmp_path, 9, enabled=True, start_step=2, trackers=[tracker])
    with caplog.at_level("INFO"):
        log.step(metrics(3))
        log.evaluation(3, {"held": 4.5, "new": 2.0}, before={"held": 3.0})
        log.record("tasks", 3, {"quiz": {"acc": 0.5, "f1": 0.25}})
        log.record("sources", 3, {"web": {"loss": None, "tokens": 7}, "name": "text"})
    log.close()
    assert calls == [
        (
            {
                "1_loss/training": 2.0, "1_loss/training_perplexity": math.exp(2),
                "3_learning_rate/learning_rate": 1e-3,
                "3_learning_rate/gradient_norm": 0.5, "5_traffic/all_gather_MB_per_step": 1.0,
                "6_speed/tokens_per_second": 128.0, "6_speed/tokens_per_second_and_process": 64.0,
                "6_speed/seconds_per_step": 0.5, "6_speed/tokens_read": 192, "7_memory/peak_GiB": 1.0,
            },
            3,
        ),
        ({"2_evaluation/perplexity/held": 4.5, "2_evaluation/perplexity/new": 2.0}, 3),
        ({"2_forgetting/change_percent/held": 50.0}, 3),
        ({"2_evaluation/tasks/quiz/acc": 0.5, "2_evaluation/tasks/quiz/f1": 0.25}, 3),
        ({"8_sources/web/tokens": 7}, 3),
        "closed",
    ]  # fmt: skip
    assert "step 3  perplexity held 4.500  new 2.000" in caplog.messages


def test_other_ranks_write_nothing(tmp_path):
    log = MetricsLog(tmp_path, 3, enabled=False)
    log.step(metrics(1))
    log.evaluation(1, {})
    log.record("merge", 1, {"cycle": 0, "square_norm": 0.0})
    log.close()
    assert not list(tmp_path.iterdir())
