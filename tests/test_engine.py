"""What `start_distributed` and `initialize` settle before DeepSpeed's engine exists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from mora_ds.config import MoRAConfig
from mora_ds.engine import check_compute_dtype, initialize, parameter_groups, start_distributed
from mora_ds.errors import RunError, UserError
from mora_ds.injection import inject, mora_layers
from tests.gloo import run_ranks
from tests.models import tiny_model
from tests.test_zero import ds_config


def devices_chosen() -> list[Any]:
    chosen: list[Any] = []
    accelerator = get_accelerator()
    accelerator.set_device = chosen.append
    start_distributed()
    return chosen


@pytest.mark.gloo
def test_every_rank_takes_its_own_device_before_anything_is_placed() -> None:
    assert run_ranks(2, devices_chosen) == [[0], [1]]


@pytest.mark.parametrize(("section", "other"), [("fp16", "--bf16"), ("bf16", "--fp16")])
def test_a_dtype_that_the_device_lacks_is_refused(section: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = get_accelerator()
    for name in ("fp16", "bf16"):
        monkeypatch.setattr(accelerator, f"is_{name}_supported", lambda name=name: name != section)
    with pytest.raises(UserError, match=rf"--{section}.*use {other}"):
        check_compute_dtype({section: {"enabled": True}})
    check_compute_dtype({})


def test_a_process_without_a_launcher_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("mora_ds.engine.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"RANK.*write deepspeed in place of python"):
        start_distributed()


def different_base() -> str:
    model = tiny_model("llama", seed=dist.get_rank())
    inject(model, MoRAConfig(rank=4))
    try:
        initialize(model=model, config=ds_config(3, 2, 1))
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.gloo
def test_ranks_that_hold_other_bases_are_named() -> None:
    for message in run_ranks(3, different_base):
        assert "[1, 2]" in message and "--model_name_or_path" in message


def test_a_model_without_squares_is_refused() -> None:
    with pytest.raises(UserError, match=r"mora_ds\.inject"):
        initialize(model=tiny_model("llama"), config=ds_config(3, 2, 1))


def test_squares_have_a_parameter_group_of_their_own() -> None:
    model = tiny_model("llama")
    inject(model, MoRAConfig(rank=4, train_norms=True))
    squares, others = parameter_groups(model)
    assert {id(p) for p in squares["params"]} == {id(layer.square) for layer in mora_layers(model).values()}
    assert all(isinstance(p, torch.nn.Parameter) and p.dim() == 1 for p in others["params"])
