"""`mora_ds.initialize`: a model with MoRA matrices -> a DeepSpeed engine whose base is
unsharded on every process.

move and cast the base (once per tied tensor) -> compare it between the processes -> MoRA
matrices in parameter group 0, other trained parameters in group 1 -> deepspeed.initialize
-> repair DeepSpeed's faults
"""

import hashlib
import logging
import os
import sys
from collections.abc import Collection, Iterable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout
from torch import Tensor, nn

from mora_ds.adapters.inject import (
    config_of,
    frozen_buffers,
    is_compiled,
    mora_layers,
    move_base,
)
from mora_ds.adapters.quantized import base_bits_of
from mora_ds.adapters.registry import Capability, adapter_type, require
from mora_ds.common.errors import RunError, UserError, whole_number
from mora_ds.common.tensor_files import tensor_checksum
from mora_ds.engine import muon, zero
from mora_ds.engine.device import check_kernels, current_device, is_cpu, take_device
from mora_ds.engine.ds_config import (
    avoid_slices,
    complete_ds_config,
    compute_dtype,
)
from mora_ds.engine.ds_keys import DsConfig
from mora_ds.engine.ds_optimizer import uses_muon
from mora_ds.engine.launcher import accelerators, set_single_process_env
from mora_ds.engine.layer_prefetcher import names_on_host, stream_base
from mora_ds.engine.module_hooks import remove_unused_hooks
from mora_ds.engine.node_base import share_base
from mora_ds.engine.zero import view_of
from mora_ds.parallel.limits import check_tensor_parallel
from mora_ds.parallel.tensor_parallel import split_model
from mora_ds.parallel.topology import Topology
from mora_ds.runtime.launchers import NEEDED, adopt
from mora_ds.runtime.ranks import Ranks
from mora_ds.runtime.rendezvous import meet, taken_port

logger = logging.getLogger(__name__)

STARTED = "_mora_started"
"""Attribute of a model that an engine holds."""


def start_distributed(timeout_s: float | None = None) -> None:
    """Start `torch.distributed` the way the engine needs it, unless it runs already.

    `timeout_s`: of collectives. Raises `UserError` in a process that no launcher has
    started, where the port by which ranks find each other is in use (`taken_port`), and
    as `take_device` and `check_kernels` do; `RunError` as `meet` does.
    """
    if not dist.is_initialized():
        _require_launcher()
    zero.prepare_backend()
    share_cores()
    # DeepSpeed's engine picks the same device, but too late for the base and for NCCL
    take_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        timeout = default_pg_timeout
        if timeout_s is not None:
            timeout = timedelta(seconds=timeout_s)
        if os.environ.get("WORLD_SIZE") == "1":
            _start_alone(timeout)
        try:
            store = meet(timeout)
            deepspeed.init_distributed(verbose=False, timeout=timeout)
            del store  # now torch's
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise taken_port() from error
    # Last, as a rank that lacks a compiler must be there to tell the others so
    check_kernels()


def initialize(
    *,
    model: nn.Module,
    config: DsConfig | str | Path,
    tensor_parallel_size: int = 1,
    base_on_host: bool = False,
    **kwargs: Any,
) -> tuple[zero.Engine, Any, Any, Any]:
    """`deepspeed.initialize` for a model that `mora_ds.inject` prepared.

    `config` is a DeepSpeed config (dict or path). "auto" there becomes: the model's
    dtype for `bf16` and `fp16`, sizes that fit the MoRA matrices for ZeRO's buckets, 1
    for the micro-batch, and otherwise the default of DeepSpeed or torch. A process that
    no launcher has started is the only one, where the machine has at most one GPU.

    The base is moved to this process's device in the config's dtype and compared
    between all processes by checksum. With `tensor_parallel_size` t, t
    consecutive ranks share the work of one, and must be given the same batch
    (`parallel/tensor_parallel.py`). With `base_on_host` the decoder layers' frozen
    weights stay in host memory, and the device holds those of two layers at a time
    (`engine/layer_prefetcher.py`). Raises `UserError` for a model without adapter, and
    `RunError` when the processes hold different bases.
    """
    # Refuses a model without an adapter
    config_of(model)
    if is_compiled(model):
        raise UserError(
            "initialize: `model` is compiled: merges change what was compiled; give the model itself"
        )
    degree = whole_number(tensor_parallel_size, 1, "initialize: `tensor_parallel_size`")
    if hasattr(model, STARTED):
        raise UserError(
            "initialize: `model` has an engine already, which holds its MoRA matrices: use that one, or load and "
            "inject the model again"
        )
    if "model_parameters" in kwargs:
        raise UserError(
            "mora_ds.initialize chooses the trainable parameters itself: leave model_parameters out"
        )
    numels = trainable_numels(model, degree)
    settings = complete_ds_config(config, numels, next(model.parameters()).dtype)
    check_compute_dtype(settings)
    _check_muon(model, settings)
    check_splittable(
        settings, degree, base_bits=base_bits_of(model), base_on_host=base_on_host
    )
    start_distributed()
    if chosen := avoid_slices(settings, numels, dist.get_world_size() // degree):
        logger.info(chosen)
    if degree > 1:
        topology = Topology.of(degree)
        split_model(model, topology)
        kwargs["mpu"] = topology.mpu
    on_host = names_on_host(model) if base_on_host else ()
    device = move_here(model, compute_dtype(settings), on_host)
    check_base_equal(frozen_buffers(model).values())
    if is_cpu() or base_on_host:
        share_base(model, Ranks.current())
    parameters = parameter_groups(model)
    is_muon = uses_muon(settings)
    # DeepSpeed moves the module to the device, with its buffers (engine.py,
    # `_configure_distributed_model`)
    aside = stream_base(model, device).device_bound() if base_on_host else nullcontext()
    has_factors = adapter_type(config_of(model).adapter).has_factors
    tagged = (
        muon.muon_groups(mora_layers(model).values(), has_factors)
        if is_muon
        else nullcontext()
    )
    with aside, tagged:
        returned = _deepspeed_engine(
            model=model, config=settings, model_parameters=parameters, **kwargs
        )
    setattr(model, STARTED, True)
    if is_muon:
        muon.repair_clipping(returned[0])
    if zero.is_stage3(returned[0]):
        remove_unused_hooks(returned[0])
    return returned


def move_here(
    model: nn.Module, dtype: torch.dtype, on_host: Collection[str] = ()
) -> torch.device:
    """Moves and casts the base, as `move_base` does, and the trained parameters to this
    process's device, which is returned."""
    device = current_device()
    move_base(model, device, dtype, on_host)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    return device


def initialize_full(*, model: nn.Module, config: DsConfig) -> tuple[Any, ...]:
    """Full training by AdamW, as a control: every parameter is trained under plain
    DeepSpeed, sharded like any model."""
    parameters = list(model.parameters())
    numels = [parameter.numel() for parameter in parameters]
    settings = complete_ds_config(config, numels, parameters[0].dtype)
    start_distributed()
    model.to(current_device(), compute_dtype(settings))
    return _deepspeed_engine(model=model, config=settings, model_parameters=parameters)


def _deepspeed_engine(**arguments: Any) -> tuple[Any, ...]:
    """`deepspeed.initialize`, with what it leaves undone."""
    muon.load_kernels()
    returned = deepspeed.initialize(**arguments)
    view_of(returned[0]).repair()
    return returned


def check_compute_dtype(config: DsConfig) -> None:
    """Raises `UserError` if this device does not compute in the config's dtype
    (deepspeed engine.py, `_do_sanity_check`, which comes after the base is loaded)."""
    device = get_accelerator()
    for dtype, flag, instead, is_supported in (
        (torch.float16, "--fp16", "--bf16", device.is_fp16_supported),
        (torch.bfloat16, "--bf16", "--fp16", device.is_bf16_supported),
    ):
        if compute_dtype(config) == dtype and not is_supported():
            raise UserError(
                f"{flag}: this device ({device.device_name()}) does not support it; use {instead}, or fp32"
            )


def _check_muon(model: nn.Module, config: DsConfig) -> None:
    """Raises `UserError` for what Muon cannot train: it is for single matrices."""
    if not uses_muon(config):
        return
    adapter = adapter_type(config_of(model).adapter)
    require(adapter.name, Capability.MUON, '"optimizer": "Muon" of `config`')
    for name, layer in mora_layers(model).items():
        if len(layer.spec.weight_shape) > 2:
            raise UserError(
                f"Muon is for single MoRA matrices, and {name} has a stack of them: use AdamW"
            )
    if adapter.has_factors:
        muon.check_factors(config)


def trainable_numels(model: nn.Module, tensor_parallel_size: int = 1) -> list[int]:
    """Elements of every trainable parameter; of a MoRA matrix those of the largest
    share in a tensor-parallel group, so that all processes choose the same bucket
    sizes."""
    values = {id(layer.adapter_weight) for layer in mora_layers(model).values()}
    numels = []
    for parameter in model.parameters():
        numel = parameter.numel()
        if id(parameter) in values and numel:
            rows = len(parameter)
            numel = numel // rows * -(-rows // tensor_parallel_size)
        numels.append(numel)
    return numels


def check_splittable(
    config: DsConfig,
    degree: int,
    base_bits: int | None = None,
    base_on_host: bool = False,
) -> None:
    """Raises `UserError` for a config that tensor parallelism does not go with."""
    stage = config["zero_optimization"]["stage"]
    check_tensor_parallel(
        degree,
        zero_stage=stage,
        muon=uses_muon(config),
        base_bits=base_bits,
        streams_base=base_on_host,
    )


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """MoRA matrices in group 0, the other trained parameters in group 1, with the
    matrices of domains, which no merge resets.

    With Muon, DeepSpeed splits each group into a half for Muon and one for AdamW
    (engine.py, `_muon_param_groups`): all MoRA matrices get Muon and all others AdamW,
    so neither group is split.
    """
    mora_matrices = {
        id(layer.adapter_weight): layer.adapter_weight
        for layer in mora_layers(model).values()
    }
    remaining = [
        weight for weight in model.parameters() if id(weight) not in mora_matrices
    ]
    groups = [{"params": list(mora_matrices.values())}, {"params": remaining}]
    return [group for group in groups if group["params"]]


def check_base_equal(tensors: Iterable[Tensor]) -> None:
    """Raises `RunError` where the base differs between processes. Collective."""
    facts = [
        (tuple(tensor.shape), tensor.dtype, tensor_checksum(tensor))
        for tensor in tensors
    ]
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()
    digests = Ranks.current().gather("the frozen base of every rank", digest)
    if different := [
        rank for rank, of_rank in enumerate(digests) if of_rank != digests[0]
    ]:
        raise RunError(
            f"the frozen base differs between ranks: ranks {different} have another one than rank 0. "
            "Do all nodes read the same files at --model_name_or_path?"
        )


def _require_launcher() -> None:
    """Make a process that no launcher has started the only rank, where the machine has
    at most one GPU. DeepSpeed would take a process without them for one of MPI."""
    adopt()
    missing = [name for name in NEEDED if name not in os.environ]
    if len(missing) == len(NEEDED) and accelerators() <= 1:
        set_single_process_env()
    elif missing:
        raise UserError(
            f"no launcher has started this process ({', '.join(missing)} not set): "
            "write deepspeed in place of python, or use torchrun, srun or mpirun"
        )


def _start_alone(timeout: timedelta) -> None:
    """Start the group of a run of one process, which no other machine can reach: the
    store is in memory, and gloo and NCCL listen on the loopback interface.

    DeepSpeed takes a group that is there (comm/comm.py, `init_distributed`).
    """
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    backend = get_accelerator().communication_backend_name()
    dist.init_process_group(
        backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
    )


def share_cores() -> None:
    """On a CPU, give each process its share of the cores, unless OMP_NUM_THREADS is
    set.

    By default every process starts a thread a core, and they compete (measured: with 2
    processes on 2 cores, a step of 0.2 s took 4 s).
    """
    if not is_cpu() or "OMP_NUM_THREADS" in os.environ:
        return
    local_ranks = (
        os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1
    )
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // int(local_ranks)))
