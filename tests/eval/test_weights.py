"""Analysis of frozen weights against formulas, the probe against plain autograd, what the tool prints and writes."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.ops.mora import adjoint
from mora_ds.adapters.ops.spec import OperatorKind
from mora_ds.adapters.target_plan import read_plan
from mora_ds.common.errors import RunError, UserError
from mora_ds.data import Document
from mora_ds.eval.gradient_probe import GradientMeasures, probe, token_batches
from mora_ds.eval.weight_report import heat_map, report_lines, write_heat_map, write_report
from mora_ds.eval.weights import ESTIMATED, EXACT, Weight, WeightMeasures, analyse, measure_weight
from mora_ds.models import stored_names
from mora_ds.models.base import BaseCheckpoint, write_own_base
from mora_ds.train.targets import open_model
from tests.helpers.jobs import Playground
from tests.helpers.models import causal_loss, tiny_model, tokens
from tests.helpers.tools import call


def low_rank(d_out: int, d_in: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(side, len(values), generator=generator, dtype=torch.float64)).Q
        for side in (d_out, d_in)
    )
    return left @ values.double().diag() @ right.T


# -- weights -----------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr("mora_ds.eval.weights.LEADING", 48)
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


def test_a_weight_is_decomposed_exactly_up_to_the_side_that_is_given() -> None:
    weight, place = torch.randn(300, 310), Weight("w", 310, 300)
    assert [measure_weight("a", place, weight, exact_up_to=side).method for side in (300, 299)] == [EXACT, ESTIMATED]
    base: Any = SimpleNamespace(read=lambda key: weight)
    assert [each.method for each in analyse(base, {"a": place}, exact_up_to=299)] == [ESTIMATED]
    small = measure_weight("a", Weight("w", 40, 30), torch.randn(30, 40), exact_up_to=1)
    assert small.method == EXACT, "of fewer values than are estimated from, all are computed"


def test_estimates_do_not_depend_on_the_random_state_nor_change_it() -> None:
    weight, place = torch.randn(300, 310), Weight("w", 310, 300)
    torch.manual_seed(1)
    one, state = measure_weight("a", place, weight, exact_up_to=1), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert measure_weight("a", place, weight, exact_up_to=1) == one


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
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


def test_weights_that_are_converted_when_loaded_need_a_base_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "model")
    assert "model.layers.0.self_attn.q_proj" in open_model(tmp_path / "model", ["all-linear"]).weights
    monkeypatch.setattr(stored_names, "_only_stacks", lambda converter: False)
    with pytest.raises(UserError, match=r"MODEL: .* name the base that a run of it has written, OUTPUT_DIR/base"):
        open_model(tmp_path / "model", ["all-linear"])
    write_own_base(model, tmp_path / "base")
    assert "model.layers.0.self_attn.q_proj" in open_model(tmp_path / "base", ["all-linear"]).weights


def test_one_weight_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_own_base(tiny_model(), tmp_path / "model")
    opened, read, handed_out = open_model(tmp_path / "model", ["all-linear"]), BaseCheckpoint.read, []

    def watched(base: BaseCheckpoint, key: str) -> torch.Tensor:
        assert all(earlier() is None for earlier in handed_out)
        tensor = read(base, key)
        handed_out.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(BaseCheckpoint, "read", watched)
    assert len(list(analyse(opened.base, opened.weights))) == len(handed_out) == 14


# -- the probe ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("operator", ["rotate", "share"])
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


def test_a_probe_leaves_no_hooks_and_names_a_gradient_that_is_not_finite() -> None:
    model = tiny_model()
    model.train()
    measures = probe(model, MoRAConfig(rank=2), [tokens(2)])
    assert not model.training and all(not layer._forward_hooks for layer in mora_layers(model).values())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert measures[0].to_dict()["score"] == measures[0].score > 0
    broken = tiny_model()
    broken.lm_head.weight.data.fill_(torch.inf)
    with pytest.raises(RunError, match=r"model\.layers\.0\.self_attn\.q_proj: its gradient is not finite"):
        probe(broken, MoRAConfig(rank=2), [tokens(2)])


def root_mean(gradients: list[torch.Tensor]) -> float:
    return math.sqrt(sum(each.norm().item() ** 2 for each in gradients) / len(gradients))


class Letters:
    """A tokenizer: a letter a token."""

    eos_token_id = 0

    def __call__(self, text: str, **anything: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 96 for letter in text]}


def test_batches_are_the_first_tokens_one_behind_the_other() -> None:
    documents = [Document("abc", "1"), Document("de", "2"), Document("fghij", "3")]
    whole = token_batches(documents, Letters(), seq_len=3, count=2, rows=2)
    assert [each.tolist() for each in whole] == [[[1, 2, 3], [0, 4, 5]], [[0, 6, 7], [8, 9, 10]]]
    (short,) = token_batches(documents[:1], Letters(), seq_len=8, count=2, rows=2)
    assert short.tolist() == [[1, 2, 3]]
    (exact,) = token_batches(documents[:1], Letters(), seq_len=3, count=2, rows=2)
    (cut,) = token_batches([Document("abcd", "1")], Letters(), seq_len=3, count=2, rows=2)
    assert exact.tolist() == cut.tolist() == [[1, 2, 3]]
    (two,) = token_batches([Document("ab", "1")], Letters(), seq_len=8, count=1, rows=1)
    assert two.tolist() == [[1, 2]]
    chunks = [Document("ab", "1", ends=False), Document("cd", "1", begins=False), Document("e", "2")]
    endless: Any = Letters()
    for tokenizer, expected in ((Letters(), [1, 2, 3, 4, 0, 5]), (endless, [1, 2, 3, 4, 5])):
        endless.eos_token_id = None
        assert token_batches(chunks, tokenizer, seq_len=len(expected), count=1, rows=1)[0].tolist() == [expected]
    with pytest.raises(UserError, match="--probe: there are fewer than two tokens"):
        token_batches([Document("a", "1")], Letters(), seq_len=8, count=1, rows=1)


# -- report and tool ---------------------------------------------------------------------------------------------------


def test_a_heat_map_has_types_down_and_blocks_across() -> None:
    kinds, blocks, values = heat_map({"m.0.q": 1.0, "m.1.q": 3.0, "m.1.experts.0.q": 5.0, "m.1.o": 2.0, "head": 7.0})
    assert (kinds, blocks) == (["q", "o", "head"], [0, 1])
    assert values[0] == [1.0, 4.0] and values[1][1] == 2.0 and math.isnan(values[1][0]) and values[2][0] == 7.0


def three_layers() -> tuple[list[WeightMeasures], dict[str, GradientMeasures]]:
    """Two layers of a type and one of another, and what a probe found of them."""
    rows = [
        WeightMeasures("m.0.q", 8, 4, EXACT, 3.0, (2.0, 1.0), 1.5, 2.0, (1, 2, 3)),
        WeightMeasures("m.1.q", 8, 4, EXACT, 5.0, (4.0, 1.0), 2.5, 3.0, (1, 3, 4)),
        WeightMeasures("m.0.o", 4, 8, EXACT, 7.0, (6.0, 1.0), 3.5, 1.0, (2, 2, 2)),
    ]
    norms = {"m.0.q": (1.0, 10.0), "m.1.q": (3.0, 30.0), "m.0.o": (5.0, 50.0)}
    return rows, {name: GradientMeasures(name, 8, 4, 2, *pair) for name, pair in norms.items()}


def test_the_tables_have_a_line_a_layer_and_the_means_of_a_type() -> None:
    lines = [line.split() for line in report_lines(*three_layers())]
    titles = "d_in d_out norm s_1 stable effective of full 50% 90% 99% |dL/dM| |dL/dW|"
    assert " ".join(lines[0]) == f"layer {titles}" and " ".join(lines[5]) == f"type layers {titles}"
    first = "8 4 3.000e+00 2.000e+00 1.5 2.0 50.0% 1 2 3 1.000e+00 1.000e+01"
    assert lines[1] == ["m.0.q", *first.split()]
    mean = "8 4 4.000e+00 3.000e+00 2.0 2.5 62.5% 1 2 4 2.000e+00 2.000e+01"
    assert lines[6] == ["q", "2", *mean.split()] and lines[7][:4] == ["o", "1", "4", "8"]


def test_json_has_every_measure_of_every_layer(tmp_path: Path) -> None:
    rows, gradients = three_layers()
    write_report(tmp_path / "a.json", "model", rows, gradients)
    content = json.loads((tmp_path / "a.json").read_text())
    assert (content["format"], content["model"], content["energy_shares"]) == (1, "model", [0.5, 0.9, 0.99])
    assert content["layers"][1] == {
        "module": "m.1.q", "d_in": 8, "d_out": 4, "method": "exact", "norm": 5.0, "leading": [4.0, 1.0],
        "stable_rank": 2.5, "effective_rank": 3.0, "energy_ranks": [1, 3, 4], "score": 0.75,
        "gradients": gradients["m.1.q"].to_dict(),
    }  # fmt: skip


def test_the_scores_of_weights_and_of_the_probe_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn: list[Any] = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    rows, gradients = three_layers()
    write_heat_map(tmp_path / "map.png", rows, gradients)
    images = [axis.get_images()[0].get_array() for axis in drawn[0].axes if axis.get_title()]
    ranks, probed = (image.filled(-1).tolist() for image in images)
    assert ranks == [[0.5, 0.75], [0.25, -1]]
    assert probed == [[gradients[name].score for name in ("m.0.q", "m.1.q")], [gradients["m.0.o"].score, -1]]


def test_the_tool_prints_writes_and_plans(user: Playground, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probing = ("--probe", user.train, "--seq_len", "32", "--probe_batches", "2", "--mora_rank", "2")
    plan, told = tmp_path / "targets.yaml", tmp_path / "weights.json"
    call("analyze_weights", user.model, "--json", told, "--trainable_budget", "3%", "--write", plan, *probing)
    printed = capsys.readouterr().out
    assert "probe: 64 tokens in 2 batch(es), rotate/permuted" in printed
    assert "model.layers.1.mlp.down_proj" in printed and "|dL/dW|" in printed and "plan by probe: " in printed
    content = json.loads(told.read_text(encoding="utf-8"))
    assert len(content["layers"]) == 14 and content["layers"][0]["gradients"]["weight_norm"] > 0
    by_probe = read_plan(plan)
    opened = open_model(user.model, ["all-linear"])
    budget = int(0.03 * opened.parameters)
    assert 0.99 * budget <= by_probe.parameters <= budget and by_probe.by == "probe"
    call("analyze_weights", user.model, "--trainable_budget", "3%", "--write", plan, "--mora_rank", "2")
    assert read_plan(plan).by == "weights" and dict(read_plan(plan).sides) != dict(by_probe.sides)


def test_a_heat_map_is_drawn(user: Playground, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    call("analyze_weights", user.model, "--png", tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_estimates_are_marked_in_the_table() -> None:
    row = measure_weight("m.0.q", Weight("w", 300, 300), torch.randn(300, 300), exact_up_to=1)
    lines = report_lines([row], {})
    assert any("m.0.q*" in line for line in lines) and "*: estimated from" in lines[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trainable_budget", "1%"], "--trainable_budget and --write belong together"),
        (["--write", "OUT/t.yaml"], "--trainable_budget and --write belong together"),
        (["--write", "OUT/no/t.yaml", "--trainable_budget", "1%"], "--write .*folder that exists"),
        (["--write", "OUT/t.yaml", "--trainable_budget", "3"], "3 parameters are too few for one MoRA matrix"),
        (["--write", "OUT/t.yaml", "--trainable_budget", "much"], "--trainable_budget must be like"),
        (["--seq_len", "1"], "--seq_len must be at least 2"),
        (["--probe", "OUT/none.txt"], "--probe"),
        (["--probe", "TRAIN", "--operator", "subspace"], "--probe has no singular vectors for --operator subspace"),
        (["--target_modules", "q_prj"], "--target_modules 'q_prj' matches no linear layer"),
        (["--probe", "TRAIN", "--seq_len", "4096"], "--seq_len 4096 is longer than the model's 128 positions"),
    ],
)
def test_what_the_tool_refuses(user: Playground, tmp_path: Path, flags: list[str], message: str) -> None:
    given = [flag.replace("OUT", str(tmp_path)).replace("TRAIN", str(user.train)) for flag in flags]
    with pytest.raises(UserError, match=message):
        call("analyze_weights", user.model, *given)


def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="MODEL: no such folder"):
        call("analyze_weights", tmp_path / "nothing")


def test_the_default_operator_of_a_plan_is_that_of_a_run() -> None:
    assert MoRAConfig(rank=8).step == 2 and MoRAConfig(rank=8).kind is OperatorKind.ROTATE
    assert MoRAConfig(rank=256).step == 1
