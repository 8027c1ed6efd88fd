"""Weight analysis, the probe, and plans of targets: formulas, files, and runs that follow a plan."""

import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mora_ds
from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.ops.mora import OperatorSpec, adjoint
from mora_ds.checkpoint.state import TrainerState
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.files import read_json, write_json_atomic
from mora_ds.config.arguments import parse
from mora_ds.data import Document
from mora_ds.models.base import BaseCheckpoint, write_own_base
from mora_ds.models.load import LoadedBase
from mora_ds.research import targets
from mora_ds.research.analyze import probe, token_batches
from mora_ds.research.targets import (
    Candidate,
    OpenModel,
    TargetPlan,
    parse_budget,
    plan_of_run,
    read_plan,
    spend,
    with_sizes,
)
from mora_ds.research.weights import Weight, analyse, measure_weight
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.dry_run import planned
from mora_ds.train.pretrain import pretrain
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, refusal, research, run
from tests.helpers.mistakes import command
from tests.helpers.models import causal_loss, tiny_model, tokens
from tests.helpers.outcome import assert_good
from tests.helpers.resume import assert_same_run
from tests.helpers.streams import Letters

AUTO = {"targets": "auto", "trainable_budget": "3%"}
MERGING = ("--merge_every", 3, "--restart_warmup_steps", 1, "--save_steps", 4)


def low_rank(d_out: int, d_in: int, values: torch.Tensor) -> torch.Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(side, len(values), generator=generator, dtype=torch.float64)).Q
        for side in (d_out, d_in)
    )
    return left @ values.double().diag() @ right.T


def test_measures_are_their_formulas():
    """Also of equal singular values, of the zero matrix, and of a weight that is not finite."""
    values = torch.tensor([4.0, 2.0, 1.0, 0.5])
    measures = measure_weight("a", Weight("a.weight", 7, 9), low_rank(9, 7, values))
    energy = values.double().square()
    shares = energy / energy.sum()
    assert not measures.is_estimated
    assert measures.norm == pytest.approx(energy.sum().sqrt().item(), rel=1e-6)
    assert measures.largest == pytest.approx(4.0, rel=1e-6)
    assert measures.stable_rank == pytest.approx(energy.sum().item() / 16, rel=1e-6)
    assert measures.effective_rank == pytest.approx(math.exp(-(shares * shares.log()).sum().item()), rel=1e-6)
    assert measures.score == pytest.approx(measures.effective_rank / 7)
    weight = Weight("a.weight", 8, 8)
    even = measure_weight("a", weight, torch.eye(8))
    assert (even.stable_rank, even.effective_rank) == (pytest.approx(8), pytest.approx(8))
    zero = measure_weight("a", weight, torch.zeros(8, 8))
    assert (zero.stable_rank, zero.effective_rank, zero.score) == (0.0, 0.0, 0.0)
    with pytest.raises(RunError, match=r"layer\.weight is not finite"):
        measure_weight("layer", weight, torch.full((8, 8), math.nan))


def test_estimates_are_near(monkeypatch: pytest.MonkeyPatch):
    """Of a spectrum that falls fast, and of a Gaussian weight, whose tail holds most of the energy."""
    generator = torch.Generator().manual_seed(0)
    for values in (low_rank(320, 300, 0.98 ** torch.arange(300)), torch.randn(320, 300, generator=generator)):
        weight = Weight("w", 300, 320)
        exact = measure_weight("a", weight, values)
        with monkeypatch.context() as patch:
            patch.setattr("mora_ds.research.weights.EXACT_UP_TO", 1)
            patch.setattr("mora_ds.research.weights.LEADING", 48)
            torch.manual_seed(1)
            state = torch.get_rng_state()
            estimated = measure_weight("a", weight, values)
            assert torch.equal(torch.get_rng_state(), state), "the random state is the caller's"
            torch.manual_seed(2)
            assert measure_weight("a", weight, values) == estimated
        assert (exact.is_estimated, estimated.is_estimated) == (False, True)
        assert estimated.norm == exact.norm
        assert estimated.largest == pytest.approx(exact.largest, rel=0.01)
        assert estimated.stable_rank == pytest.approx(exact.stable_rank, rel=0.01)
        assert estimated.effective_rank == pytest.approx(exact.effective_rank, rel=0.05)


@pytest.mark.parametrize("family, operator", [("llama", "rotate"), ("gpt2", "share")])
def test_layers_of_a_folder_and_the_gradients_of_a_probe(tmp_path: Path, family: str, operator: str):
    """Layers are those of injection, singular values those of the weights, gradients those that autograd finds."""
    model = tiny_model(family)
    config = MoRAConfig(rank=2, operator=operator)
    write_own_base(model, tmp_path / "model")
    opened = OpenModel.in_folder(tmp_path / "model", ["all-linear"])
    assert opened.parameters == sum(parameter.numel() for parameter in model.parameters())
    parameters = dict(model.named_parameters())
    weights = {measures.module: measures for measures in analyse(opened.base, opened.weights)}
    batches = [tokens(2, seed=1), tokens(2, seed=2)]
    gradients = []
    for ids in batches:
        model.zero_grad()
        causal_loss(model, ids).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in parameters.items()})
    probed = probe(model, config, batches)
    layers = mora_layers(model)
    assert list(weights) == list(layers) == list(probed)
    for name, layer in layers.items():
        assert (weights[name].d_in, weights[name].d_out) == (layer.in_features, layer.out_features)
        singular = torch.linalg.svdvals(parameters[f"{name}.weight"].detach().double())
        assert weights[name].largest == pytest.approx(singular[0].item(), rel=1e-9)
        assert weights[name].norm == pytest.approx(singular.norm().item(), rel=1e-6)
        of_weights = [gradient[f"{name}.weight"] for gradient in gradients]
        assert isinstance(layer.spec, OperatorSpec)
        norms = [adjoint(layer.spec, g.T if layer.transposed else g).norm().item() for g in of_weights]
        root_mean_square = math.sqrt(sum(norm**2 for norm in norms) / len(norms))
        assert probed[name].norm == pytest.approx(root_mean_square, rel=1e-4)
        assert probed[name].score == pytest.approx(probed[name].norm / layer.value.shape[0])
        assert not layer.value.any()
        assert layer.value.grad is None, "nothing is trained"


def test_batches_are_the_first_tokens_one_behind_the_other():
    documents = [Document("abc"), Document("d", ends=False), Document("e", begins=False)]
    documents.append(Document("fghij"))
    whole = token_batches(documents, Letters(), seq_len=3, count=4)
    assert [ids.tolist() for ids in whole] == [[[1, 2, 3]], [[0, 4, 5]], [[0, 6, 7]], [[8, 9, 10]]]
    (short,) = token_batches(documents[:1], Letters(), seq_len=8, count=2)
    assert short.tolist() == [[1, 2, 3]]
    with pytest.raises(UserError, match="--probe: there are fewer than two tokens"):
        token_batches([Document("a")], Letters(), seq_len=8, count=1)


def test_the_command_prints_writes_and_plans(user: Playground, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plan = tmp_path / "targets.yaml"
    report = tmp_path / "weights.json"
    planning = [str(user.model), "--mora_rank", "2", "--trainable_budget", "3%", "--write", str(plan)]
    probing = ["--probe", str(user.train), "--seq_len", "32", "--probe_batches", "2", "--json", str(report)]
    assert command("analyze", [*planning, *probing]) == (0, "")
    printed = capsys.readouterr().out
    assert "probe: 64 tokens in 2 batch(es), rotate/permuted" in printed
    assert "model.layers.1.mlp.down_proj" in printed
    assert "|dL/dM|" in printed
    assert ", by probe, for rotate" in printed
    content = read_json(report)
    assert (content["format"], len(content["layers"])) == (1, 14)
    assert content["layers"][0]["gradient"]["norm"] > 0 < content["layers"][0]["score"]
    by_probe = read_plan(plan)
    budget = int(0.03 * OpenModel.in_folder(user.model, ["all-linear"]).parameters)
    assert 0.9 * budget <= by_probe.parameters <= budget
    assert command("analyze", planning) == (0, "")
    assert "# by weights, for rotate, within a budget of 3%" in plan.read_text(encoding="utf-8")
    assert dict(read_plan(plan).sides) != dict(by_probe.sides)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--target_modules", "experts"], "'experts' matches no linear layer"),
        (["--probe", "{held}", "--probe_batches", "0"], "--probe_batches"),
        (["--write", "{held}.yaml"], "--trainable_budget and --write belong together"),
        (["--json", "/nowhere/x"], "--json"),
    ],
    ids=str,
)
def test_mistakes_in_flags_are_named(user: Playground, flags: list[str], named: str):
    code, message = command("analyze", [str(user.model), *(flag.format(held=user.held) for flag in flags)])
    assert code == 2
    assert named in message


# -- budgets -----------------------------------------------------------------------------------------------------------

PROJECTIONS = [Candidate(f"layers.{n}.{name}", 64, 64, 64, 0.5) for n in range(4) for name in "abcd"]


def test_budgets_are_read_or_refused():
    for text, parameters in {"0.5%": 50, "10%": 1_000, "250": 250, "1e3": 1_000, " 2_000 ": 2_000}.items():
        assert parse_budget(text, 10_000) == parameters
    refused = {
        "much": "must be like 0.5% or 250000",
        "0.5": "did you mean 0.5%",
        "1e999999": "below 9223372036854775808",
    }
    for text, message in {
        **refused,
        "0": "must be above 0",
        "-1%": "must be above 0",
        "nan": "must be above 0",
    }.items():
        with pytest.raises(UserError, match=f"trainable_budget.*{message}"):
            parse_budget(text, 10_000)


@pytest.mark.parametrize("step, multiple", [(1, 1), (2, 16)])
def test_a_budget_is_never_exceeded_and_nearly_used_up(step: int, multiple: int):
    chance = random.Random(step)
    for _ in range(100):
        shapes = [(chance.choice((16, 32, 56, 64)), chance.choice((16, 32, 56, 64))) for _ in range(14)]
        candidates = [Candidate(f"l{n}", *shape, max(shape), chance.random()) for n, shape in enumerate(shapes)]
        budget = chance.randint(700, sum(max(shape) ** 2 for shape in shapes))
        sides = spend(candidates, budget, step, multiple)
        assert budget - 4 * 64 * step <= sum(side**2 for side in sides.values()) <= budget
        assert all(side % step == 0 and side <= max(shape) for side, shape in zip(sides.values(), shapes, strict=True))


def test_a_small_budget_goes_to_the_best_layers():
    candidates = [Candidate(f"l{n}", 32, 32, 32, score) for n, score in enumerate((0.2, 0.9, 0.1, 0.8))]
    assert spend(candidates, 200) == {"l0": 0, "l1": 10, "l2": 0, "l3": 10}


def test_the_same_numbers_give_the_same_sides_in_any_order():
    sides = spend(PROJECTIONS, 5_000, smallest=2)
    shuffled = random.Random(0).sample(PROJECTIONS, len(PROJECTIONS))
    assert spend(shuffled, 5_000, smallest=2) == sides
    assert list(sides) == [layer.name for layer in PROJECTIONS]
    noisy = [replace(layer, score=0.5 * (1 + 1e-9 * n)) for n, layer in enumerate(PROJECTIONS)]
    assert spend(noisy, 5_000, smallest=2) == sides


def test_budgets_that_cannot_be():
    with pytest.raises(UserError, match=r"trainable_budget: 63 .* too few .*, of side 11 on layers\.0\.a, has 121"):
        spend(PROJECTIONS, 63)
    with pytest.raises(UserError, match=r"trainable_budget: 65,537 .* more than the 16 layers can hold: 65,536"):
        spend(PROJECTIONS, 16 * 64**2 + 1)


# -- the file ----------------------------------------------------------------------------------------------------------


def test_a_plan_is_read_as_it_was_written(tmp_path: Path):
    path = tmp_path / "targets.yaml"
    plan = TargetPlan("model", "abc", {"layers.0.q": 12, "layers.0.k": 0}, "by weights")
    plan.write(path)
    assert read_plan(path) == TargetPlan("model", "abc", dict(plan.sides))
    text = path.read_text(encoding="utf-8")
    assert "  layers.0.q: 12\n  layers.0.k: 0\n" in text
    assert "# by weights\n" in text
    path.write_text(text.replace("q: 12", "q: 8"), encoding="utf-8")
    assert read_plan(path).sides["layers.0.q"] == 8


@pytest.mark.parametrize(
    "text, message",
    [
        ("layers: [", "is no valid YAML"),
        ("format: 2\nfingerprint: a\nlayers: {a: 2}", "format is 2, and only 1 is known"),
        ("format: 1\nlayers: {a: 2}", "'fingerprint' is missing"),
        ("format: 1\nfingerprint: a", "'layers' is missing"),
        ("format: 1\nfingerprint: a\nlayers: [a]", "layers must be a mapping"),
        ("format: 1\nfingerprint: a\nlayers: {a: 2.5}", "layers: 'a' must be a whole number, got 2.5"),
        ("format: 1\nfingerprint: a\nlayers: {a: -2}", "layers: 'a' must be at least 0 and at most 16,777,216, got -2"),
        ("format: 1\nfingerprint: a\nlayers: {a: 0}", "no layer has a side above 0"),
        ("format: 1\nfingerprint: a\nlayer: {a: 2}", "unknown key 'layer'. Did you mean 'layers'?"),
        ('format: 1\nfingerprint: f\nlayers: {"../a": 1}\n', "cannot be the name"),
    ],
)
def test_files_that_are_no_plan(tmp_path: Path, text: str, message: str):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_plan(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "sides, message",
    [
        ({"a": 7}, "the side of a must be at least 1, and even for rotate, got 7"),
        ({"model.layers.0.self_attn.q_proj": 34}, "of 32 x 32, is larger than it can use: give 32"),
        ({"model.layers.0.self_attn.q_prj": 8}, "Did you mean 'model.layers.0.self_attn.q_proj'?"),
    ],
)
def test_sides_that_do_not_fit_are_named(sides: dict[str, int], message: str):
    with pytest.raises(UserError) as caught:
        inject(tiny_model(), with_sizes(MoRAConfig(rank=8), TargetPlan("m", "f", sides)))
    assert message in str(caught.value)


# -- runs --------------------------------------------------------------------------------------------------------------


def trained_sides(out: Path) -> dict[str, int]:
    """r_hat of the layers in the latest checkpoint."""
    layers = read_json(out / "checkpoints" / "latest" / "adapter.json")["layers"]
    return {name: layer["operator"]["r_hat"] for name, layer in layers.items()}


def test_a_run_trains_merges_resumes_and_exports_what_the_plan_says(user: Playground, tmp_path: Path):
    """Two ranks, of which only the first reads weights; a resumed run takes the plan from its checkpoint."""
    out = tmp_path / "planned"
    resumed = tmp_path / "resumed"
    argv = research(user.flags(out, *MERGING, "--export_merged"), tmp_path, **AUTO)
    summary = run_ranks(2, job_that_reads_weights_on_the_first_rank, argv)[0]
    budget = int(0.03 * (summary["total_params"] - summary["trainable_params"]))
    assert 0.9 * budget <= summary["trainable_params"] <= budget
    fresh = OpenModel.in_folder(user.model, ["all-linear"]).plan_of_weights(MoRAConfig(rank=2), "3%")
    assert (out / "targets.yaml").read_text(encoding="utf-8") == fresh.text(), "the same in every process"
    assert trained_sides(out) == {name: side for name, side in fresh.sides.items() if side}
    assert_good(out, user.model)
    live: Any = mora_ds.load_adapter(user.model, out / "checkpoints" / "latest")
    merged: Any = type(live).from_pretrained(out / "merged")
    ids = torch.arange(3, 35).unsqueeze(0)
    assert torch.allclose(live(ids).logits, merged(ids).logits, atol=1e-5)

    shutil.copytree(out, resumed, symlinks=True)
    shutil.rmtree(resumed / "checkpoints" / "step-000006")
    (resumed / "checkpoints" / "latest").unlink()
    (resumed / "targets.yaml").unlink()
    flags = user.flags(resumed, *MERGING, "--resume_from_checkpoint", "auto")
    run(2, research(flags, tmp_path, **AUTO))
    assert_same_run(resumed, out)
    assert dict(read_plan(resumed / "targets.yaml").sides) == trained_sides(out)
    other_budget = research(flags, tmp_path, targets="auto", trainable_budget="4%")
    assert "research.trainable_budget: '3%' there, '4%' here" in refusal(other_budget)
    layer, side = next(iter(trained_sides(out).items()))
    text = (resumed / "targets.yaml").read_text(encoding="utf-8")
    (resumed / "targets.yaml").write_text(text.replace(f"{layer}: {side}", f"{layer}: 2"), encoding="utf-8")
    assert f"another plan:\n  {layer}: side {side} there, 2 in" in refusal(research(flags, tmp_path, **AUTO))


def job_that_reads_weights_on_the_first_rank(argv: list[str]) -> dict[str, Any]:
    """For `run_ranks`."""
    if not Ranks.current().is_first:
        targets.analyse = None  # type: ignore[assignment]
    return pretrain(parse(argv))


def test_an_edited_plan_is_honoured_and_another_refused(user: Playground, tmp_path: Path, out: Path):
    query = "model.layers.0.self_attn.q_proj"
    down = "model.layers.1.mlp.down_proj"
    path = tmp_path / "mine.yaml"
    fingerprint = BaseCheckpoint.open(user.model).fingerprint()
    text = TargetPlan("model", fingerprint, {query: 10, down: 6, "lm_head": 0}).text()
    path.write_text(text + "# mine\n", encoding="utf-8")
    run(1, research(user.flags(out, "--max_steps", 2), tmp_path, targets=path))
    assert trained_sides(out) == {query: 10, down: 6}

    resume = user.flags(out, "--max_steps", 4, "--resume_from_checkpoint", "latest")
    path.write_text(text.replace(f"{query}: 10", f"{query}: 12"), encoding="utf-8")
    message = refusal(research(resume, tmp_path, targets=path))
    assert f"was trained by another plan:\n  {query}: side 10 there, 12 in the plan" in message
    run(1, research(resume, tmp_path, targets=out / "targets.yaml"))
    assert TrainerState.read(out / "checkpoints" / "latest").step == 4
    path.write_text(text.replace(fingerprint, "abc"), encoding="utf-8")
    argv = research(user.flags(tmp_path / "other"), tmp_path, targets=path)
    assert "the plan is for 'model' with the fingerprint 'abc'" in refusal(argv)
    assert not (tmp_path / "other").exists()


def test_a_run_that_began_without_a_plan_gets_none(user: Playground, tmp_path: Path):
    config = MoRAConfig(rank=2)
    write_json_atomic(tmp_path / "trainer_state.json", vars(TrainerState(identity={"adapter": config.to_dict()})))
    loaded = LoadedBase(None, BaseCheckpoint.open(user.model), {})
    with pytest.raises(UserError, match=r"has no plan of MoRA matrices: drop research\.targets"):
        plan_of_run(None, "3%", [], config, loaded, tmp_path / "out", tmp_path)


def test_a_dry_run_counts_what_the_plan_says(user: Playground, tmp_path: Path):
    opened = OpenModel.in_folder(user.model, ["q_proj", "down_proj"])
    plan = opened.plan_of_weights(MoRAConfig(rank=2), "1500")
    plan.write(tmp_path / "targets.yaml")
    flags = user.flags(tmp_path / "out", "--dry_run")
    auto = [*flags, "--target_modules", "q_proj", "down_proj"]
    for argv in (
        research(auto, tmp_path, targets="auto", trainable_budget="1500"),
        research(flags, tmp_path, targets=tmp_path / "targets.yaml"),
    ):
        report, lines = planned(parse(argv), 1)
        assert report.trained.total == plan.parameters
        assert 1350 <= plan.parameters <= 1500
        assert f"trainable {plan.parameters:,} " in lines[0]
