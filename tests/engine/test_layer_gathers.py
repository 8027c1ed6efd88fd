"""Which forward finds a layer's matrices there, and which are freed without DeepSpeed's
help: one process, stand-ins.

What is gathered when, and equal numbers, in several processes: test_module_hooks.py.
"""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from mora_ds.engine import module_hooks
from mora_ds.engine.module_hooks import LayerGathers, free_quickly
from tests.helpers.tables import each_row, parsed


class Coordinator:
    def __init__(self):
        self.calls = []

    def trace_prologue(self, module):
        self.calls.append("trace")

    def is_record_trace(self):
        return False

    def fetch_sub_module(self, module, forward):
        self.calls.append(("fetch", forward))

    def release_sub_module(self, module, forward):
        self.calls.append(("release", forward))


@pytest.mark.parametrize(
    "in_backward, active, is_fetched",
    [(True, {7}, False), (True, set(), True), (False, {7}, True)],
)
def test_a_forward_that_runs_again_finds_its_matrices_there(
    in_backward, active, is_fetched, monkeypatch
):
    """Within the backward pass of its own layer, which has fetched them."""
    monkeypatch.setattr(
        torch._C, "_current_graph_task_id", lambda: 0 if in_backward else -1
    )
    coordinator = Coordinator()
    layer = nn.Linear(3, 3)
    layer.ds_id = 7
    LayerGathers(
        coordinator,
        layer,
        [SimpleNamespace(ds_active_sub_modules=active), SimpleNamespace()],
    )
    layer(torch.ones(2, 3))
    fetched = ["trace", ("fetch", True), ("release", True)]
    assert coordinator.calls == (fetched if is_fetched else [])


FREED = """
AVAILABLE | {} | quickly
AVAILABLE | {free_data: true} | quickly
NOT_AVAILABLE | {} | by DeepSpeed
AVAILABLE | {param_list: [x]} | by DeepSpeed
AVAILABLE | {has_been_updated: true} | by DeepSpeed
AVAILABLE | {free_data: false} | by DeepSpeed
"""


@each_row("status, options, how", FREED)
def test_what_is_gathered_and_unchanged_is_freed_at_once(
    status, options, how, monkeypatch
):
    kwargs = parsed(options)
    is_quick = how == "quickly"
    freed = []
    partitioned = []
    monkeypatch.setattr(module_hooks, "free_param", freed.append)
    parameter = SimpleNamespace(
        ds_status=ZeroParamStatus[status],
        partition=lambda **arguments: partitioned.append(arguments),
    )
    free_quickly(parameter)
    parameter.partition(**kwargs)
    assert freed == ([parameter] if is_quick else [])
    assert partitioned == ([] if is_quick else [kwargs])
    assert parameter.ds_status.name == ("NOT_AVAILABLE" if is_quick else status)
