"""Resumed = uninterrupted, bit for bit, for every two of: optimizer, ZeRO stage, dtype, offload and adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mora_ds.common.files import read_json
from tests.helpers.jobs import REPOSITORY, Playground, losses, run
from tests.helpers.pairwise import pairwise

pytestmark = pytest.mark.heavy

LOOP = ("--max_steps", 7, "--save_steps", 2, "--gradient_accumulation_steps", 2, "--max_grad_norm", 0.5)
MERGES = ("--merge_every", 3, "--restart_warmup_steps", 1, "--train_norms", "true")


def ds_config(folder: Path, stage: int, offload: str) -> Path:
    config: dict[str, Any] = read_json(REPOSITORY / "configs" / f"zero{stage}.json")
    config["zero_optimization"]["offload_optimizer"] = {"device": offload}
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Everything in the last checkpoint's safetensors files."""
    last = out / "checkpoints" / "step-000007"
    return {
        f"{path.relative_to(last)} {name}": tensor
        for path in sorted(last.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def is_supported(adapter: str, optimizer: str, **_: Any) -> bool:
    """Muon is for MoRA matrices."""
    return optimizer != "muon" or adapter == "mora"


@pairwise(
    {
        "adapter": ["mora", "lora", "full"],
        "optimizer": ["adamw", "muon"],
        "stage": [1, 2, 3],
        "offload": ["none", "cpu"],
        "dtype": ["fp32", "bf16", "fp16"],
    },
    is_supported,
)
def test_resumed_is_uninterrupted(
    user: Playground, tmp_path: Path, out: Path, adapter: str, optimizer: str, stage: int, offload: str, dtype: str
) -> None:
    more: list[Any] = ["--adapter", adapter, "--optimizer", optimizer, *LOOP, *(MERGES if adapter != "full" else ())]
    more += ["--deepspeed", ds_config(tmp_path, stage, offload), *([f"--{dtype}"] if dtype != "fp32" else [])]
    run(2, user.flags(out, *more))
    whole = losses(out)
    at_end = weights(out)
    run(2, user.flags(out, *more, "--resume_from_checkpoint", out / "checkpoints" / "step-000004"))
    assert torch.equal(losses(out), whole)
    again = weights(out)
    assert again.keys() == at_end.keys()
    assert all(torch.equal(again[name], at_end[name]) for name in again)
    assert adapter == "full" or at_end, "a checkpoint has MoRA matrices"
