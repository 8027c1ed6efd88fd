"""What mora_ds/engine/muon.py relies on in DeepSpeed, and the faults that it repairs.

A fault that is gone is a failure too: drop the repair then.
"""

import inspect
import re
from importlib import import_module

import deepspeed
import pytest
import torch
from torch import nn

from mora_ds.engine import muon, zero
from tests.helpers.gloo import run_ranks

KERNELS = "deepspeed.runtime.zero.muon.original_muon"


def test_kernels_are_compiled_unless_unwrapped():
    kernels = import_module(KERNELS)
    assert inspect.getsource(kernels).count("@compiler.compile()") == 3
    muon.load_kernels()
    names = "muon_update zeropower_via_newtonschulz5 zeropower_via_gram_newtonschulz"
    for name in names.split():
        assert not hasattr(getattr(kernels, name), "_torchdynamo_orig_callable"), name


def test_the_number_of_heads_reaches_the_function_that_is_replaced():
    kernels = import_module(KERNELS)
    call = "return _per_head_orthogonalize(update, num_heads, ns_steps, ns_method)"
    assert call in inspect.getsource(kernels)
    heads = r"num_heads=getattr\((param|tensor), .muon_num_heads., None\)"
    for optimizer in (zero.DeepSpeedZeroOptimizer_Stage3, zero.DeepSpeedZeroOptimizer):
        assert len(re.findall(heads, inspect.getsource(optimizer))) == 2
    assert "num_heads" not in inspect.getsource(zero.BF16_Optimizer), (
        "see muon.check_factors: is it passed on now?"
    )


def test_heads_of_an_attention_are_not_taken_for_columns():
    """`load_kernels` replaces the function for every engine of the process."""
    muon.load_kernels()
    per_head = import_module(KERNELS)._per_head_orthogonalize
    with pytest.raises(RuntimeError, match="Muon per attention head"):
        per_head(torch.randn(8, 4), 4, 5, "standard")


# -- behavior, on two ranks ------------------------------------------------------------


class Small(nn.Module):
    """A matrix that two processes cannot share evenly, and another parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mora_matrix = nn.Parameter(torch.randn(5, 5))
        self.other = nn.Parameter(torch.randn(5))

    def forward(self, x):
        return ((x @ self.mora_matrix).sin() * self.other).square().mean()


def plain_engine(stage, **zero_settings):
    """DeepSpeed's own behavior, without compilation."""
    muon.load_kernels()
    model = Small()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.01,
        "zero_optimization": {
            "stage": stage,
            "reduce_scatter": False,
            "memory_efficient_linear": False,
            **zero_settings,
        },
        "optimizer": {
            "type": "Muon",
            "params": {"lr": 0.1, "weight_decay": 0.0, "torch_adam": True},
        },
        "steps_per_print": 10**9,
    }
    groups = [{"params": [model.mora_matrix]}, {"params": [model.other]}]
    return deepspeed.initialize(model=model, config=config, model_parameters=groups)[0]


def one_step(engine):
    engine.backward(engine(torch.linspace(-1, 1, 20).view(4, 5)))
    engine.step()


def moved(stage):
    """Norm of the first update of the matrix in learning rates: about sqrt(5) if it is
    orthogonal.
    """
    engine = plain_engine(stage)
    before = zero.full_fp32(engine.module.mora_matrix).clone()
    one_step(engine)
    return ((zero.full_fp32(engine.module.mora_matrix) - before).norm() / 0.1).item()


def everything(folder):
    clipped = {stage: moved(stage) for stage in (1, 2, 3)}
    engine, resumed = (
        plain_engine(3, save_muon_momentum_buffer_in_memory=True) for _ in range(2)
    )
    one_step(engine)
    engine.save_checkpoint(folder)
    resumed.load_checkpoint(folder)
    for one in (engine, resumed):
        one_step(one)
    same = torch.equal(
        *(zero.full_fp32(one.module.mora_matrix) for one in (engine, resumed))
    )
    return {
        "clipped": clipped,
        "buffer resumed": same,
        "tags": [g["use_muon"] for g in engine.optimizer.param_groups],
    }


def test_the_faults_are_still_there(tmp_path):
    for faults in run_ranks(2, everything, str(tmp_path)):
        for stage, norm in faults["clipped"].items():
            assert 0.009 < norm <= 0.01, (
                f"stage {stage}: the gradient is clipped now? See muon.repair_clipping"
            )
        assert not faults["buffer resumed"], (
            "save_muon_momentum_buffer_in_memory can be allowed now"
        )
        assert faults["tags"] == [True, False]
