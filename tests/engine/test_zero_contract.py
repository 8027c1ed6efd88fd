"""What `mora_ds/engine` relies on in DeepSpeed where no run on a CPU would tell that it has moved.

When an upgrade breaks a test here, the message names the symbol: adapt mora_ds/engine, then this file.
"""

import inspect
from importlib import import_module
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mora_ds.engine import zero


def test_the_version_is_one_that_was_tried():
    assert version("deepspeed").startswith("0.19."), "setup.cfg pins the minor version: try the new one here first"


def test_the_switch_that_avoids_a_build_is_read():
    source = inspect.getsource(import_module("deepspeed.comm.torch").build_shm_op)
    assert "__compatible_ops__.get(builder.NAME" in source, "build_shm_op asks something else now"
    builder = import_module("deepspeed.ops.op_builder.cpu.comm").ShareMemCommBuilder
    assert builder.NAME == "deepspeed_shm_comm", "the switch in zero.prepare_backend has another name now"


@pytest.mark.parametrize("module, name", [("fused_adam", "FusedAdam"), ("cpu_adam", "DeepSpeedCPUAdam")])
def test_deepspeeds_adam_counts_steps_by_numbers_in_the_state(module: str, name: str):
    source = inspect.getsource(getattr(import_module(f"deepspeed.ops.adam.{module}"), name).step)
    assert "state['step'] += 1" in source, f"{name} keeps its step count elsewhere: see zero.reset_group"


def test_numbers_in_the_state_are_reset(monkeypatch: pytest.MonkeyPatch):
    """DeepSpeed's own Adam has to be built: its state alone."""
    flat = zero.Flat(0, torch.ones(2), {"step": 3}, [], [])
    view = SimpleNamespace(flats=lambda group: [flat], set_step=lambda group, step: None, write_copies=lambda: None)
    monkeypatch.setattr(zero, "view_of", lambda engine: view)
    zero.reset_group(SimpleNamespace(), 0)
    assert flat.state["step"] == 0
    assert type(flat.state["step"]) is int


@pytest.mark.parametrize("step", [3, torch.tensor(3)])
def test_a_step_count_in_the_group_is_reset_and_restored(step: Any):
    """FusedAdam starts from it, and needs a GPU: its parameter groups alone."""
    groups: list[dict[str, Any]] = [{"lr": 0.1, "step": step}, {"lr": 0.1, "step": 7}, {"lr": 0.1}]
    engine: Any = SimpleNamespace(optimizer=None, basic_optimizer=SimpleNamespace(param_groups=groups))
    view = zero.OptimizerView(engine)
    view.set_step(0, 0)
    view.set_step(2, 0)
    assert [int(group.get("step", -1)) for group in groups] == [0, 7, -1]
    view.set_step(0, 5)
    assert groups[0]["step"] == 5
    assert type(groups[0]["step"]) is type(step)
