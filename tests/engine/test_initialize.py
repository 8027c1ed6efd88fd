"""What `start_distributed` and `initialize` settle before DeepSpeed's engine exists."""

import os
import socket
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import frozen_buffers, inject, mora_layers
from mora_ds.common.errors import UserError
from mora_ds.engine import initialize as start
from mora_ds.engine.initialize import (
    check_compute_dtype,
    check_splittable,
    initialize,
    parameter_groups,
    start_distributed,
    trainable_numels,
)
from mora_ds.models.load import load_base
from mora_ds.runtime.ranks import Ranks
from tests.helpers.engines import ds_config
from tests.helpers.errors import run_error, user_error
from tests.helpers.gloo import run_ranks
from tests.helpers.models import model_with_mora, tiny_model
from tests.helpers.pool import run_pooled
from tests.helpers.tables import each_row, parsed


def devices_chosen():
    chosen = []
    accelerator = get_accelerator()
    accelerator.set_device = chosen.append
    start_distributed()
    return chosen


def test_every_rank_takes_its_own_device_before_anything_is_placed():
    assert run_ranks(2, devices_chosen) == [[0], [1]]


@pytest.mark.parametrize("section, instead", [("fp16", "--bf16"), ("bf16", "--fp16")])
def test_a_dtype_that_the_device_lacks_is_refused(section, instead, monkeypatch):
    accelerator = get_accelerator()
    for name in ("fp16", "bf16"):
        monkeypatch.setattr(
            accelerator, f"is_{name}_supported", lambda name=name: name != section
        )
    with user_error(rf"--{section}.*use {instead}"):
        check_compute_dtype({section: {"enabled": True}})
    check_compute_dtype({})


@pytest.fixture
def launched(monkeypatch):
    """A function that makes this process rank `rank` of some by a launcher's variables, or
    one of no launcher.
    """

    def launched(rank=None, world=1, port=1):
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for name, value in variables.items():
            if rank is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(value))

    # `start_distributed` sets what a launcher has not
    with mock.patch.dict(os.environ):
        yield launched


def test_a_process_without_a_launcher_is_refused_next_to_unused_gpus(
    monkeypatch, launched
):
    """Without any launcher and GPUs it is the only rank, as in tests/test_readme.py."""
    launched()
    monkeypatch.setattr(start, "accelerators", lambda: 2)
    with user_error(r"RANK.*write deepspeed in place of python"):
        start_distributed()


def test_what_mpirun_does_not_tell_is_asked_for_even_with_mpi4py(monkeypatch, launched):
    """DeepSpeed would let the process in and ask mpi4py: every rank would have taken itself
    for rank 0 until then, and mpirun would miss its MPI_Finalize.
    """
    launched()
    for name in ("RANK", "SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", ModuleType("mpi4py"))
    with user_error(r"MASTER_ADDR not"):
        start_distributed()


def test_a_port_that_is_in_use_is_named(monkeypatch, launched):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        launched(0, world=2, port=port)
        monkeypatch.setenv("CROSS_RANK", "0")
        with user_error(
            f"port {port} of this machine.*process {os.getpid()}.*another port with --master_port"
        ):
            start_distributed()


def test_a_missing_compiler_on_one_rank_fails_all_ranks(monkeypatch, launched):
    """On one node of several: the others would wait for it to join until
    --collective_timeout_s.
    """
    joined = []

    def refused():
        raise UserError("install gcc")

    launched(1, world=2)
    monkeypatch.setattr(dist, "is_initialized", lambda: bool(joined))
    monkeypatch.setattr(
        "deepspeed.init_distributed", lambda **arguments: joined.append(True)
    )
    monkeypatch.setattr(start, "meet", lambda timeout: None)
    monkeypatch.setattr(start, "check_kernels", refused)
    monkeypatch.setattr(start, "take_device", lambda local_rank: None)
    with user_error("install gcc"):
        start_distributed()
    assert joined


def different_base():
    model = tiny_model("llama", seed=max(0, dist.get_rank() - 1))
    inject(model, MoRAConfig(rank=4))
    with run_error(r"ranks \[2\] have another one than rank 0.*--model_name_or_path"):
        initialize(model=model, config=ds_config(3, 2, 1))


def test_ranks_that_hold_other_bases_are_named():
    run_pooled(3, different_base)


def tensors_of_the_node(folder):
    """(tensors of the live base whose memory is the node's, all of them)"""
    path = Path(folder)
    model = load_base(path, path / "own", Ranks.current(), torch.bfloat16, None).model
    inject(model, MoRAConfig(rank=4))
    initialize(model=model, config={**ds_config(3, 2, 1), "bf16": {"enabled": True}})
    lines = [
        line.split()
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "mora_ds-base" in line
    ]
    mapped = [range(*(int(end, 16) for end in line[0].split("-"))) for line in lines]
    base = frozen_buffers(model).values()
    return sum(
        any(tensor.data_ptr() in address_range for address_range in mapped)
        for tensor in base
    ), len(base)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_ranks_of_a_node_share_the_pages_of_the_base(tmp_path):
    """No rank has a copy of the frozen base."""
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    for mapped, tensors in run_pooled(2, tensors_of_the_node, str(tmp_path)):
        assert mapped == tensors > 10


def test_wrong_arguments_of_initialize_are_refused():
    model = tiny_model("llama")
    experts = tiny_model("mixtral")
    inject(model, MoRAConfig(rank=4))
    inject(experts, MoRAConfig(rank=4, target_modules=("all-linear", "experts")))
    with user_error("leave model_parameters out"):
        initialize(
            model=model,
            config=ds_config(3, 2, 1),
            model_parameters=list(model.parameters()),
        )
    muon = {"type": "Muon", "params": {"lr": 0.1, "muon_lr": 0.1, "weight_decay": 0.0}}
    with user_error(r"Muon is for single MoRA matrices, and model\.layers.*use AdamW"):
        initialize(model=experts, config=ds_config(3, 2, 1, optimizer=muon))


THREADS = """
{LOCAL_WORLD_SIZE: "4"} | 3
{LOCAL_SIZE: "6"} | 2
{LOCAL_WORLD_SIZE: "40"} | 1
{} | 12
"""
"""What a launcher sets | the threads of a process, of 12 cores."""


@each_row("environment, threads", THREADS)
def test_processes_of_a_machine_share_its_cores(monkeypatch, environment, threads):
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in parsed(environment).items():
        monkeypatch.setenv(name, value)
    chosen = []
    monkeypatch.setattr(start.os, "sched_getaffinity", lambda process: range(12))
    monkeypatch.setattr(start.torch, "set_num_threads", chosen.append)
    start.share_cores()
    assert chosen == [int(threads)]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    start.share_cores()
    monkeypatch.delenv("OMP_NUM_THREADS")
    # On a GPU the host's threads are torch's affair
    monkeypatch.setattr(start, "is_cpu", lambda: False)
    start.share_cores()
    assert len(chosen) == 1


def test_bucket_sizes_are_those_of_the_largest_share():
    model = model_with_mora(operator="share", train_norms=True)
    sides = [layer.adapter_weight.shape[0] for layer in mora_layers(model).values()]
    norms = [
        parameter.numel() for parameter in model.parameters() if parameter.dim() == 1
    ]
    assert any(side % 3 for side in sides)
    for degree in (1, 2, 3):
        shares = [-(-side // degree) * side for side in sides]
        assert sorted(trainable_numels(model, degree)) == sorted([*norms, *shares])


def test_tensor_parallelism_needs_stage_3():
    config = {"zero_optimization": {"stage": 2}}
    check_splittable(config, degree=1)
    with user_error("--tensor_parallel_size 2 needs ZeRO stage 3"):
        check_splittable(config, degree=2)


def test_mora_matrices_have_their_own_parameter_group():
    model = model_with_mora(train_norms=True)
    mora_matrices, remaining = parameter_groups(model)
    assert {id(p) for p in mora_matrices["params"]} == {
        id(layer.mora_matrix) for layer in mora_layers(model).values()
    }
    assert all(
        isinstance(p, torch.nn.Parameter) and p.dim() == 1 for p in remaining["params"]
    )
