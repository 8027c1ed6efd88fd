"""Runs with a plan of MoRA matrices: merged, resumed, exported, refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import mora_ds
from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.target_plan import TargetPlan, read_plan
from mora_ds.checkpoint.state import TrainerState
from mora_ds.checkpoint.verify import verify
from mora_ds.common.errors import UserError
from mora_ds.common.files import read_json, write_json_atomic
from mora_ds.config.arguments import parse
from mora_ds.models.base import BaseCheckpoint, write_own_base
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.dry_run import planned
from mora_ds.train.targets import OpenModel, RunTargets, open_model, plan_of_file
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, losses, refused, run
from tests.helpers.models import tiny_model

AUTO = ("--targets", "auto", "--trainable_budget", "3%")
MERGING = (*AUTO, "--merge_every", 3, "--restart_warmup_steps", 1, "--save_steps", 4)


def adapter_json(out: Path) -> dict[str, Any]:
    return read_json(out / "checkpoints" / "latest" / "adapter.json")


def trained_sides(out: Path) -> dict[str, int]:
    """r_hat of the layers in the latest checkpoint."""
    return {name: entry["operator"]["r_hat"] for name, entry in adapter_json(out)["layers"].items()}


def planned_sides(out: Path) -> dict[str, int]:
    return {name: side for name, side in read_plan(out / "targets.yaml").sides.items() if side}


@pytest.fixture(scope="module")
def finished(user: Playground) -> Path:
    """Two ranks, a merge, a checkpoint in the middle, exported."""
    out = user.root / "planned"
    summary = run(2, user.flags(out, *MERGING, "--export_merged"))
    budget = int(0.03 * (summary["total_params"] - summary["trainable_params"]))
    assert 0.99 * budget <= summary["trainable_params"] <= budget
    return out


@pytest.mark.gloo
def test_a_run_trains_merges_and_exports_what_the_plan_says(user: Playground, finished: Path) -> None:
    fresh = open_model(user.model, ["all-linear"]).plan_of_weights(MoRAConfig(rank=2), "3%")
    assert (finished / "targets.yaml").read_text(encoding="utf-8") == fresh.text(), "the same in every process"
    assert trained_sides(finished) == planned_sides(finished)
    assert [each.problems for each in verify(finished, user.model)] == [[], []]
    live: Any = mora_ds.load_adapter(user.model, finished / "checkpoints" / "latest")
    merged: Any = type(live).from_pretrained(finished / "merged")
    ids = torch.arange(3, 35).unsqueeze(0)
    assert torch.allclose(live(ids).logits, merged(ids).logits, atol=1e-5)


@pytest.mark.gloo
def test_a_resumed_run_ends_as_if_it_had_not_stopped(user: Playground, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "resumed"
    shutil.copytree(finished, out, symlinks=True)
    shutil.rmtree(out / "checkpoints" / "step-000006")
    (out / "checkpoints" / "latest").unlink()
    run(2, user.flags(out, *MERGING, "--resume_from_checkpoint", "auto"))
    ended, resumed = (path / "checkpoints" / "latest" / "adapter.safetensors" for path in (finished, out))
    assert ended.read_bytes() == resumed.read_bytes() and torch.equal(losses(finished), losses(out))


@pytest.mark.gloo
def test_an_edited_plan_is_honoured_and_another_refused(user: Playground, finished: Path, tmp_path: Path) -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    plan, out = tmp_path / "mine.yaml", tmp_path / "out"
    kept = read_plan(finished / "targets.yaml")
    text = TargetPlan(kept.model, kept.fingerprint, {names[0]: 10, names[1]: 6, "lm_head": 0}).text()
    plan.write_text(text + "# mine\n", encoding="utf-8")
    run(1, user.flags(out, "--targets", plan, "--max_steps", 2))
    assert trained_sides(out) == {names[0]: 10, names[1]: 6}

    resume = ("--max_steps", 4, "--resume_from_checkpoint", "latest")
    plan.write_text(text.replace(f"{names[0]}: 10", f"{names[0]}: 12"), encoding="utf-8")
    ((kind, told),) = run_ranks(1, refused, user.flags(out, "--targets", plan, *resume))
    assert kind == "UserError" and f"was trained by another plan than {plan}:\n  {names[0]}: side 10 there, 12" in told
    run(1, user.flags(out, "--targets", out / "targets.yaml", *resume))
    assert adapter_json(out)["step"] == 4


class Alone:
    """The parts of `Ranks` that `RunTargets` uses, for a single process."""

    is_first = True

    def on_first(self, check: str, work: Any, long: bool = False) -> Any:
        return work()


def decided(user: Playground, out: Path, checkpoint: Path | None, *flags: str | Path, ranks: Any = None) -> MoRAConfig:
    """The config of a run with these flags, resumed from `checkpoint`."""
    adapter, model, base = (
        parse([*map(str, flags)]).adapter,
        tiny_model(vocab_size=400),
        BaseCheckpoint.open(user.model),
    )
    keys = {name: name for name, _ in model.named_parameters()}
    out.mkdir(exist_ok=True)
    targets = RunTargets(adapter, plan_of_file(adapter), out, checkpoint, ranks or Alone())
    config = targets.planned(MoRAConfig(rank=2), model, base, keys)
    assert isinstance(config, MoRAConfig)
    return config


def decided_together(user: Playground, out: Path) -> MoRAConfig:
    """The config on one of several ranks, of which only the first can read weights. For `run_ranks`."""
    ranks = Ranks.current()
    if not ranks.is_first:
        BaseCheckpoint.read = None  # type: ignore[assignment, method-assign]
    return decided(user, out, None, *AUTO, ranks=ranks)


@pytest.mark.gloo
def test_every_rank_has_the_plan_of_the_first(user: Playground, tmp_path: Path) -> None:
    one, other = run_ranks(2, decided_together, user, tmp_path / "out")
    assert one == other == decided(user, tmp_path / "alone", None, *AUTO) and one.layer_sizes


@pytest.mark.gloo
def test_what_a_checkpoint_holds_decides_when_it_is_resumed(user: Playground, finished: Path, tmp_path: Path) -> None:
    checkpoint, plan = finished / "checkpoints" / "latest", finished / "targets.yaml"
    fresh = decided(user, tmp_path / "fresh", None, *AUTO)
    assert (tmp_path / "fresh" / "targets.yaml").read_bytes() == plan.read_bytes()
    assert decided(user, finished, checkpoint, *AUTO) == fresh
    assert decided(user, tmp_path / "elsewhere", checkpoint, *AUTO) == fresh
    assert dict(read_plan(tmp_path / "elsewhere" / "targets.yaml").sides) == dict(read_plan(plan).sides)
    assert decided(user, tmp_path / "file", checkpoint, "--targets", plan) == fresh
    assert decided(user, tmp_path / "none", None).layer_sizes == ()

    changed = tmp_path / "elsewhere" / "targets.yaml"
    kept = read_plan(plan)
    first = next(name for name, side in kept.sides.items() if side)
    TargetPlan("model", kept.fingerprint, {**kept.sides, first: 2}, "3%").write(changed)
    (broken := tmp_path / "broken").mkdir()
    (broken / "targets.yaml").write_text("layers: [", encoding="utf-8")
    for out, flags, message in (
        (tmp_path / "file", (), "has MoRA matrices by a plan: give --targets, as at its start"),
        (tmp_path / "file", ("--targets", "auto", "--trainable_budget", "2%"), "--trainable_budget 2% is "),
        (tmp_path / "file", (*AUTO, "--target_modules", "q_proj"), "--target_modules leaves out model.layers.0."),
        (tmp_path / "elsewhere", AUTO, f"another plan than {changed}:\n  {first}: side {kept.sides[first]} there, 2 "),
        (broken, AUTO, f"{broken / 'targets.yaml'} is no valid YAML"),
    ):
        with pytest.raises(UserError) as caught:
            decided(user, out, checkpoint, *flags)
        assert message in str(caught.value)


def test_a_run_without_a_plan_does_not_go_on_with_one(user: Playground, tmp_path: Path) -> None:
    state = vars(TrainerState(identity={"adapter": MoRAConfig(rank=2).to_dict()}))
    write_json_atomic(tmp_path / "trainer_state.json", state)
    with pytest.raises(UserError, match="has no plan of MoRA matrices: drop --targets"):
        decided(user, tmp_path / "out", tmp_path, *AUTO)


@pytest.mark.gloo
def test_a_plan_of_another_model_leaves_no_folder(user: Playground, tmp_path: Path) -> None:
    plan = tmp_path / "other.yaml"
    TargetPlan("another", "abc", {"model.layers.0.self_attn.q_proj": 8}).write(plan)
    ((kind, told),) = run_ranks(1, refused, user.flags(tmp_path / "out", "--targets", plan))
    assert kind == "UserError" and f"--targets {plan} is a plan for another with the fingerprint abc" in told
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_what_the_plan_says(user: Playground, tmp_path: Path) -> None:
    opened: OpenModel = open_model(user.model, ["q_proj", "down_proj"])
    plan = opened.plan_of_weights(MoRAConfig(rank=2), "1500")
    plan.write(tmp_path / "targets.yaml")
    auto = ("--targets", "auto", "--trainable_budget", "1500", "--target_modules", "q_proj", "down_proj")
    for flags in (auto, ("--targets", tmp_path / "targets.yaml")):
        found, told = planned(parse(user.flags(tmp_path / "out", *flags, "--dry_run")), 1)
        assert found.trained.total == plan.parameters and 1485 <= plan.parameters <= 1500
        assert f"trainable {plan.parameters:,} " in told[0]


@pytest.mark.heavy
@pytest.mark.gloo
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("gpt2", ()),
        ("gpt_neox", ("--operator", "share")),
        ("qwen2", ("--bf16", "--base_bits", 8)),
        ("llama", ("--operator", "share", "--tp_grouping", "aligned", "--tensor_parallel_size", 2)),
        ("llama", ("--optimizer", "muon")),
    ],
)
def test_planned_runs_of_every_kind(user: Playground, tmp_path: Path, family: str, more: tuple[str, ...]) -> None:
    """Merged, resumed (on another number of ranks where no layer is split), exported and verified."""
    shutil.copytree(user.model, tmp_path / "model")
    write_own_base(tiny_model(family, vocab_size=400), tmp_path / "own")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "own" / name, tmp_path / "model" / name)
    auto = ("--targets", "auto", "--trainable_budget", "4%", "--merge_every", 2, "--restart_warmup_steps", 1)
    flags = user.flags(tmp_path / "out", "--model_name_or_path", tmp_path / "model", *auto, *more)
    summary = run(2, [*flags, "--max_steps", "3"])
    budget = int(0.04 * (summary["total_params"] - summary["trainable_params"]))
    assert 0.99 * budget <= summary["trainable_params"] <= budget
    rows = () if "--tensor_parallel_size" in more else ("--per_device_train_batch_size", "4")  # 2 replicas, or 1
    run(1 if rows else 2, [*flags, *rows, "--resume_from_checkpoint", "auto", "--max_steps", "5"])
    assert trained_sides(tmp_path / "out") == planned_sides(tmp_path / "out")
    mora_ds.export_merged(tmp_path / "out" / "checkpoints" / "latest", tmp_path / "merged", verify=True)
