"""Plans of MoRA matrices: budgets, the file, and what a config makes of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mora_ds.adapters.config import MoRAConfig, config_from_dict
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.target_plan import TargetPlan, check_model, parse_budget, read_plan, with_sizes
from mora_ds.common.errors import UserError
from mora_ds.models.base import write_own_base
from mora_ds.train.targets import open_model
from tests.helpers.models import tiny_model


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
        ("1e999999", "must be below 9223372036854775808"),
        ("1e999999%", "must be below 9223372036854775808"),
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
    report = inject(model, with_sizes(config, plans[0].sides))
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
    config = with_sizes(MoRAConfig(operator="share"), {"b": 3, "a": 5, "c": 0})
    assert config.planned_layers == ("a", "b") and config.size_of("b", 8, 8) == 3
    assert config_from_dict(config.to_dict()) == config
    assert config.to_dict()["layer_sizes"] == {"a": 5, "b": 3}
    with pytest.raises(UserError, match="--targets: the plan gives c no MoRA matrix"):
        config.size_of("c", 8, 8)


def test_sides_that_no_operator_takes() -> None:
    with pytest.raises(UserError, match=r"^FILE: the side of a must be at least 1, and even for rotate, got 7"):
        with_sizes(MoRAConfig(rank=8), {"a": 7}, "FILE")
    config = with_sizes(MoRAConfig(rank=8), {"model.layers.0.self_attn.q_proj": 34})
    with pytest.raises(
        UserError,
        match=r"side 34 on model\.layers\.0\.self_attn\.q_proj, .* of 32 x 32, is larger than it can use: give 32",
    ):
        inject(tiny_model(), config)


def test_planned_layers_that_do_not_exist_are_named() -> None:
    config = with_sizes(MoRAConfig(rank=8), {"model.layers.0.self_attn.q_prj": 8, "model.layers.1.mlp.up_proj": 8})
    with pytest.raises(UserError, match=r"q_prj\. Did you mean 'model\.layers\.0\.self_attn\.q_proj'\?$"):
        inject(tiny_model(), config)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
YAMLS = {
    "by anchors that are repeated": BOMB,
    "no valid YAML": "? [a]\n: 1\n",
    "nested too deeply": "a: " + "[" * 5000,
    "must be a whole number": "format: 1\nfingerprint: f\nlayers: {a: 1" + "0" * 40 + "}\n",
    "cannot be the name": 'format: 1\nfingerprint: f\nlayers: {"../a": 1}\n',
    "more than": "a: &a [*a]\n",
}


def test_a_pipe_is_no_targets_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "targets.yaml")
    with pytest.raises(UserError, match="is no file"):
        read_plan(tmp_path / "targets.yaml")


@pytest.mark.parametrize("words", YAMLS)
def test_a_file_by_a_stranger_is_refused_in_no_time(tmp_path: Path, words: str) -> None:
    (tmp_path / "targets.yaml").write_text(YAMLS[words], encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read_plan(tmp_path / "targets.yaml")
