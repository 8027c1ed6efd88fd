"""`mora-ds plan`: what its flags mean, and what it prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mora_ds.adapters.config import MoRAConfig
from mora_ds.commands import plan as tool
from mora_ds.planning.plan import Planner
from tests.helpers.jobs import REPOSITORY
from tests.helpers.tools import call

TINY = REPOSITORY / "configs" / "models" / "tiny_llama.json"


def test_the_tool_plans_what_its_flags_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    flags = (
        "--gpus 16 --gpus_per_node 4 --gpu_memory 40 --seq_len 256 --micro_batch 2 --accumulation 3 "
        "--tensor_parallel_size 2 --dtype fp16 --no_document_mask --mora_rank 4 --train_embedding_rank 3 "
        "--deepspeed=~/ds.json"
    )
    monkeypatch.setattr(sys, "argv", ["plan", "--model", str(TINY), *flags.split()])
    given = tool._options()
    work, config = tool._work(given), tool._ds_config(given)
    assert (work.seq_len, work.micro_batch, work.dtype, work.tensor_parallel) == (256, 2, torch.float16, 2)
    assert (work.document_mask, work.checkpointing) == (False, False)
    assert work.adapter == MoRAConfig(rank=4, embedding_rank=3)
    assert config["train_batch_size"] == 2 * 3 * 8 and config["zero_optimization"]["stage"] == 2


def test_the_tool_tries_the_device_before_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def note(made: Planner, rows: int) -> None:
        asked.append((made.work.base_on_host, made.work.checkpointing, made.accumulation, rows))

    monkeypatch.setattr(tool, "recommend", note)
    monkeypatch.setattr(Planner, "plan", lambda made: None)
    for name in ("recommend_sharding", "report"):
        monkeypatch.setattr(tool, name, lambda *given, **named: "")
    for more in ((), ("--base_device", "device"), ("--adapter", "full")):
        call("plan", "--model", TINY, "--gpus", 8, "--accumulation", 3, "--rows", 64, *more)
    assert asked == [(False, True, 3, 64), (True, True, 3, 64), (False, True, 3, 64), (False, True, 3, 64)]


def test_the_tool_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    call("plan", "--model", TINY, "--gpus", 16, "--gpu_memory", 1, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["recommended"] and found["fits"] and found["bytes"]["peak"] < 1e9
    assert found["passes"] == pytest.approx(1, rel=0.01)
