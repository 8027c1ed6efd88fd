"""Every symbol of DeepSpeed that `mora_ds/engine` relies on (those for Muon apart); how they behave, runs tell.

When an upgrade breaks a test here, the message names the symbol: adapt mora_ds/engine, then this file.
"""

import inspect
from importlib import import_module
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch

from mora_ds.engine import zero

SYMBOLS = {
    "deepspeed": ["zero.GatheredParameters", "set_optimizer_flags"],
    "deepspeed.ops": ["__compatible_ops__"],
    "deepspeed.comm.comm": ["cdb"],
    "deepspeed.runtime.engine": ["DeepSpeedEngine.optimizer_name", "DeepSpeedEngine._muon_param_groups"],
    "deepspeed.runtime.zero.stage3": [
        "DeepSpeedZeroOptimizer_Stage3._apply_muon_to_accumulated_grads",
        "DeepSpeedZeroOptimizer_Stage3._get_norm_groups",
    ],
    "deepspeed.runtime.zero.stage_1_and_2": [
        "DeepSpeedZeroOptimizer._apply_muon_updates_cpu_offload", "DeepSpeedZeroOptimizer._is_muon_group",
        "DeepSpeedZeroOptimizer.get_flat_partition", "DeepSpeedZeroOptimizer.scaled_global_norm",
    ],
    "deepspeed.runtime.zero.muon.original_muon": [
        "muon_update", "zeropower_via_newtonschulz5", "zeropower_via_gram_newtonschulz", "ns_compute_dtype",
    ],
    "deepspeed.runtime.zero.muon.muon_optimizer": ["muon_update"],
}  # fmt: skip
"""Those that are not imported by name at the head of a module, where an ImportError tells."""
ENGINE_METHODS = (
    "zero_optimization", "zero_optimization_stage", "gradient_accumulation_steps", "get_global_grad_norm",
    "clip_fp32_gradients", "gradient_clipping", "backward", "step", "destroy",
)  # fmt: skip
PARTITIONS = {
    "deepspeed.runtime.zero.stage3": ("fp16_groups", "fp32_partitioned_groups_flat", "sub_group_to_group_id"),
    "deepspeed.runtime.zero.stage_1_and_2": ("bit16_groups", "single_partition_of_fp32_groups", "_hp_mapping"),
    "deepspeed.runtime.bf16_optimizer": ("bf16_groups", "fp32_groups_flat_partition", "_hp_mapping"),
    "deepspeed.runtime.engine": ("global_samples",),
}
"""What `zero` and `shards` read in each module; tests/checkpoint/test_elastic.py has how it behaves."""
STAGE3_METHODS = ("_get_param_partition_rank", "checkpoint_event_prologue", "checkpoint_event_epilogue")


def test_the_version_is_one_that_was_tried() -> None:
    assert version("deepspeed").startswith("0.19."), "setup.cfg pins the minor version: try the new one here first"


@pytest.mark.parametrize("module, name", [(module, name) for module, names in SYMBOLS.items() for name in names])
def test_symbols(module: str, name: str) -> None:
    value = import_module(module)
    for attribute in name.split("."):
        assert hasattr(value, attribute), f"{module}.{name} is gone"
        value = getattr(value, attribute)


def test_methods() -> None:
    for name in ENGINE_METHODS:
        assert callable(getattr(deepspeed.DeepSpeedEngine, name, None)), f"DeepSpeedEngine.{name} is gone"
    for name in STAGE3_METHODS:
        method = getattr(zero.DeepSpeedZeroOptimizer_Stage3, name, None)
        assert callable(method), f"DeepSpeedZeroOptimizer_Stage3.{name} is gone"


@pytest.mark.parametrize("module", PARTITIONS)
def test_names_that_partitions_are_found_by(module: str) -> None:
    source = inspect.getsource(import_module(module))
    for name in PARTITIONS[module]:
        assert name in source, f"{name} is gone from {module}: see engine/zero.py"


def test_the_switch_that_avoids_a_build_is_read() -> None:
    source = inspect.getsource(import_module("deepspeed.comm.torch").build_shm_op)
    assert "__compatible_ops__.get(builder.NAME" in source, "build_shm_op asks something else now"
    builder = import_module("deepspeed.ops.op_builder.cpu.comm").ShareMemCommBuilder
    assert builder.NAME == "deepspeed_shm_comm", "the switch in zero.prepare_backend has another name now"


@pytest.mark.parametrize("module, name", [("fused_adam", "FusedAdam"), ("cpu_adam", "DeepSpeedCPUAdam")])
def test_deepspeeds_adam_counts_steps_by_numbers_in_the_state(module: str, name: str) -> None:
    source = inspect.getsource(getattr(import_module(f"deepspeed.ops.adam.{module}"), name).step)
    assert "state['step'] += 1" in source, f"{name} keeps its step count elsewhere: see zero.reset_group"


def test_numbers_in_the_state_are_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own Adam has to be built: its state alone."""
    flat = zero.Flat(0, torch.ones(2), {"step": 3}, [], [])
    view = SimpleNamespace(flats=lambda group: [flat], set_step=lambda group, step: None)
    monkeypatch.setattr(zero, "view_of", lambda engine: view)
    zero.reset_group(SimpleNamespace(), 0, [])
    assert flat.state["step"] == 0
    assert type(flat.state["step"]) is int


@pytest.mark.parametrize("step", [3, torch.tensor(3)])
def test_a_step_count_in_the_group_is_reset_and_restored(step: Any) -> None:
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
