"""Every symbol of DeepSpeed that `mora_ds/engine` relies on (those for Muon apart), and how it behaves.

When an upgrade breaks a test here, the message names the symbol: adapt mora_ds/engine, then this file.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from mora_ds.engine import optimizer_view, zero
from mora_ds.engine.traffic import CollectiveCounter
from mora_ds.remora.optimizer_reset import zero as zero_state
from tests.helpers.engines import new_engine, one_step
from tests.helpers.gloo import run_ranks

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
    "deepspeed.runtime.fp16.unfused_optimizer": ("fp16_groups", "fp32_groups", "loss_scale_config"),
    "deepspeed.runtime.engine": ("global_samples",),
}
"""What `optimizer_view` and `shard_writer` read in each module; tests/checkpoint/test_elastic.py has how it behaves."""
STAGE3_METHODS = ("_get_param_partition_rank", "checkpoint_event_prologue", "checkpoint_event_epilogue")


def test_the_version_is_one_that_was_tried() -> None:
    assert version("deepspeed").startswith("0.19."), "setup.cfg pins the minor version: try the new one here first"


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in SYMBOLS.items() for name in names])
def test_symbols(module: str, name: str) -> None:
    value = import_module(module)
    for part in name.split("."):
        assert hasattr(value, part), f"{module}.{name} is gone"
        value = getattr(value, part)


def test_methods() -> None:
    for name in ENGINE_METHODS:
        assert callable(getattr(deepspeed.DeepSpeedEngine, name, None)), f"DeepSpeedEngine.{name} is gone"
    for name in STAGE3_METHODS:
        method = getattr(optimizer_view.DeepSpeedZeroOptimizer_Stage3, name, None)
        assert callable(method), f"DeepSpeedZeroOptimizer_Stage3.{name} is gone"


@pytest.mark.parametrize("module", PARTITIONS)
def test_names_that_partitions_are_found_by(module: str) -> None:
    source = inspect.getsource(import_module(module))
    for name in PARTITIONS[module]:
        assert name in source, f"{name} is gone from {module}: see engine/optimizer_view.py"


def test_the_switch_that_avoids_a_build_is_read() -> None:
    source = inspect.getsource(import_module("deepspeed.comm.torch").build_shm_op)
    assert "__compatible_ops__.get(builder.NAME" in source, "build_shm_op asks something else now"
    builder = import_module("deepspeed.ops.op_builder.cpu.comm").ShareMemCommBuilder
    assert builder.NAME == "deepspeed_shm_comm", "the switch in zero.prepare_backend has another name now"


def test_fused_adam_counts_steps_in_the_group() -> None:
    source = inspect.getsource(import_module("deepspeed.ops.adam.fused_adam").FusedAdam.step)
    assert "group['step']" in source, "FusedAdam keeps its step count elsewhere: see OptimizerView.reset_step"


@pytest.mark.parametrize("step", [3, torch.tensor(3)])
def test_a_step_count_in_the_group_is_reset_and_restored(step: Any) -> None:
    """FusedAdam needs a GPU: its parameter groups alone."""
    groups: list[dict[str, Any]] = [{"lr": 0.1, "step": step}, {"lr": 0.1, "step": 7}, {"lr": 0.1}]
    engine: Any = SimpleNamespace(optimizer=None, basic_optimizer=SimpleNamespace(param_groups=groups))
    view = optimizer_view.OptimizerView(engine)
    view.reset_step(0, zero_state)
    view.reset_step(2, zero_state)
    assert [int(group.get("step", -1)) for group in groups] == [0, 7, -1]
    view.set_step(0, 5)
    assert groups[0]["step"] == 5 and type(groups[0]["step"]) is type(step)


def test_only_zero_optimizers_get_a_scaled_loss() -> None:
    base = import_module("deepspeed.runtime.base_optimizer").ZeROOptimizer
    assert issubclass(optimizer_view.DeepSpeedZeroOptimizer, base) and issubclass(optimizer_view.BF16_Optimizer, base)
    for optimizer in (optimizer_view.FP16_Optimizer, optimizer_view.FP16_UnfusedOptimizer):
        assert not issubclass(optimizer, base), f"{optimizer.__name__} may scale its loss now: see _HalfView.repair"


# -- behaviour, on two ranks -------------------------------------------------------------------------------------------


def stage3_attributes() -> list[str]:
    engine = new_engine(3, "bfloat16", stage3_param_persistence_threshold=0)
    one_step(engine)
    parameter, optimizer = engine.module.first, engine.optimizer
    facts = {
        "param.ds_tensor": hasattr(parameter, "ds_tensor"),
        "param.ds_shape": tuple(parameter.ds_shape) == (5, 5),
        "param.ds_numel": parameter.ds_numel == 25,
        "param.data is empty while partitioned": parameter.data.numel() == 0,
        "ds_tensor in the compute dtype": parameter.ds_tensor.dtype is torch.bfloat16,
        "shards padded to equal sizes": parameter.ds_tensor.numel() == 13,
        "fp32_partitioned_groups_flat": all(t.dtype is torch.float32 for t in optimizer.fp32_partitioned_groups_flat),
        "sub_group_to_group_id": sorted(set(optimizer.sub_group_to_group_id.values())) == [0, 1],
        "one group's sub-groups hold no other's": len(optimizer.fp32_partitioned_groups_flat) == 2,
        "state is keyed by the master": optimizer.fp32_partitioned_groups_flat[0] in optimizer.optimizer.state,
        "engine.optimizer.param_groups": len(optimizer.param_groups) == 2,
        "engine.basic_optimizer": engine.basic_optimizer is optimizer.optimizer,
        "F.linear is torch's own": F.linear.__module__ in (None, "torch._C._nn"),
    }
    return [name for name, holds in facts.items() if not holds]


def counting() -> list[str]:
    engine = new_engine(3, "float32", accumulation=3)
    x = torch.ones(2, 5)
    boundaries, reals = [], []
    for _ in range(6):
        engine.backward(engine(x))
        engine.step()
        boundaries.append(engine.is_gradient_accumulation_boundary())
        reals.append(zero.at_accumulation_boundary(engine))
    facts = {
        "engine.micro_steps counts backwards": engine.micro_steps == 6,
        "micro_steps tells a real step": reals == [False, False, True, False, False, True],
        "is_gradient_accumulation_boundary looks ahead": boundaries == [False, True, False, False, True, False],
    }
    return [name for name, holds in facts.items() if not holds]


def collectives() -> list[str]:
    """Methods of the backend object can be wrapped on it and unwrapped again; stage 3 goes through them."""
    backend = deepspeed.comm.comm.cdb
    engine = new_engine(3, "float32", stage3_param_persistence_threshold=0)
    counter = CollectiveCounter()
    with counter.counting():
        one_step(engine)
    facts = {
        "cdb is a backend": all(hasattr(backend, kind) for kind in ("all_reduce", "broadcast", "all_gather")),
        "no wrapper is left on cdb": not any(kind in vars(backend) for kind in (*counter._GATHERS, *counter._OTHERS)),
        "gathers pass through cdb": counter.gathered_bytes in (4 * (26 + 8), 2 * 4 * (26 + 8)),
        "reductions pass through cdb": sum(counter.bytes.values()) > counter.gathered_bytes,
    }
    return [name for name, holds in facts.items() if not holds]


def stage_0_faults() -> list[str]:
    """The faults that `OptimizerView.repair` makes up for. A name in the result is a fault gone: drop its repair."""
    half, full = new_engine(0, "float16"), new_engine(0, "float32")
    steps = {float(value) for key, value in zero.state_tensors(half, 0) if key == "step"}
    half.backward(half(torch.ones(2, 5, dtype=torch.float16)))
    full.backward(full(torch.ones(2, 5)))
    ratio = (half.module.first.grad.float().norm() / full.module.first.grad.norm()).item()
    full.step()
    facts = {
        "FP16_UnfusedOptimizer starts at step 1": steps == {1.0},
        "engine.backward does not scale": 0.9 < ratio < 1.1,
        "the norm of clip_fp32_gradients is thrown away": full.get_global_grad_norm() is None,
    }
    return [name for name, holds in facts.items() if not holds]


def safe_getters() -> list[str]:
    plain, sharded = new_engine(0, "float32"), new_engine(3, "float32")
    sharded.backward(sharded(torch.ones(2, 5)))
    grad = safe_get_full_grad(sharded.module.first)
    facts = {
        "safe_get_full_fp32_param is None without ZeRO": safe_get_full_fp32_param(plain.module.first) is None,
        "safe_get_full_fp32_param gathers": safe_get_full_fp32_param(sharded.module.first).numel() == 25,
        "safe_get_full_grad gathers": grad is not None and grad.numel() == 25,
    }
    return [name for name, holds in facts.items() if not holds]


CHECKS = (stage3_attributes, counting, collectives, stage_0_faults, safe_getters)


def everything() -> dict[str, list[str]]:
    return {check.__name__: check() for check in CHECKS}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, list[str]]]:
    return run_ranks(2, everything)


@pytest.mark.gloo
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_attributes_and_behaviour(check: str, ranks: Any) -> None:
    for rank in ranks:
        assert rank[check] == [], f"no longer so in DeepSpeed {version('deepspeed')}: {rank[check]}"
