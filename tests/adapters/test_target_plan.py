"""Plans under a budget: what is chosen, the file, and whole runs with one: merged, resumed, exported, refused."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import mora_ds
from mora_ds.adapters.config import MoRAConfig, config_from_dict
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.rank_allocation import TOLERANCE, Candidate, spend
from mora_ds.adapters.target_plan import TargetPlan, check_model, parse_budget, read_plan, sized
from mora_ds.checkpoint.verify import verify
from mora_ds.config.arguments import parse
from mora_ds.config.validate import validate
from mora_ds.errors import UserError
from mora_ds.files import read_json, write_json_atomic
from mora_ds.models.base import BaseCheckpoint, write_own_base
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.dry_run import planned
from mora_ds.train.targets import OpenModel, RunTargets, open_model, plan_of_file
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, losses, refused, run
from tests.helpers.models import tiny_model

PROJECTIONS = [Candidate(f"layers.{n}.{name}", 64, 64, 64, 0.5) for n in range(4) for name in "abcd"]


def used(sides: dict[str, int]) -> int:
    return sum(side**2 for side in sides.values())


# -- how a budget is spent ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2])
def test_any_budget_is_held_within_one_per_cent(step: int) -> None:
    chance = random.Random(step)
    for _ in range(300):
        shapes = [(chance.choice((16, 32, 56, 64)), chance.choice((16, 32, 56, 64))) for _ in range(14)]
        candidates = [Candidate(f"l{n}", *shape, max(shape), chance.random()) for n, shape in enumerate(shapes)]
        budget = chance.randint(700, sum(max(shape) ** 2 for shape in shapes))
        sides = spend(candidates, budget, step)
        assert (1 - TOLERANCE) * budget <= used(sides) <= budget
        assert all(side % step == 0 and side <= max(shape) for side, shape in zip(sides.values(), shapes, strict=True))


def test_sizes_follow_scores_and_shapes() -> None:
    candidates = [
        Candidate("plain", 64, 64, 64, 0.4), Candidate("twice", 64, 64, 64, 0.8), Candidate("wide", 64, 192, 192, 0.4),
    ]  # fmt: skip
    sides = spend(candidates, 4_000)
    assert sides["twice"] ** 2 == pytest.approx(2 * sides["plain"] ** 2, rel=0.1)
    assert sides["wide"] ** 2 == pytest.approx(2 * sides["plain"] ** 2, rel=0.1)


def test_a_layer_is_never_given_more_than_its_longer_side() -> None:
    sides = spend([Candidate("a", 16, 16, 16, 1.0), Candidate("b", 64, 64, 64, 0.1)], 256 + 900)
    assert sides == {"a": 16, "b": 30}


def test_a_small_budget_goes_to_the_best_layers() -> None:
    candidates = [Candidate(f"l{n}", 32, 32, 32, score) for n, score in enumerate((0.2, 0.9, 0.1, 0.8))]
    assert spend(candidates, 200) == {"l0": 0, "l1": 10, "l2": 0, "l3": 10}


def test_the_same_numbers_give_the_same_sides_in_any_order() -> None:
    sides = spend(PROJECTIONS, 5_000, step=2)
    shuffled = random.Random(0).sample(PROJECTIONS, len(PROJECTIONS))
    assert spend(shuffled, 5_000, step=2) == sides and list(sides) == [each.name for each in PROJECTIONS]
    noisy = [Candidate(each.name, 64, 64, 64, 0.5 * (1 + 1e-9 * n)) for n, each in enumerate(PROJECTIONS)]
    assert spend(noisy, 5_000, step=2) == sides


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (63, r"63 parameters are too few for one square: the smallest, of side 11 on layers\.0\.a, has 121"),
        (16 * 64**2 + 1, "65,537 parameters are more than the 16 layers can hold: 65,536"),
    ],
)
def test_budgets_that_cannot_be(budget: int, message: str) -> None:
    with pytest.raises(UserError, match=f"--trainable_budget: {message}"):
        spend(PROJECTIONS, budget)


def test_a_budget_between_two_squares_is_refused_with_what_can_be_had() -> None:
    with pytest.raises(UserError, match=r"come within 1% of 206 parameters on these layers; 196 can be had"):
        spend([Candidate("only", 32, 32, 32, 1.0)], 206)
    small_and_large = [Candidate("small", 16, 16, 16, 0.5), Candidate("large", 400, 400, 400, 1.0)]
    with pytest.raises(UserError, match=r"come within 1% of 300 parameters on these layers; 256 can be had"):
        spend(small_and_large, 300)
    with pytest.raises(UserError, match="no layer with a score above 0"):
        spend([Candidate("only", 32, 32, 32, 0.0)], 206)


@pytest.mark.parametrize(
    ("text", "parameters"), [("0.5%", 50), ("10%", 1_000), ("250", 250), ("1e3", 1_000), (" 2_000 ", 2_000)]
)
def test_budgets_are_read(text: str, parameters: int) -> None:
    assert parse_budget(text, 10_000) == parameters


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("much", "must be like 0.5% or 250000, got 'much'"),
        ("", "must be like 0.5% or 250000, got ''"),
        ("0", "must be above 0"),
        ("-1%", "must be above 0"),
        ("nan", "must be above 0"),
        ("inf%", "must be above 0"),
        ("0.5", "did you mean 0.5%?"),
    ],
)
def test_budgets_that_are_none(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_budget(text, 10_000)
    assert "--trainable_budget" in str(caught.value) and message in str(caught.value)


# -- of real models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("operator", ["rotate", "share"])
def test_a_plan_of_weights_holds_its_budget_and_is_always_the_same(tmp_path: Path, family: str, operator: str) -> None:
    write_own_base(tiny_model(family), tmp_path / "model")
    config = MoRAConfig(rank=2, operator=operator)
    plans = [open_model(tmp_path / "model", ["all-linear"]).plan_of_weights(config, "4%") for _ in range(2)]
    assert plans[0].text() == plans[1].text()
    model = tiny_model(family)
    budget = int(0.04 * sum(each.numel() for each in model.parameters()))
    report = inject(model, sized(config, plans[0].sides))
    assert 0.99 * budget <= report.square_params == plans[0].parameters <= budget
    assert "as planned)" in str(report)
    for name, layer in mora_layers(model).items():
        assert layer.value.shape[0] == plans[0].sides[name]


# -- the file and the config -------------------------------------------------------------------------------------------

PLAN = TargetPlan("model", "abc", {"layers.0.q": 12, "layers.0.k": 0}, "0.5%", "weights", "rotate", {"layers.0.q": 0.5})


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "targets.yaml"
    PLAN.write(path)
    found = read_plan(path)
    assert (found.model, found.fingerprint, dict(found.sides)) == ("model", "abc", dict(PLAN.sides))
    assert (found.budget, found.by, found.operator, found.parameters) == ("0.5%", "weights", "rotate", 144)
    text = path.read_text(encoding="utf-8")
    assert "  layers.0.q: 12    # 144 parameters, score 5.000e-01\n" in text
    path.write_text(text.replace("q: 12", "q: 8"), encoding="utf-8")
    assert read_plan(path).sides["layers.0.q"] == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: [", "is no valid YAML"),
        ("- a", "must hold `key: value` lines"),
        ("format: 2\nfingerprint: a\nlayers: {a: 2}", "format is 2, and only 1 is known"),
        ("format: 1\nlayers: {a: 2}", "there is no 'fingerprint' in it"),
        ("format: 1\nfingerprint: a", "there is no 'layers' in it"),
        ("format: 1\nfingerprint: a\nlayers: [a]", "layers must be lines of `name: side`, not a list"),
        ("format: 1\nfingerprint: a\nlayers: {a: 2, a: 4}", "'a' is given twice"),
        ("format: 1\nfingerprint: a\nlayers: {a: 2.5}", "the side of a must be a whole number, 0 for none, got 2.5"),
        ("format: 1\nfingerprint: a\nlayers: {a: -2}", "the side of a must be a whole number, 0 for none, got -2"),
        ("format: 1\nfingerprint: a\nlayers: {a: 0}", "no layer has a side above 0"),
        ("format: 1\nfingerprint: a\nlayer: {a: 2}", "unknown key 'layer'. Did you mean 'layers'?"),
    ],
)
def test_files_that_are_no_plan(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_plan(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_a_plan_of_another_model_is_refused_by_name() -> None:
    check_model(PLAN, Path("t.yaml"), "here", "abc")
    with pytest.raises(UserError, match=r"t\.yaml is a plan for model with the fingerprint abc; here has def"):
        check_model(PLAN, Path("t.yaml"), "here", "def")


def test_a_config_keeps_its_sizes_and_old_ones_stay_as_they_were() -> None:
    assert "layer_sizes" not in MoRAConfig().to_dict()
    config = sized(MoRAConfig(operator="share"), {"b": 3, "a": 5, "c": 0})
    assert config.planned_layers == ("a", "b") and config.size_of("b", 8, 8) == 3
    assert config_from_dict(config.to_dict()) == config
    assert config.to_dict()["layer_sizes"] == {"a": 5, "b": 3}
    with pytest.raises(UserError, match="--targets: the plan gives c no MoRA matrix"):
        config.size_of("c", 8, 8)


def test_sides_that_no_operator_takes() -> None:
    with pytest.raises(UserError, match=r"^FILE: the side of a must be at least 1, and even for rotate, got 7"):
        sized(MoRAConfig(rank=8), {"a": 7}, "FILE")
    config = sized(MoRAConfig(rank=8), {"model.layers.0.self_attn.q_proj": 34})
    with pytest.raises(
        UserError,
        match=r"side 34 on model\.layers\.0\.self_attn\.q_proj, .* of 32 x 32, is larger than it can use: give 32",
    ):
        inject(tiny_model(), config)


def test_planned_layers_that_do_not_exist_are_named() -> None:
    config = sized(MoRAConfig(rank=8), {"model.layers.0.self_attn.q_prj": 8, "model.layers.1.mlp.up_proj": 8})
    with pytest.raises(UserError, match=r"q_prj\. Did you mean 'model\.layers\.0\.self_attn\.q_proj'\?$"):
        inject(tiny_model(), config)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--targets", "auto"], "--targets auto: give --trainable_budget"),
        (["--trainable_budget", "1%"], "--trainable_budget is for --targets auto"),
        (["--targets", "f.yaml", "--trainable_budget", "1%"], "--trainable_budget is for --targets auto"),
        (["--targets", "auto", "--trainable_budget", "1%", "--adapter", "lora"], "--targets is for MoRA matrices"),
        (["--targets", "auto", "--trainable_budget", "x"], "--trainable_budget must be like"),
        (["--targets", "f.yaml", "--target_modules", "q_proj"], "f.yaml names the layers itself"),
        (["--targets", "f.yaml", "--full_rank_steps", "2", "--max_steps", "9"], "--full_rank_steps change first"),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(parse(["--model_name_or_path", "m", "--train_files", "a.txt", *flags]))
    assert message in str(caught.value)


# -- runs --------------------------------------------------------------------------------------------------------------


def adapter_json(out: Path) -> dict[str, Any]:
    return read_json(out / "checkpoints" / "latest" / "adapter.json")


@pytest.fixture(scope="module")
def finished(user: Playground) -> Path:
    """Two ranks, a merge, a checkpoint in the middle, exported."""
    out = user.root / "planned"
    auto = ("--targets", "auto", "--trainable_budget", "3%", "--merge_every", 3, "--restart_warmup_steps", 1)
    summary = run(2, user.flags(out, *auto, "--save_steps", 4, "--export_merged"))
    budget = int(0.03 * (summary["total_params"] - summary["trainable_params"]))
    assert 0.99 * budget <= summary["trainable_params"] <= budget
    return out


@pytest.mark.gloo
def test_a_run_trains_merges_and_exports_what_the_plan_says(user: Playground, finished: Path) -> None:
    plan = read_plan(finished / "targets.yaml")
    fresh = open_model(user.model, ["all-linear"]).plan_of_weights(MoRAConfig(rank=2), "3%")
    assert (finished / "targets.yaml").read_text(encoding="utf-8") == fresh.text(), "the same in every process"
    layers = adapter_json(finished)["layers"]
    assert {name: entry["operator"]["r_hat"] for name, entry in layers.items()} == {
        name: side for name, side in plan.sides.items() if side
    }
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
    auto = ("--targets", "auto", "--trainable_budget", "3%", "--merge_every", 3, "--restart_warmup_steps", 1)
    flags = user.flags(out, *auto, "--save_steps", 4, "--resume_from_checkpoint", "auto")
    run(2, flags)
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
    layers = adapter_json(out)["layers"]
    assert {name: entry["operator"]["r_hat"] for name, entry in layers.items()} == {names[0]: 10, names[1]: 6}

    resume = ("--max_steps", 4, "--resume_from_checkpoint", "latest")
    plan.write_text(text.replace(f"{names[0]}: 10", f"{names[0]}: 12"), encoding="utf-8")
    ((kind, told),) = run_ranks(1, refused, user.flags(out, "--targets", plan, *resume))
    assert kind == "UserError" and f"was trained by another plan than {plan}:\n  {names[0]}: side 10 there, 12" in told
    run(1, user.flags(out, "--targets", out / "targets.yaml", *resume))
    assert adapter_json(out)["step"] == 4


class Alone:
    """The only rank, as far as `RunTargets` looks."""

    is_first = True

    def on_first(self, work: Any) -> Any:
        return work()


AUTO = ("--targets", "auto", "--trainable_budget", "3%")


def decided(
    user: Playground,
    out: Path,
    checkpoint: Path | None,
    *flags: str | Path,
    ranks: Any = None,
) -> MoRAConfig:
    """What a run by these flags takes, resumed from `checkpoint`."""
    adapter, model, base = (
        parse(list(map(str, flags))).adapter,
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
    """On a rank of several, of which only the first one can read weights. For `run_ranks`."""
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
    state = {"identity": {"adapter": MoRAConfig(rank=2).to_dict()}}
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


# -- fuller: pytest -m heavy tests/adapters/test_target_plan.py -------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.gloo
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("gpt2", ()),
        ("gpt_neox", ("--operator", "share")),
        ("qwen2", ("--bf16", "--base_bits", 8)),
        ("llama", ("--operator", "share", "--tp_grouping", "aligned", "--tp_segments", 2, "--tensor_parallel_size", 2)),
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
    plan = read_plan(tmp_path / "out" / "targets.yaml")
    layers = adapter_json(tmp_path / "out")["layers"]
    assert {name: entry["operator"]["r_hat"] for name, entry in layers.items()} == {
        name: side for name, side in plan.sides.items() if side
    }
    mora_ds.export_merged(tmp_path / "out" / "checkpoints" / "latest", tmp_path / "merged", verify=True)
