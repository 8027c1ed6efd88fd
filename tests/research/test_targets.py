"""Ranks of weights, and plans of targets: formulas, files, and runs that follow a plan."""

import itertools
import math
import random
import shutil

import pytest
import torch

import mora_ds
from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.checkpoint.state import TrainerState
from mora_ds.common.files import read_json
from mora_ds.config.arguments import parse
from mora_ds.data import load_corpus
from mora_ds.eval.perplexity import Score, Windows, cut_windows, load_target
from mora_ds.models.base import BaseCheckpoint, write_own_base
from mora_ds.research.analyze import (
    GradientMeasures,
    WeightMeasures,
    allocate_budget,
    layers_of,
    measure,
    parse_budget,
)
from mora_ds.research.targets import TargetPlan, read_plan
from mora_ds.train.dry_run import planned
from tests.helpers.errors import run_error, user_error
from tests.helpers.jobs import research, run, validation_errors_of
from tests.helpers.mistakes import command
from tests.helpers.models import causal_loss, tiny_model
from tests.helpers.operators import random as normal
from tests.helpers.outcome import assert_good
from tests.helpers.resume import assert_same_run
from tests.helpers.tables import rows

QUERY = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
MERGING = "--merge_every 3 --restart_warmup_steps 1 --save_steps 4"


def low_rank(d_out, d_in, values):
    """A matrix with these singular values."""
    left = torch.linalg.qr(normal(d_out, len(values))).Q
    right = torch.linalg.qr(normal(d_in, len(values), seed=1)).Q
    return left @ values.double().diag() @ right.T


@pytest.mark.parametrize("shape", [(9, 7), (7, 9)])
def test_measures_are_their_formulas(shape):
    values = torch.tensor([4.0, 2.0, 1.0, 0.5])
    measures = measure("a", low_rank(*shape, values))
    energy = values.double().square()
    shares = energy / energy.sum()
    entropy = -(shares * shares.log()).sum().item()
    assert measures.effective_rank == pytest.approx(math.exp(entropy), rel=1e-6)
    assert measures.score == pytest.approx(measures.effective_rank / 7)


def test_measures_of_equal_singular_values_of_zeros_and_of_what_is_not_finite():
    even = measure("a", torch.eye(8))
    assert even.effective_rank == pytest.approx(8)
    zero = measure("a", torch.zeros(8, 8))
    assert (zero.effective_rank, zero.score) == (0.0, 0.0)
    with run_error(r"layer\.weight is not finite"):
        measure("layer", torch.full((8, 8), math.nan))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_of_a_folder_are_those_of_injection(model_folder, family):
    model = tiny_model(family)
    base = write_own_base(model, model_folder)
    weights = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters()
    }
    keys, parameters = layers_of(base, ["all-linear"])
    assert parameters == sum(weight.numel() for weight in weights.values())
    inject(model, MoRAConfig(rank=2))
    assert list(keys) == list(mora_layers(model))
    for name, key in keys.items():
        assert torch.equal(base.read(key), weights[f"{name}.weight"])


def test_the_command_prints_and_plans(user, tmp_path, capsys):
    path = tmp_path / "targets.yaml"
    flags = f"{user.model} --trainable_budget 3% --write {path}"
    assert command("analyze", flags.split()) == (0, "")
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out
    plan = read_plan(path)
    base = BaseCheckpoint.open(user.model)
    keys, parameters = layers_of(base, ["all-linear"])
    assert plan.fingerprint == base.fingerprint()
    measures = [measure(name, base.read(key)) for name, key in keys.items()]
    assert plan.layers == allocate_budget(measures, int(0.03 * parameters))


def test_a_plan_by_gradients_on_text(user, tmp_path, capsys):
    """|dL/dM| is that of autograd, the root of its mean square over windows."""
    path = tmp_path / "targets.yaml"
    flags = f"{user.model} --probe {user.train} --probe_batches 2 --window 24 --trainable_budget 3% --write {path}"
    assert command("analyze", flags.split()) == (0, "")
    printed = capsys.readouterr().out
    target = load_target(user.model, dtype="float32")
    windows = Windows.of(target.model, 24, None)
    corpus = load_corpus([str(user.train)], flag="--probe")
    cut = cut_windows(corpus, target.tokenizer, windows, None, Score())
    inject(target.model, MoRAConfig())
    layers = mora_layers(target.model)
    energies = dict.fromkeys(layers, 0.0)
    for ids, _ in itertools.islice(cut, 2):
        target.model.zero_grad()
        causal_loss(target.model, torch.tensor([ids])).backward()
        for name, layer in layers.items():
            energies[name] += layer.adapter_weight.grad.norm().item() ** 2
    measures = []
    for name, layer in layers.items():
        norm = math.sqrt(energies[name] / 2)
        measures.append(GradientMeasures(name, layer.shape, layer.spec.r_hat, norm))
        assert f"{name}  {layer.spec.r_hat:>5}  {norm:.3e}" in printed
    _, parameters = layers_of(BaseCheckpoint.open(user.model), ["all-linear"])
    assert read_plan(path).layers == allocate_budget(measures, int(0.03 * parameters))


MISTAKES = """
--probe_batches 0 | --probe_batches must be
--device moon | --device moon
--probe /nowhere/x.txt | --probe
--target_modules experts | --target_modules 'experts' matches no linear layer
--write plan.yaml | --trainable_budget and --write need each other
--write /nowhere/x --trainable_budget 3% | --write /nowhere/x
--write plan.yaml --trainable_budget much | --trainable_budget must be like 0.5% or 250000
"""


@pytest.mark.parametrize("flags, named", rows(MISTAKES))
def test_mistakes_in_flags_are_named(user, flags, named):
    code, message = command("analyze", [str(user.model), *flags.split()])
    assert code == 2
    assert named in message


# -- budgets ---------------------------------------------------------------------------


def weights_of(*shapes_and_scores):
    return [
        WeightMeasures(f"l{number}", (d_out, d_in), score * min(d_out, d_in))
        for number, (d_out, d_in, score) in enumerate(shapes_and_scores)
    ]


def test_budgets_are_read_or_refused():
    for text, parameters in {
        "0.5%": 50,
        "10%": 1_000,
        "250": 250,
        "1e3": 1_000,
    }.items():
        assert parse_budget(text, 10_000) == parameters
    for text in ("much", "0", "-1%", "nan", "1e999999"):
        with user_error("--trainable_budget must be like"):
            parse_budget(text, 10_000)


def test_a_budget_is_never_exceeded_and_nearly_used_up():
    """To one step of each layer: of 2, and of 16 from a side of 32 on."""
    chance = random.Random(0)
    known_sides = (16, 32, 56, 64)
    for _ in range(100):
        shapes = [chance.choices(known_sides, k=2) for _ in range(14)]
        weights = weights_of(*((*shape, chance.random()) for shape in shapes))
        budget = chance.randint(2_000, sum(max(layer.shape) ** 2 for layer in weights))
        sides = allocate_budget(weights, budget)
        one_step_each = sum((side + 16) ** 2 - side**2 for side in sides.values())
        assert (
            budget - one_step_each <= sum(side**2 for side in sides.values()) <= budget
        )
        for layer in weights:
            assert sides[layer.layer] % 2 == 0
            assert sides[layer.layer] <= max(layer.shape)


def test_a_small_budget_goes_to_the_best_layers_and_a_large_one_to_all():
    weights = weights_of((32, 32, 0.2), (32, 32, 0.9), (32, 32, 0.1), (32, 32, 0.8))
    assert allocate_budget(weights, 200) == {"l0": 0, "l1": 10, "l2": 0, "l3": 10}
    assert allocate_budget(weights, 10**9) == dict.fromkeys(
        ("l0", "l1", "l2", "l3"), 32
    )
    with user_error(
        "--trainable_budget: 63 parameters are too few for one MoRA matrix"
    ):
        allocate_budget(weights, 63)


# -- the file --------------------------------------------------------------------------


def test_a_plan_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "targets.yaml"
    plan = TargetPlan("abc", {"layers.0.q": 12, "layers.0.k": 0})
    plan.write(path)
    assert read_plan(path) == plan
    text = path.read_text()
    assert "  layers.0.q: 12\n  layers.0.k: 0\n" in text
    path.write_text(text.replace("q: 12", "q: 8"))
    assert read_plan(path).layers["layers.0.q"] == 8


NO_PLANS = """
layers: [ | is not valid YAML
{format: 2, fingerprint: a, layers: {a: 2}} | format is 2, and only 1 is supported
{format: 1, layers: {a: 2}} | fingerprint is missing
{format: 1, fingerprint: a, layers: [a]} | layers must be a mapping
{format: 1, fingerprint: a, layers: {a: 2.5}} | layers: a must be a whole number, got 2.5
{format: 1, fingerprint: a, layers: {a: -2}} | layers: a must be at least 0 and at most 16,777,216, got -2
{format: 1, fingerprint: a, layers: {a: 0}} | no layer has a side above 0
{format: 1, fingerprint: a, layer: {a: 2}} | layer is unknown
{format: 1, fingerprint: f, layers: {"../a": 1}} | cannot be the name
"""


@pytest.mark.parametrize("text, message", rows(NO_PLANS))
def test_files_that_are_no_plan(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with user_error(f"{path}.*{message}"):
        read_plan(path)


@pytest.mark.parametrize(
    "layer, side, message",
    [
        ("a", 7, "the side of a must be at least 1, and even for rotate, got 7"),
        (QUERY, 34, "of 32 x 32, is larger than it can use: give 32"),
        ("model.layers.0.self_attn.q_prj", 8, f"Did you mean '{QUERY}'"),
    ],
)
def test_sides_that_do_not_fit_are_named(layer, side, message):
    with user_error(message):
        inject(
            tiny_model(), TargetPlan("f", {layer: side}).apply_to(MoRAConfig(rank=8))
        )


# -- runs ------------------------------------------------------------------------------


def trained_sides(out):
    """r_hat of the layers in the latest checkpoint."""
    layers = read_json(out / "checkpoints/latest/adapter.json")["layers"]
    return {name: layer["operator"]["r_hat"] for name, layer in layers.items()}


def test_a_run_trains_merges_resumes_and_exports_what_the_plan_says(user, tmp_path):
    """Two ranks. The plan is edited, and then that of another model, after the start."""
    out = tmp_path / "planned"
    resumed = tmp_path / "resumed"
    path = tmp_path / "mine.yaml"
    fingerprint = BaseCheckpoint.open(user.model).fingerprint()
    TargetPlan(fingerprint, {QUERY: 10, DOWN: 6, "lm_head": 0}).write(path)
    run(
        2, research(user.flags(out, MERGING, "--export_merged"), tmp_path, targets=path)
    )
    assert trained_sides(out) == {QUERY: 10, DOWN: 6}
    assert_good(out, user.model)
    live = mora_ds.load_adapter(user.model, out / "checkpoints/latest")
    merged = type(live).from_pretrained(out / "merged")
    ids = torch.arange(3, 35).unsqueeze(0)
    assert torch.allclose(live(ids).logits, merged(ids).logits, atol=1e-5)

    shutil.copytree(out, resumed, symlinks=True)
    shutil.rmtree(resumed / "checkpoints/step-000006")
    (resumed / "checkpoints/latest").unlink()
    argv = user.flags(resumed, MERGING, "--resume_from_checkpoint auto")
    resume = research(argv, tmp_path, targets=path)
    run(2, resume)
    assert_same_run(resumed, out)
    assert TrainerState.read(resumed / "checkpoints/latest").step == 6

    text = path.read_text()
    path.write_text(text.replace(f"{QUERY}: 10", f"{QUERY}: 12"))
    message = validation_errors_of(resume, ranks=2)
    assert f"research.targets, {QUERY}: 10 there, 12 here" in message
    path.write_text(text.replace(fingerprint, "abc"))
    argv = research(user.flags(tmp_path / "other"), tmp_path, targets=path)
    assert "the plan is for a model with the fingerprint 'abc'" in validation_errors_of(
        argv
    )
    assert not (tmp_path / "other").exists()


def test_a_dry_run_counts_what_the_plan_says(user, tmp_path, out):
    path = tmp_path / "targets.yaml"
    TargetPlan("another", {QUERY: 10, DOWN: 6}).write(path)
    argv = research(user.flags(out, "--dry_run"), tmp_path, targets=path)
    report, lines = planned(parse(argv), 1)
    assert report.trained.total == 136
    assert "trainable 136 " in lines[0]
