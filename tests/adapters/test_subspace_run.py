"""Runs with the subspace operator: merges, resume, export, damage, several nodes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject
from mora_ds.adapters.ops import singular_vectors
from mora_ds.adapters.ops.delta import live_weight
from mora_ds.checkpoint.verify import verify
from mora_ds.common.errors import RunError, UserError
from mora_ds.deploy.adapter_io import export_adapter, load_adapter
from mora_ds.deploy.export import export_merged
from mora_ds.eval.ledger_summary import summarize
from mora_ds.models.base import BaseCheckpoint, write_own_base
from mora_ds.remora.ledger import VECTORS_FILE, Ledger
from mora_ds.train.run import Run, with_vectors
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, assert_close_losses, curve, losses, run
from tests.helpers.models import tiny_model, tokens

MERGING = ("--operator", "subspace", "--merge_every", 2, "--restart_warmup_steps", 1, "--max_steps", 6)


@pytest.fixture(scope="module")
def whole(user: Playground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, two merges."""
    out = tmp_path_factory.mktemp("whole")
    summary = run(2, user.flags(out, *MERGING, "--save_steps", 3))
    assert summary["merges"] == 2 and summary["base_bytes_gathered"] == 0
    return out


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(2, vocab=400)).logits


def test_two_ranks_are_as_one(user: Playground, whole: Path, tmp_path: Path) -> None:
    run(1, user.flags(tmp_path, *MERGING, "--per_device_train_batch_size", 4))
    assert_close_losses(tmp_path, whole)
    assert (losses(whole).diff() != 0).all()


def test_it_is_exported_verified_and_loaded_elsewhere(user: Playground, whole: Path, tmp_path: Path) -> None:
    ledger = Ledger.open(whole / "ledger")
    assert [summary.operators for summary in summarize(ledger)] == ["subspace"] * 2
    assert all(verdict.is_good for verdict in [*verify(whole), *verify(whole / "ledger")])
    export_merged(whole, tmp_path / "merged", verify=True)
    export_adapter(whole, tmp_path / "adapter")
    moved = shutil.move(tmp_path / "adapter", tmp_path / "elsewhere")
    singular_vectors._paths.clear()  # as another machine
    model = load_adapter(user.model, moved)
    assert singular_vectors.path_of(ledger.vectors.name).is_relative_to(moved)
    assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()))
    entry = ledger.layers(0)["model.layers.0.mlp.up_proj"]
    base = BaseCheckpoint.open(user.model)
    updates = list(ledger.squares_of(entry.module))
    expected = live_weight(base.read(entry.weight), updates, False, torch.float32)
    assert_close(model.get_submodule(entry.module).weight, expected, rtol=0, atol=0)


def test_a_resumed_run_is_the_uninterrupted_one(user: Playground, whole: Path, tmp_path: Path) -> None:
    """From a checkpoint that has moved into a folder without vectors of its own."""
    flags = (*MERGING, "--save_steps", 3)
    checkpoint = shutil.copytree(whole / "checkpoints" / "step-000003", tmp_path / "step-000003")
    run(2, user.flags(tmp_path / "again", *flags, "--resume_from_checkpoint", checkpoint))
    assert [row for row in curve(whole) if row["step"] > 3 and "merge" not in row] == [
        row for row in curve(tmp_path / "again") if "merge" not in row
    ]
    one, another = (load_file(out / "checkpoints/latest/adapter.safetensors") for out in (whole, tmp_path / "again"))
    assert all(torch.equal(one[name], another[name]) for name in one)
    assert not (tmp_path / "again" / "subspace").exists(), "nothing was decomposed again"


def test_damaged_vectors_are_refused(whole: Path, tmp_path: Path) -> None:
    copy = shutil.copytree((whole / "checkpoints" / "latest").resolve(), tmp_path / "copy")
    path = copy / "ledger" / VECTORS_FILE
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"the ledger is damaged: {path}"):
        Ledger.open(copy / "ledger")
    with pytest.raises(RunError, match=str(path)):
        export_merged(copy, tmp_path / "merged")
    assert not verify(copy)[0].is_good
    path.unlink()
    with pytest.raises(UserError, match=f"{path} is missing"):
        Ledger.open(copy / "ledger", hashes=False)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--base_bits", 8),
        ("--bf16",),
        ("--optimizer", "muon"),
        ("--gradient_checkpointing",),
    ],
    ids=str,
)
def test_three_ranks_and_other_settings(user: Playground, tmp_path: Path, more: tuple[Any, ...]) -> None:
    """pytest -m heavy tests/adapters/ops/test_subspace.py"""
    run(3, user.flags(tmp_path / "three", *MERGING, "--per_device_train_batch_size", 1, *more))
    run(1, user.flags(tmp_path / "one", *MERGING, "--per_device_train_batch_size", 3, *more))
    rtol = 3e-3 if more and more[0] in ("--bf16",) else 1e-4
    assert_close_losses(tmp_path / "three", tmp_path / "one", rtol=rtol)
    export_merged(tmp_path / "three", tmp_path / "merged", verify=True)


def test_a_training_loop_of_the_user(tmp_path: Path) -> None:
    result = run_ranks(1, user_loop, str(tmp_path))[0]
    assert result["after"] == pytest.approx(result["before"], rel=1e-6) and result["verified"]


def user_loop(folder: str) -> dict[str, Any]:
    """As documented: GPT-2's transposed weights, tied embeddings."""
    from mora_ds.engine.initialize import initialize
    from tests.helpers.engines import ds_config
    from tests.helpers.models import causal_loss

    root = Path(folder)
    ids = tokens(4)
    write_own_base(tiny_model("gpt2"), root / "base")
    model = tiny_model("gpt2")
    config = with_vectors(MoRAConfig(rank=2, operator="subspace"), model, root / "base", root / "out")
    inject(model, config)
    engine, *_ = initialize(model=model, config=ds_config(3, micro=4, accumulation=1))
    work = Run(engine, base=root / "base", folder=root / "out")
    for _ in range(2):
        engine.backward(causal_loss(engine, ids))
        engine.step()
    with torch.no_grad():
        before = causal_loss(engine, ids).item()
        work.merge(2)
        after = causal_loss(engine, ids).item()
    work.save(2)
    report = export_merged(root / "out", root / "merged", verify=True)
    return {"before": before, "after": after, "verified": report.comparison is not None}
