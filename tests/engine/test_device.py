"""What a run sets up for its device."""

import os
from types import SimpleNamespace

import pytest
import torch

from mora_ds.engine import device
from mora_ds.engine.device import (
    DETERMINISTIC,
    check_kernels,
    take_device,
    warn_of_slow_precision,
)
from mora_ds.engine.ds_config import complete_ds_config
from tests.helpers.errors import user_error
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import job, losses, run
from tests.helpers.tables import parsed


def deterministic_job(argv):
    os.environ["NCCL_ALGO"] = "Tree"
    job(argv)
    return torch.are_deterministic_algorithms_enabled(), {
        name: os.environ.get(name) for name in DETERMINISTIC
    }


def test_a_deterministic_run_is_set_up_and_computes_the_same(user, tmp_path):
    results = run_ranks(
        2, deterministic_job, user.flags(tmp_path / "one", "--deterministic true")
    )
    for enabled, environment in results:
        assert enabled
        assert environment == {**DETERMINISTIC, "NCCL_ALGO": "Tree"}, (
            "what the user has set stays"
        )
    run(2, user.flags(tmp_path / "other"))
    assert torch.equal(losses(tmp_path / "one"), losses(tmp_path / "other"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_fp32_on_a_gpu_is_warned_of(monkeypatch):
    said = []
    monkeypatch.setattr(device.logger, "warning", said.append)
    warn_of_slow_precision(torch.float32)
    monkeypatch.setattr(device, "is_cpu", lambda: False)
    warn_of_slow_precision(torch.bfloat16)
    assert not said
    warn_of_slow_precision(torch.float32)
    assert len(said) == 1
    assert "--bf16" in said[0]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    warn_of_slow_precision(torch.float32)
    assert len(said) == 1, "with TF32 it is the user's choice"


def test_torchs_fused_adam_is_a_key():
    config = parsed("""
    train_micro_batch_size_per_gpu: 1
    zero_optimization: {stage: 3}
    optimizer: {type: AdamW, params: {lr: 1.0e-3, fused: true}}
    """)
    optimizer = complete_ds_config(config, [4])["optimizer"]
    assert optimizer["params"] == {"lr": 1e-3, "fused": True, "torch_adam": True}


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Two of them, with all that triton needs; the one that is taken is put into the
    list.
    """
    taken = []
    stand_in = SimpleNamespace(
        device_count=lambda: 2,
        device_name=lambda: "cuda",
        set_device=taken.append,
    )
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(device, "get_accelerator", lambda: stand_in)
    monkeypatch.setattr(device, "find_spec", lambda name: name)
    # Debian has the headers in the first
    include = {"posix_prefix": tmp_path, "posix_local": tmp_path / "local"}
    sysconfig = SimpleNamespace(
        get_default_scheme=lambda: "posix_local",
        get_paths=lambda scheme="posix_local": {"include": str(include[scheme])},
    )
    monkeypatch.setattr(device, "sysconfig", sysconfig)
    monkeypatch.setattr(device, "which", {"gcc": "/usr/bin/gcc"}.get)
    monkeypatch.delenv("CC", raising=False)
    return taken


def test_a_process_takes_the_gpu_of_its_rank(gpus):
    take_device(1)
    assert gpus == [1]
    with user_error(r"LOCAL_RANK is 2, .* sees 2 GPUs: .*--gpus-per-node"):
        take_device(2)


def test_what_triton_compiles_with_is_there_before_anything_is_placed(
    gpus, monkeypatch, tmp_path
):
    (tmp_path / "Python.h").unlink()
    with user_error(r"triton.*need .*Python\.h: install python3-dev"):
        check_kernels()
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(device, "which", lambda name: None)
    with user_error("need a C compiler: install gcc"):
        check_kernels()
    monkeypatch.setenv("CC", "/opt/cc")
    check_kernels()
    monkeypatch.delenv("CC")
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    check_kernels()
    assert not gpus
