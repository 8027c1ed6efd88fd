"""Weight analysis, the probe, and plans of targets: formulas, files, and runs that follow a plan."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import mora_ds
from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.ops.mora import adjoint
from mora_ds.checkpoint.state import TrainerState
from mora_ds.checkpoint.verify import verify
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.files import read_json, write_json_atomic
from mora_ds.config.arguments import parse
from mora_ds.data import Document
from mora_ds.models.base import BaseCheckpoint, write_own_base
from mora_ds.research.analyze import probe, token_batches
from mora_ds.research.targets import (
    Candidate,
    RunTargets,
    TargetPlan,
    open_model,
    parse_budget,
    read_plan,
    spend,
    with_sizes,
)
from mora_ds.research.weights import ESTIMATED, EXACT, Weight, analyse, measure_weight
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.dry_run import planned
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, losses, refused, research, run
from tests.helpers.mistakes import command
from tests.helpers.models import causal_loss, tiny_model, tokens

AUTO = {"targets": "auto", "trainable_budget": "3%"}
MERGING = ("--merge_every", 3, "--restart_warmup_steps", 1, "--save_steps", 4)


def low_rank(d_out: int, d_in: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(side, len(values), generator=generator, dtype=torch.float64)).Q
        for side in (d_out, d_in)
    )
    return left @ values.double().diag() @ right.T


def test_measures_are_their_formulas() -> None:
    values = torch.tensor([4.0, 2.0, 1.0, 0.5])
    found = measure_weight("a", Weight("a.weight", 7, 9), low_rank(9, 7, values))
    energy = values.double().square()
    shares = energy / energy.sum()
    assert found.method == EXACT and found.full_rank == 7
    assert found.norm == pytest.approx(energy.sum().sqrt().item(), rel=1e-6)
    assert found.stable_rank == pytest.approx(energy.sum().item() / 16, rel=1e-6)
    assert found.effective_rank == pytest.approx(math.exp(-(shares * shares.log()).sum().item()), rel=1e-6)
    assert found.leading[:4] == pytest.approx(values.tolist(), rel=1e-6)
    assert found.energy_ranks == (1, 2, 4)  # 75.3, 94.1, 98.8, 100%
    assert found.score == pytest.approx(found.effective_rank / 7)


def test_spectra_at_the_limits() -> None:
    """Equal singular values, the zero matrix, and a weight that is not finite."""
    weight = Weight("a.weight", 8, 8)
    even, zero = measure_weight("a", weight, torch.eye(8)), measure_weight("a", weight, torch.zeros(8, 8))
    assert (even.stable_rank, even.effective_rank) == (pytest.approx(8), pytest.approx(8))
    assert even.energy_ranks == (4, 8, 8)
    assert (zero.stable_rank, zero.effective_rank, zero.energy_ranks, zero.score) == (0.0, 0.0, (0, 0, 0), 0.0)
    with pytest.raises(RunError, match=r"layer\.weight is not finite"):
        measure_weight("layer", weight, torch.full((8, 8), math.nan))


def test_estimates_are_near(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a spectrum that falls fast, and of a Gaussian weight, whose tail holds most of the energy."""
    monkeypatch.setattr("mora_ds.research.weights.LEADING", 48)
    generator = torch.Generator().manual_seed(0)
    for weight in (low_rank(320, 300, 0.98 ** torch.arange(300)), torch.randn(320, 300, generator=generator)):
        place = Weight("w", 300, 320)
        exact, estimated = measure_weight("a", place, weight), measure_weight("a", place, weight, exact_up_to=1)
        assert (exact.method, estimated.method) == (EXACT, ESTIMATED)
        assert estimated.norm == exact.norm
        assert estimated.leading == pytest.approx(exact.leading, rel=0.01)
        assert estimated.stable_rank == pytest.approx(exact.stable_rank, rel=0.01)
        assert estimated.effective_rank == pytest.approx(exact.effective_rank, rel=0.05)
        assert estimated.energy_ranks == pytest.approx(exact.energy_ranks, rel=0.1, abs=2)


def test_estimates_do_not_depend_on_the_random_state_nor_change_it() -> None:
    weight, place = torch.randn(300, 310), Weight("w", 310, 300)
    torch.manual_seed(1)
    one, state = measure_weight("a", place, weight, exact_up_to=1), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert measure_weight("a", place, weight, exact_up_to=1) == one


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_layers_of_a_folder_are_those_of_injection(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    write_own_base(model, tmp_path / "model")
    opened = open_model(tmp_path / "model", ["all-linear"])
    assert opened.parameters == sum(each.numel() for each in model.parameters())
    parameters = dict(model.named_parameters())
    rows = {row.module: row for row in analyse(opened.base, opened.weights)}
    inject(model, MoRAConfig(rank=2))
    layers = mora_layers(model)
    assert list(rows) == list(layers)
    for name, row in rows.items():
        assert (row.d_in, row.d_out) == (layers[name].in_features, layers[name].out_features)
        values = torch.linalg.svdvals(parameters[f"{name}.weight"].detach().double())
        assert row.leading == pytest.approx(values[: len(row.leading)].tolist(), rel=1e-9)
        assert row.norm == pytest.approx(values.norm().item(), rel=1e-6)


@pytest.mark.parametrize(("family", "operator"), [("llama", "rotate"), ("gpt2", "share")])
def test_the_probe_finds_the_gradients_that_autograd_finds(family: str, operator: str) -> None:
    model, config = tiny_model(family), MoRAConfig(rank=2, operator=operator)
    batches = [tokens(2, seed=1), tokens(2, seed=2)]
    gradients = []
    for ids in batches:
        model.zero_grad()
        causal_loss(model, ids).backward()
        gradients.append({name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None})
    found = {each.module: each for each in probe(model, config, batches)}
    layers = mora_layers(model)
    assert list(found) == list(layers)
    for name, layer in layers.items():
        whole = [each[f"{name}.weight"].T if layer.transposed else each[f"{name}.weight"] for each in gradients]
        squares = [adjoint(layer.spec, each) for each in whole]
        assert found[name].weight_norm == pytest.approx(root_mean(whole), rel=1e-4)
        assert found[name].square_norm == pytest.approx(root_mean(squares), rel=1e-4)
        assert found[name].score == pytest.approx(found[name].square_norm / layer.value.shape[0])
        assert not layer.value.any() and layer.value.grad is None, "nothing is trained"


def root_mean(gradients: list[torch.Tensor]) -> float:
    return math.sqrt(sum(each.norm().item() ** 2 for each in gradients) / len(gradients))


class Letters:
    """A tokenizer: a letter a token."""

    eos_token_id = 0

    def __call__(self, text: str, **anything: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 96 for letter in text]}


def test_batches_are_the_first_tokens_one_behind_the_other() -> None:
    documents = [Document("abc", "1"), Document("d", "2", ends=False), Document("e", "2", begins=False)]
    documents.append(Document("fghij", "3"))
    whole = token_batches(documents, Letters(), seq_len=3, count=2, rows=2)
    assert [each.tolist() for each in whole] == [[[1, 2, 3], [0, 4, 5]], [[0, 6, 7], [8, 9, 10]]]
    (short,) = token_batches(documents[:1], Letters(), seq_len=8, count=2, rows=2)
    assert short.tolist() == [[1, 2, 3]]
    with pytest.raises(UserError, match="--probe: there are fewer than two tokens"):
        token_batches([Document("a", "1")], Letters(), seq_len=8, count=1, rows=1)


def test_the_command_prints_writes_and_plans(
    user: Playground, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, told = tmp_path / "targets.yaml", tmp_path / "weights.json"
    planning = [str(user.model), "--mora_rank", "2", "--trainable_budget", "3%", "--write", str(plan)]
    probing = ["--probe", str(user.train), "--seq_len", "32", "--probe_batches", "2", "--json", str(told)]
    assert command("analyze", [*planning, *probing]) == (0, "")
    printed = capsys.readouterr().out
    assert "probe: 64 tokens in 2 batch(es), rotate/permuted" in printed
    assert "model.layers.1.mlp.down_proj" in printed and "|dL/dW|" in printed and "plan by probe: " in printed
    content = json.loads(told.read_text(encoding="utf-8"))
    assert (content["format"], content["energy_shares"], len(content["layers"])) == (1, [0.5, 0.9, 0.99], 14)
    assert content["layers"][0]["gradients"]["weight_norm"] > 0 < content["layers"][0]["score"]
    by_probe = read_plan(plan)
    budget = int(0.03 * open_model(user.model, ["all-linear"]).parameters)
    assert 0.9 * budget <= by_probe.parameters <= budget and by_probe.by == "probe"
    assert command("analyze", planning) == (0, "")
    assert read_plan(plan).by == "weights" and dict(read_plan(plan).sides) != dict(by_probe.sides)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--target_modules", "q_prj"], "q_proj"),
        (["--target_modules", "experts"], "'experts' matches no linear layer"),
        (["--device", "warp"], "--device"),
        (["--probe", "gone.txt"], "--probe"),
        (["--probe", "{held}", "--probe_batches", "0"], "--probe_batches"),
        (["--write", "{held}.yaml"], "--trainable_budget and --write belong together"),
        (["--json", "/nowhere/x"], "--json"),
    ],
    ids=str,
)
def test_mistakes_in_flags_are_named(user: Playground, flags: list[str], named: str) -> None:
    code, message = command("analyze", [str(user.model), *(flag.format(held=user.held) for flag in flags)])
    assert code == 2 and named in message


# -- budgets -----------------------------------------------------------------------------------------------------------

PROJECTIONS = [Candidate(f"layers.{n}.{name}", 64, 64, 64, 0.5) for n in range(4) for name in "abcd"]


@pytest.mark.parametrize(
    ("text", "parameters"), [("0.5%", 50), ("10%", 1_000), ("250", 250), ("1e3", 1_000), (" 2_000 ", 2_000)]
)
def test_budgets_are_read(text: str, parameters: int) -> None:
    assert parse_budget(text, 10_000) == parameters


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("much", "must be like 0.5% or 250000, got 'much'"),
        ("0", "must be above 0"),
        ("-1%", "must be above 0"),
        ("nan", "must be above 0"),
        ("0.5", "did you mean 0.5%?"),
        ("1e999999", "below 9223372036854775808"),
    ],
)
def test_budgets_that_are_none(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_budget(text, 10_000)
    assert "trainable_budget" in str(caught.value) and message in str(caught.value)


def used(sides: dict[str, int]) -> int:
    return sum(side**2 for side in sides.values())


@pytest.mark.parametrize(("step", "multiple"), [(1, 1), (2, 16)])
def test_a_budget_is_never_exceeded_and_nearly_used_up(step: int, multiple: int) -> None:
    chance = random.Random(step)
    for _ in range(100):
        shapes = [(chance.choice((16, 32, 56, 64)), chance.choice((16, 32, 56, 64))) for _ in range(14)]
        candidates = [Candidate(f"l{n}", *shape, max(shape), chance.random()) for n, shape in enumerate(shapes)]
        budget = chance.randint(700, sum(max(shape) ** 2 for shape in shapes))
        sides = spend(candidates, budget, step, multiple)
        assert budget - 4 * 64 * step <= used(sides) <= budget
        assert all(side % step == 0 and side <= max(shape) for side, shape in zip(sides.values(), shapes, strict=True))


def test_a_small_budget_goes_to_the_best_layers() -> None:
    candidates = [Candidate(f"l{n}", 32, 32, 32, score) for n, score in enumerate((0.2, 0.9, 0.1, 0.8))]
    assert spend(candidates, 200) == {"l0": 0, "l1": 10, "l2": 0, "l3": 10}


def test_the_same_numbers_give_the_same_sides_in_any_order() -> None:
    sides = spend(PROJECTIONS, 5_000, smallest=2)
    shuffled = random.Random(0).sample(PROJECTIONS, len(PROJECTIONS))
    assert spend(shuffled, 5_000, smallest=2) == sides and list(sides) == [each.name for each in PROJECTIONS]
    noisy = [Candidate(each.name, 64, 64, 64, 0.5 * (1 + 1e-9 * n)) for n, each in enumerate(PROJECTIONS)]
    assert spend(noisy, 5_000, smallest=2) == sides


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (63, r"63 parameters are too few for one MoRA matrix: the smallest, of side 11 on layers\.0\.a, has 121"),
        (16 * 64**2 + 1, "65,537 parameters are more than the 16 layers can hold: 65,536"),
    ],
)
def test_budgets_that_cannot_be(budget: int, message: str) -> None:
    with pytest.raises(UserError, match=f"trainable_budget: {message}"):
        spend(PROJECTIONS, budget)


# -- the file ----------------------------------------------------------------------------------------------------------

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
        ("format: 1\nfingerprint: a\nlayers: [a]", "layers must be lines of `name: side`"),
        ("format: 1\nfingerprint: a\nlayers: {a: 2, a: 4}", "'a' is given twice"),
        ("format: 1\nfingerprint: a\nlayers: {a: 2.5}", "the side of a must be a whole number, 0 for none, got 2.5"),
        ("format: 1\nfingerprint: a\nlayers: {a: -2}", "the side of a must be a whole number, 0 for none, got -2"),
        ("format: 1\nfingerprint: a\nlayers: {a: 0}", "no layer has a side above 0"),
        ("format: 1\nfingerprint: a\nlayer: {a: 2}", "unknown key 'layer'. Did you mean 'layers'?"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ('format: 1\nfingerprint: f\nlayers: {"../a": 1}\n', "cannot be the name"),
    ],
)
def test_files_that_are_no_plan(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_plan(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ({"a": 7}, "the side of a must be at least 1, and even for rotate, got 7"),
        ({"model.layers.0.self_attn.q_proj": 34}, "of 32 x 32, is larger than it can use: give 32"),
        ({"model.layers.0.self_attn.q_prj": 8}, "Did you mean 'model.layers.0.self_attn.q_proj'?"),
    ],
)
def test_sides_that_do_not_fit_are_named(sides: dict[str, int], message: str) -> None:
    with pytest.raises(UserError) as caught:
        inject(tiny_model(), with_sizes(MoRAConfig(rank=8), TargetPlan("m", "f", sides)))
    assert message in str(caught.value)


# -- runs --------------------------------------------------------------------------------------------------------------


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
    summary = run(2, research(user.flags(out, *MERGING, "--export_merged"), user.root, **AUTO))
    budget = int(0.03 * (summary["total_params"] - summary["trainable_params"]))
    assert 0.9 * budget <= summary["trainable_params"] <= budget
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
    run(2, research(user.flags(out, *MERGING, "--resume_from_checkpoint", "auto"), tmp_path, **AUTO))
    ended, resumed = (path / "checkpoints" / "latest" / "adapter.safetensors" for path in (finished, out))
    assert ended.read_bytes() == resumed.read_bytes() and torch.equal(losses(finished), losses(out))


@pytest.mark.gloo
def test_an_edited_plan_is_honoured_and_another_refused(user: Playground, finished: Path, tmp_path: Path) -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    plan, out = tmp_path / "mine.yaml", tmp_path / "out"
    kept = read_plan(finished / "targets.yaml")
    text = TargetPlan(kept.model, kept.fingerprint, {names[0]: 10, names[1]: 6, "lm_head": 0}).text()
    plan.write_text(text + "# mine\n", encoding="utf-8")
    run(1, research(user.flags(out, "--max_steps", 2), tmp_path, targets=plan))
    assert trained_sides(out) == {names[0]: 10, names[1]: 6}

    resume = ("--max_steps", 4, "--resume_from_checkpoint", "latest")
    plan.write_text(text.replace(f"{names[0]}: 10", f"{names[0]}: 12"), encoding="utf-8")
    ((kind, told),) = run_ranks(1, refused, research(user.flags(out, *resume), tmp_path, targets=plan))
    assert kind == "UserError" and f"was trained by another plan than {plan}:\n  {names[0]}: side 10 there, 12" in told
    run(1, research(user.flags(out, *resume), tmp_path, targets=out / "targets.yaml"))
    assert adapter_json(out)["step"] == 4
    plan.write_text(text.replace(kept.fingerprint, "abc"), encoding="utf-8")
    argv = research(user.flags(tmp_path / "other"), tmp_path, targets=plan)
    ((kind, told),) = run_ranks(1, refused, argv)
    assert kind == "UserError" and f"{plan} is a plan for {kept.model} with the fingerprint abc" in told
    assert not (tmp_path / "other").exists()


class Alone:
    """The parts of `Ranks` that `RunTargets` uses, for a single process."""

    is_first = True

    def on_first(self, check: str, work: Any, long: bool = False) -> Any:
        return work()


def decided(
    user: Playground, out: Path, checkpoint: Path | None, budget: str | None = "3%", ranks: Any = None, **changes: Any
) -> MoRAConfig:
    """The config of a run with this budget, or with the plan `changes["plan"]`, resumed from `checkpoint`."""
    model = tiny_model(vocab_size=400)
    keys = {name: name for name, _ in model.named_parameters()}
    out.mkdir(exist_ok=True)
    patterns = changes.get("patterns", ["all-linear"])
    targets = RunTargets("auto", budget, patterns, changes.get("plan"), out, checkpoint, ranks or Alone())
    return targets.planned(MoRAConfig(rank=2), model, BaseCheckpoint.open(user.model), keys)


def decided_together(user: Playground, out: Path) -> MoRAConfig:
    """The config on one of several ranks, of which only the first can read weights. For `run_ranks`."""
    ranks = Ranks.current()
    if not ranks.is_first:
        BaseCheckpoint.read = None  # type: ignore[assignment, method-assign]
    return decided(user, out, None, ranks=ranks)


@pytest.mark.gloo
def test_every_rank_has_the_plan_of_the_first(user: Playground, tmp_path: Path) -> None:
    one, other = run_ranks(2, decided_together, user, tmp_path / "out")
    assert one == other == decided(user, tmp_path / "alone", None) and one.layer_sizes


@pytest.mark.gloo
def test_what_a_checkpoint_holds_decides_when_it_is_resumed(user: Playground, finished: Path, tmp_path: Path) -> None:
    checkpoint, plan = finished / "checkpoints" / "latest", finished / "targets.yaml"
    fresh = decided(user, tmp_path / "fresh", None)
    assert (tmp_path / "fresh" / "targets.yaml").read_bytes() == plan.read_bytes()
    assert decided(user, finished, checkpoint) == fresh
    assert decided(user, tmp_path / "elsewhere", checkpoint) == fresh
    assert dict(read_plan(tmp_path / "elsewhere" / "targets.yaml").sides) == dict(read_plan(plan).sides)
    assert decided(user, tmp_path / "file", checkpoint, plan=read_plan(plan)) == fresh
    kept = read_plan(plan)
    first = next(name for name, side in kept.sides.items() if side)
    changed = TargetPlan("model", kept.fingerprint, {**kept.sides, first: 2}, "3%")
    with pytest.raises(UserError, match=f"another plan than auto:\n  {first}: side {kept.sides[first]} there, 2 "):
        decided(user, tmp_path / "elsewhere", checkpoint, plan=changed)
    with pytest.raises(UserError, match=r"research\.trainable_budget 4%: .* was trained under 3%"):
        decided(user, finished, checkpoint, budget="4%")
    with pytest.raises(UserError, match=r"--target_modules leaves out model\.layers\.0\."):
        decided(user, tmp_path / "file", checkpoint, patterns=["q_proj"])
    state = TrainerState(identity={"adapter": MoRAConfig(rank=2).to_dict()})
    write_json_atomic(tmp_path / "trainer_state.json", vars(state))
    with pytest.raises(UserError, match=r"has no plan of MoRA matrices: drop research\.targets"):
        decided(user, tmp_path / "out", tmp_path)


def test_a_dry_run_counts_what_the_plan_says(user: Playground, tmp_path: Path) -> None:
    plan = open_model(user.model, ["q_proj", "down_proj"]).plan_of_weights(MoRAConfig(rank=2), "1500")
    plan.write(tmp_path / "targets.yaml")
    flags = user.flags(tmp_path / "out", "--dry_run")
    auto = [*flags, "--target_modules", "q_proj", "down_proj"]
    for argv in (
        research(auto, tmp_path, targets="auto", trainable_budget="1500"),
        research(flags, tmp_path, targets=tmp_path / "targets.yaml"),
    ):
        found, told = planned(parse(argv), 1)
        assert found.trained.total == plan.parameters and 1350 <= plan.parameters <= 1500
        assert f"trainable {plan.parameters:,} " in told[0]
