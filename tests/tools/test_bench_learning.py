"""tools/bench/learning.py: what it refuses, which rate it calls the best, and that a finished run is not repeated."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.muon import original_muon
from safetensors.torch import load_file, save_file
from torch import nn

from mora_ds.adapters.layer import MoRALinear
from mora_ds.adapters.ops.linear import Compute
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from mora_ds.common.errors import UserError
from mora_ds.config.arguments import parse
from mora_ds.config.validate import validate
from mora_ds.data import load_corpus, load_tokenizer
from mora_ds.engine.optimizer_view import Flat, Span
from mora_ds.remora.merge import ReMoRA
from mora_ds.remora.schedule import Schedule, ScheduleKind
from tests.helpers.jobs import Playground
from tests.helpers.models import causal_loss, tiny_model, tokens
from tests.helpers.tools import call, tool
from tools import figures_learning
from tools.bench.learning_methods import METHODS_FILE, Methods
from tools.bench.trials import flags

BAD = (
    (["--methods", "loar"], "Did you mean 'lora'?"),
    (["--methods", "lora@fast"], "'fast' is no learning rate"),
    (["--steps", "0"], "at least 1"),
    (["--batch", "0"], "at least 1"),
    (["--replay", "1.0"], "--replay 1.0: a share"),
    (["--base", "MODEL"], "belong together"),
    (["--base", "gone", "--new", "a", "b", "--old", "c", "d"], "there is no gone"),
    (["--methods_file", "gone.yaml"], "gone.yaml"),
    (["--with", "gone.json"], "--with: there is no gone.json"),
)


@pytest.mark.parametrize("flags, message", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_flags_are_named_before_anything_runs(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        call("bench/learning", "--work", tmp_path / "work", *flags)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "method, message",
    [("{rates: []}", "positive rates"), ("{rates: [1], replay: 1.5}", "shares"), ("{rates: [1], cycle: 2}", "cycle")],
)
def test_bad_methods_are_named_with_their_file(tmp_path: Path, method: str, message: str) -> None:
    path = tmp_path / "methods.yaml"
    path.write_text(f"settings: {{}}\nmethods: {{own: {method}}}\n")
    with pytest.raises(UserError, match=f"methods.yaml.*{message}"):
        call("bench/learning", "--work", tmp_path / "work", "--methods_file", path)


@pytest.mark.parametrize("path", sorted(METHODS_FILE.parent.glob("learning*.yaml")), ids=lambda path: path.stem)
def test_every_method_is_one_that_the_training_program_takes(user: Playground, path: Path) -> None:
    found = Methods.read(path)
    files = {"model_name_or_path": user.model, "train_files": [user.train], "eval_files": [user.held]}
    for method in found.methods.values():
        for rate in method.rates:
            validate(
                parse(flags({**files, "max_steps": 3000, **found.settings, **method.settings(rate, 3000, user.held)}))
            )


def test_of_rates_that_learn_alike_the_one_that_forgets_least_is_best() -> None:
    bench = tool("bench/learning")
    rows = [
        bench.Row("lora", 8, 1e-3, 10, new={1: 250.0, 2: 252.0}, old={1: 90.0, 2: 90.0}),
        bench.Row("lora", 8, 1e-2, 10, new={1: 201.0, 2: 203.0}, old={1: 100.0, 2: 102.0}),
        bench.Row("lora", 8, 3e-2, 10, new={1: 201.0, 2: 200.0}, old={1: 130.0, 2: 131.0}),
        bench.Row("full", 0, 1e-3, 99, new={1: 101.0}, old={1: 99.0}),
        bench.Row("mora-rotate", 8, 1e-2, 9, new={1: 176.0, 2: 300.0}, old={1: 99.0, 2: 99.0}),
    ]
    assert [(row.method, row.rate) for row in bench._best(rows)][:2] == [("lora", 1e-2), ("full", 1e-3)]
    assert bench._rate(rows[1], (1e-3, 1e-2, 3e-2)) == "0.01" and bench._rate(rows[2], (1e-2, 3e-2)) == "0.03*"
    assert bench._rate(rows[1], (1e-2,)) == "0.01"
    shown = {row.method: row for row in rows[1:] if row.rate != 3e-2}
    assert bench._gap(rows[4], shown) == "25%", "of the one seed that all three have"
    assert bench._gap(rows[1], shown) == "-" and bench._gap(rows[4], {}) == "-"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings of all runs and their trials. The runs are pretended: 0.01 is the best learning rate."""
    ran: list[dict[str, Any]] = []

    def pretend(settings: dict[str, Any], log: Path, trial: list[str]) -> None:
        folder = Path(settings["output_dir"])
        folder.mkdir()
        ran.append({**settings, "trial": trial})
        found = {"new": 100.0 + settings["seed"] + 1e4 * abs(settings["learning_rate"] - 1e-2), "old": 200.0}
        (folder / "summary.json").write_text(json.dumps({"trainable_params": 7, "perplexity_after": found}))
        rows: list[dict[str, Any]] = [{"step": 10, "loss": 5.0}, {"step": 20, "eval": found}]
        if "eval_tasks" in settings:
            rows += [{"step": 20, "tasks": {"quiz": {"acc_norm": 0.5, "acc": 0.1 + settings["seed"] / 10}}}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(tool("bench/learning"), "pretrain_alone", pretend)
    return ran


def texts(user: Playground) -> list[object]:
    return ["--base", user.model, "--new", user.train, user.held, "--old", user.train, user.other, "--jobs", 1]


FLAGS = ["--steps", 40, "--seeds", 2, "--sweep_seeds", 1]


def test_a_finished_run_is_not_repeated(user: Playground, tmp_path: Path, ran: list[dict[str, Any]]) -> None:
    flags = [*texts(user), "--work", tmp_path / "work", "--json", tmp_path / "all.json", *FLAGS]
    flags += ["--methods", "lora@0.003", "lora@0.01", "lora@0.03", "relora@0.01"]
    call("bench/learning", *flags)
    assert [each["learning_rate"] for each in ran] == [3e-3, 1e-2, 3e-2, 1e-2, 1e-2, 1e-2]
    assert [each.get("merge_every") for each in ran] == [None, None, None, 10, None, 10]
    found = json.loads((tmp_path / "all.json").read_text())
    assert len(found["runs"]) == 6
    assert not any(str(each) in json.dumps(found["runs"]) for each in (tmp_path, user.root))
    assert found["runs"][0]["curve"] == [{"step": 20, "new": pytest.approx(171.0), "old": 200.0}]
    row = found["tables"]["learning"][1]
    assert row[:5] == ["lora", "7", "0.01", "2", "101.5"]
    tokenizer, held = load_tokenizer(user.model), list(load_corpus([str(user.held)]).texts())
    nats = math.log(101.5) * sum(len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in held)
    assert row[-2] == f"{nats / math.log(2) / len(''.join(held).encode()):.3f}"
    call("bench/learning", *flags)
    assert len(ran) == 6
    call("bench/learning", *flags, "--rank", 4)
    assert len(ran) == 12 and {each["per_device_train_batch_size"] for each in ran} == {8}
    call("bench/learning", *flags, "--methods", "lora@0.01", "--batch", 2)
    assert [each["per_device_train_batch_size"] for each in ran[12:]] == [2, 2]
    call("bench/learning", *flags, "--methods", "lora@0.01", "mora-rotate@0.01", "--compute", "weight")
    assert [each.get("compute") for each in ran[14:]] == ["weight", "weight"], "LoRA's runs are done"
    call("bench/learning", *flags, "--methods", "none", "recipe@0.01", "--replay", 0.25)
    assert [each.get("replay") for each in ran[16:]] == [None, *[[f"old={user.train}:0.25"]] * 2]
    del ran[16:]
    call("bench/learning", *flags)
    for folder in (tmp_path / "work" / "results").glob("r8-40-relora-*"):
        folder.unlink()
    call("bench/learning", *flags)
    assert len(ran) == 18


def test_scores_of_tasks_have_a_column(user: Playground, tmp_path: Path, ran: list[dict[str, Any]]) -> None:
    plain, scored = tmp_path / "plain.json", tmp_path / "scored.json"
    flags = [*texts(user), *FLAGS, "--work", tmp_path, "--methods"]
    call("bench/learning", *flags, "relora@0.01", "--json", plain)
    for folder in ("here", "there"):
        tasks = ["--tasks", tmp_path / folder / "quiz.yaml"]
        call("bench/learning", *flags, "lora@0.01", "full@0.01", *tasks, "--json", scored)
        assert [each.get("eval_tasks") for each in ran[2:]] == [[str(tmp_path / "here" / "quiz.yaml")]] * 4
    head, *rows = json.loads(scored.read_text())["tables"]["learning"]
    assert head[-1] == "quiz" and [row[-1] for row in rows] == ["25.0%", "25.0%"]
    assert [run["scores"]["quiz"] for run in json.loads(scored.read_text())["runs"]][:2] == [0.2, pytest.approx(0.3)]
    assert json.loads(plain.read_text())["tables"]["learning"][0][-1] == "old, b/B"
    runs = json.loads(plain.read_text())["runs"]
    plain.write_text(json.dumps({"runs": [{key: run[key] for key in run if key != "scores"} for run in runs]}))
    call("bench/learning", *flags, "relora@0.01", "--with", plain, "--json", scored)
    assert json.loads(scored.read_text())["tables"]["learning"][1][0] == "relora", "of a version without scores"
    with pytest.raises(UserError, match="not the same flags"):
        call("bench/learning", *flags, "relora@0.01", *tasks, "--with", plain)


def test_the_base_that_is_made(
    user: Playground, tmp_path: Path, ran: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    start = Path(shutil.copytree(user.model, tmp_path / "start"))

    def warm_base(*given: Any, **settings: Any) -> SimpleNamespace:
        made.extend((*given, settings))
        for name in ("domain", "general"):
            for part, path in (("train", user.train), ("eval", user.held)):
                document = {"text": path.read_text(encoding="utf-8")}
                (tmp_path / f"{name}_{part}.jsonl").write_text(json.dumps(document))
        return SimpleNamespace(warm=user.model, start=start, corpus=tmp_path)

    monkeypatch.setattr(tool("bench/learning"), "warm_base", warm_base)
    flags = ["--base_config", "own.json", "--base_steps", 7, "--base_rate", 1e-4, "--bf16"]
    call("bench/learning", "--work", tmp_path / "work", *FLAGS, *flags, "--methods", "full@0.01", "--jobs", 1)
    warm = {"max_steps": 7, "learning_rate": 1e-4, "bf16": True}
    assert made == [tmp_path / "work" / "base", 8, Path("own.json"), warm]
    assert [each["bf16"] for each in ran] == [True, True]
    scratch = ["--base_steps", 0, "--methods", "full@0.01", "--jobs", 1]
    call("bench/learning", "--work", tmp_path / "work", *FLAGS, *scratch)
    assert made[-1]["max_steps"] == 0 and {each["model_name_or_path"] for each in ran[2:]} == {start}


def test_a_table_grows_by_the_runs_of_an_earlier_one(
    user: Playground, tmp_path: Path, ran: list[dict[str, Any]]
) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    call("bench/learning", *texts(user), *FLAGS, "--work", tmp_path / "one", "--methods", "lora", "--json", first)
    assert len(ran) == 4
    moved = replace(user, train=Path(shutil.copy(user.train, tmp_path / "moved.jsonl")))
    more = ["--work", tmp_path / "two", "--with", first, "--json", second]
    call("bench/learning", *texts(moved), *FLAGS, *more, "--methods", "lora@0.01", "recipe@0.003", "--seeds", 3)
    assert [(each["seed"], "replay" in each) for each in ran[4:]] == [(1, True), (3, False), (2, True), (3, True)]
    found = json.loads(second.read_text())
    rows = [[row[0], row[2], row[3]] for row in found["tables"]["learning"][1:]]
    assert rows == [["lora", "0.01", "3"], ["recipe", "0.003", "3"]]
    runs = [(run["method"], run["learning_rate"], run["seed"]) for run in found["runs"]]
    assert runs[:5] == [("lora", 3e-3, 1), ("lora", 1e-2, 1), ("lora", 1e-2, 2), ("lora", 1e-2, 3), ("lora", 3e-2, 1)]

    def refused(message: str, *flags: object, **changes: Path) -> None:
        with pytest.raises(UserError, match=f"--with .*first.json: {re.escape(message)}"):
            call("bench/learning", *texts(replace(user, **changes)), *more, "--methods", "none", *flags)

    refused("not the same flags as here: r8-41-lora-0.003-1", *FLAGS, "--steps", 41)
    refused("not the same texts as here: r8-40-lora", *FLAGS, train=user.held)
    other = shutil.copytree(user.model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] + 1}, other / "model.safetensors")
    refused("not the same base as here", *FLAGS, model=other)
    only = tmp_path / "methods.yaml"
    only.write_text("settings: {}\nmethods: {none: {flags: {adapter: none}, rates: [1]}}\n")
    refused("unknown --methods_file 'lora'", *FLAGS, "--methods_file", only)
    assert len(ran) == 8


def test_ranks_are_compared_in_one_table(user: Playground, tmp_path: Path, ran: list[dict[str, Any]]) -> None:
    reports = [tmp_path / f"{rank}.json" for rank in (4, 2)]
    for report, rank in zip(reports, (4, 2), strict=True):
        flags = ["--work", tmp_path / f"at-{rank}", "--rank", rank, "--methods", "lora@0.01", "--json", report]
        call("bench/learning", *texts(user), *FLAGS, *flags)
    flags = [
        "--methods",
        "full@0.01",
        "recipe-product-4@0.01",
        "lora@0.01",
        "--with",
        *reports,
        "--json",
        tmp_path / "all.json",
    ]
    call("bench/learning", *texts(user), *FLAGS, "--work", tmp_path / "all", "--rank", 2, 4, *flags)
    assert [each["mora_rank"] for each in ran] == [4, 4, 2, 2, 2, 4, 2, 4], (
        "without a rank of its own a method runs once"
    )
    found = json.loads((tmp_path / "all.json").read_text())
    rows = [row[:2] for row in found["tables"]["learning"]]
    assert rows == [["rank", "method"], ["-", "full"], ["-", "recipe-product-4"], ["2", "lora"], ["4", "lora"]]
    points = figures_learning.points(tmp_path / "all.json")
    assert [(point.method, point.rank, len(point.new)) for point in points] == [
        ("full", 0, 2), ("recipe-product-4", 0, 2), ("lora", 2, 2), ("lora", 4, 2),
    ]  # fmt: skip
    figures_learning.draw_long(tmp_path / "all.json", tmp_path)
    assert "LoRA" in (tmp_path / "learning-ranks.svg").read_text() and (tmp_path / "all.svg").is_file()


def test_curves_from_scratch_leave_out_the_untrained_model(tmp_path: Path) -> None:
    curve = [{"step": step, "new": value, "old": value} for step, value in ((10, 50.0), (20, 30.0))]
    run = {"is_best": True, "trained": 1, "rank": 8, "curve": curve, "perplexity": {"new": 30.0, "old": 30.0}}
    none = {**run, "method": "none", "rank": 0, "curve": [], "perplexity": {"new": 2100.0, "old": 2100.0}}
    path = tmp_path / "from_here.json"
    path.write_text(json.dumps({"runs": [none, {**run, "method": "lora"}]}))
    for from_scratch in (False, True):
        figures_learning.draw_long(path, tmp_path, from_scratch)
        assert (">2000<" in (tmp_path / "from-here.svg").read_text()) is not from_scratch
    assert not (tmp_path / "learning-ranks.svg").exists()


def test_every_learning_rate_of_every_rank_is_drawn(tmp_path: Path) -> None:
    kinds = [("full", 0, 0.5), ("lora", 2, 1e-3), ("lora", 2, 4e-3), ("lora", 8, 2e-3), ("mora-rotate", 8, 8e-3)]
    runs = [{"method": method, "rank": rank, "learning_rate": rate, "perplexity": {"new": 100 + 1e4 * rate}}
            for method, rank, rate in kinds]  # fmt: skip
    (tmp_path / "learning_rates.json").write_text(json.dumps({"runs": runs}))
    figures_learning.draw_rates(tmp_path / "learning_rates.json", tmp_path)
    found = (tmp_path / "learning-rates.svg").read_text()
    for shown in (">LoRA<", ">MoRA<", ">rank 2<", ">rank 8<", ">0.001<", ">0.004<", ">0.002<", ">0.008<"):
        assert shown in found
    assert ">0.5<" not in found, "full training has no rank"
    figures_learning.draw_rates(tmp_path / "gone.json", tmp_path)


# -- trials ------------------------------------------------------------------------------------------------------------


def test_a_trial_is_run_by_its_own_program(user: Playground, tmp_path: Path, ran: list[dict[str, Any]]) -> None:
    call("bench/learning", *texts(user), "--work", tmp_path, "--seeds", 1, "--methods", "hadamard@0.01", "lora@0.01")
    assert [each["trial"] for each in ran] == [["hadamard", str(user.train)], []]
    with pytest.raises(UserError, match="TRIAL none-5: the first lines of learning_trials"):
        call("bench/learning_trials", "none-5", user.train, *user.flags(tmp_path / "out"))


def test_the_rows_whose_frequency_changes_most_are_trained_alone(user: Playground, tmp_path: Path) -> None:
    trials, tokenizer = tool("bench/learning_trials"), load_tokenizer(user.model)
    old, new = "z" * 20, "z" * 10 + "q" * 10
    grows, falls = (tokenizer(letter * 20)["input_ids"][-1] for letter in "qz")
    for name, text in (("old.txt", old), ("new.txt", new)):
        (tmp_path / name).write_text(text)
    paths = (str(user.model), str(tmp_path / "new.txt"), str(tmp_path / "old.txt"))
    assert trials._rows(*paths, 1, "rows").tolist() == [grows]
    assert sorted(trials._rows(*paths, 2, "drift").tolist()) == sorted([grows, falls])
    for tied, tables in ((True, 1), (False, 2)):
        model = tiny_model("llama", tie_word_embeddings=tied)
        ids = tokens(3)
        rows = ids.unique()[:2]
        assert trials._train_rows(model, rows) == -tables * (128 - 2) * 32
        causal_loss(model, ids).backward()
        for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            assert weight.grad.any(1).nonzero().flatten().tolist() == rows.tolist()


def test_each_trial_computes_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    trials, model, ids = tool("bench/learning_trials"), tiny_model("llama"), tokens(2)
    before, shift = model(ids).logits, torch.zeros(128)
    assert trials._add_bias(model) == len(shift)
    model.get_output_embeddings().shift.data[7] = shift[7] = 0.5
    assert torch.allclose(model(ids).logits, before + trials.BIAS_RATE * shift, atol=1e-5)

    layer = MoRALinear(nn.Linear(12, 8), OperatorSpec(OperatorKind.ROTATE, 12, 8, 4))
    x, square = torch.randn(3, 12), torch.randn(4, 4, requires_grad=True)
    delta = layer.weight / layer.weight.square().mean().sqrt() * layer.spec.delta_weight(square.detach())
    product = trials._hadamard(layer, x, square, None)
    assert torch.allclose(product, F.linear(x, layer.weight + delta, layer.bias), atol=1e-6)
    product.square().sum().backward()
    assert square.grad is not None and square.grad.all()

    monkeypatch.setattr(MoRALinear, "product", MoRALinear.product)
    trials._scale_by_side(6)
    product = layer.product(x, square, Compute.WEIGHT)
    assert torch.allclose(
        product, F.linear(x, layer.weight + layer.spec.delta_weight(1.5 * square), layer.bias), atol=1e-6
    )

    monkeypatch.setattr(original_muon, "muon_update", lambda update: update)
    trials._match_rms()
    updated = original_muon.muon_update(torch.linalg.qr(torch.randn(64, 64)).Q)
    assert updated.square().mean().sqrt() == pytest.approx(trials.RMS)

    monkeypatch.setattr(Schedule, "merges_after", Schedule.merges_after)
    trials._shrink_cycles()
    schedule = Schedule(ScheduleKind.COSINE, 0.01, total_steps=300, merge_every=3, restart_warmup_steps=1)
    lengths = [after - before for before, after in itertools.pairwise([0, *schedule.merge_steps(), 300])]
    assert lengths == [3 * odd for odd in range(19, 0, -2)]


def test_a_merge_carries_the_first_moment_into_the_next_grouping(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = tool("bench/learning_trials")
    old, new = (OperatorSpec(OperatorKind.ROTATE, 12, 8, 4, Grouping.PERMUTED, seed) for seed in (1, 2))
    first, second = torch.randn(4, 4), torch.rand(4, 4)
    assert torch.allclose(trials.carry(old, old, first), first, atol=1e-6), "the same grouping changes nothing"
    carried = trials.carry(old, new, first)
    whole = old.delta_weight(first) / 3
    assert torch.allclose(old.adjoint(whole), first, atol=1e-6)
    assert torch.allclose(carried, new.adjoint(whole), atol=1e-6)

    model = nn.ModuleDict({"layer": (layer := MoRALinear(nn.Linear(12, 8), old))})
    held = torch.cat([torch.ones(3), first.flatten()]), torch.cat([torch.ones(3), second.flatten()])
    spans = [Span(layer.value, 0, 16, 3)]
    flat = Flat(0, torch.empty(19), dict(zip(("exp_avg", "exp_avg_sq"), held, strict=True)), spans, spans)

    def start_cycle(self: object, cycle: int) -> float:
        layer.spec = new
        return 0.25

    monkeypatch.setattr(trials, "view_of", lambda engine: SimpleNamespace(flats=lambda group: [flat]))
    monkeypatch.setattr(ReMoRA, "_start_cycle", start_cycle)
    trials._carry_moments()
    assert ReMoRA._start_cycle(SimpleNamespace(engine=SimpleNamespace(module=model)), 1) == 0.25  # type: ignore[arg-type]
    assert torch.allclose(held[0], torch.cat([torch.ones(3), carried.flatten()]))
    assert torch.allclose(held[1], torch.cat([torch.ones(3), second.mean().expand(16)]))
