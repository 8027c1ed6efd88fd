"""The subspace operator: the contract of every operator, its vectors, and whole runs with merges, resume and export."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.layer import SubspaceLinear
from mora_ds.adapters.ops import singular_vectors
from mora_ds.adapters.ops.delta import live_weight
from mora_ds.adapters.ops.subspace import SubspaceSpec, subspace_update
from mora_ds.adapters.ops.update import spec_from_dict
from mora_ds.checkpoint.ledger_tools import drop
from mora_ds.checkpoint.ledger_tools import verify as verify_ledger
from mora_ds.checkpoint.verify import verify
from mora_ds.config.arguments import parse
from mora_ds.config.validate import validate
from mora_ds.deploy.adapter_io import export_adapter, load_adapter
from mora_ds.deploy.export import export_merged
from mora_ds.errors import RunError, UserError
from mora_ds.eval.ledger_summary import summarize
from mora_ds.eval.spectrum import layer_spectra, singular_values
from mora_ds.models.base import BaseCheckpoint, write_own_base
from mora_ds.models.svd import OVERSAMPLED, Wanted, leading_vectors
from mora_ds.planning.step import Work, measure_step, planned_model
from mora_ds.remora.ledger import VECTORS_FILE, Ledger
from mora_ds.train.dry_run import planned
from mora_ds.train.run import Run, with_vectors
from mora_ds.train.vectors import wanted_vectors
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, curve, losses, refused, run
from tests.helpers.models import tiny_model, tokens
from tests.helpers.operators import random
from tests.helpers.singular_vectors import MODULE, register_vectors

SHAPES = [(16, 16, 4), (12, 20, 5), (20, 12, 12), (13, 7, 7), (1, 9, 1), (9, 1, 1), (6, 6, 6)]
"""(d_in, d_out, r_hat)"""


@pytest.fixture(params=SHAPES, ids=str)
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> SubspaceSpec:
    d_in, d_out, r_hat = request.param
    name = register_vectors(random(d_out, d_in, seed=7), min(d_in, d_out), tmp_path)
    return SubspaceSpec(d_in, d_out, r_hat, MODULE, name, first=min(d_in, d_out) // 2)


def test_vectors_outlive_a_checkpoint_that_was_looked_into(tmp_path: Path) -> None:
    """A checkpoint is opened while its run goes on, and deleted as the run keeps only newer ones."""
    weight = random(6, 5)
    name = register_vectors(weight, 5, tmp_path)
    ledger = Ledger.create(tmp_path / "ledger", "base", singular_vectors.path_of(name))
    Ledger.open(tmp_path / "ledger")
    ledger.copy_to(tmp_path / "checkpoint")
    Ledger.open(tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "checkpoint")
    assert singular_vectors.norm(name, MODULE) == pytest.approx(weight.norm().item(), rel=1e-6)
    assert singular_vectors.path_of(name) == tmp_path / "ledger" / VECTORS_FILE
    shutil.rmtree(tmp_path / "ledger")
    assert singular_vectors.read(name, MODULE, 0, 5)[0].shape == (5, 6), "an adapter in memory needs its folder no more"


# -- the contract ------------------------------------------------------------------------------------------------------


def test_delta_weight_is_the_update(spec: SubspaceSpec) -> None:
    square, x = random(spec.r_hat, spec.r_hat), random(2, 3, spec.d_in, seed=1)
    delta = spec.delta_weight(square)
    assert delta.shape == (spec.d_out, spec.d_in)
    vectors = spec.sides(x.device, x.dtype)
    torch.testing.assert_close(subspace_update(square, vectors, x), x @ delta.T, rtol=1e-12, atol=1e-12)


def test_adjoint_and_the_gradient_of_the_square(spec: SubspaceSpec) -> None:
    square, gradient = random(spec.r_hat, spec.r_hat).requires_grad_(), random(spec.d_out, spec.d_in, seed=1)
    left, right = (spec.delta_weight(square) * gradient).sum(), (square * spec.adjoint(gradient)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    x, g = random(3, spec.d_in, seed=1), random(3, spec.d_out, seed=2)
    update = subspace_update(square, spec.sides(x.device, x.dtype), x)
    (found,) = torch.autograd.grad(update, square, g)
    torch.testing.assert_close(found, spec.adjoint(g.T @ x), rtol=1e-12, atol=1e-12)


def test_gradcheck(tmp_path: Path) -> None:
    spec = SubspaceSpec(7, 5, 3, MODULE, register_vectors(random(5, 7), 3, tmp_path))
    vectors = spec.sides(torch.device("cpu"), torch.float64)
    inputs = random(3, 3).requires_grad_(), random(2, 7, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda square, x: subspace_update(square, vectors, x), inputs)


@pytest.mark.parametrize("kind", ["linear", "linear with bias", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_is_base_plus_delta(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base: Any = Conv1D(10, 14) if kind == "conv1d" else nn.Linear(14, 10, bias=kind == "linear with bias")
    weight = base.weight.T if kind == "conv1d" else base.weight
    base, spec = base.to(dtype), SubspaceSpec(14, 10, 6, MODULE, register_vectors(weight.detach(), 10, tmp_path))
    layer, x = SubspaceLinear(base, spec), torch.randn(3, 5, 14).to(dtype).requires_grad_()
    assert torch.equal(layer(x), base(x)), "a zero square changes nothing"
    layer.square.data.normal_()
    expected = base(x) + x @ spec.delta_weight(layer.square.data.float()).to(dtype).T
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.1}
    torch.testing.assert_close(layer(x), expected, **tolerance)
    layer.spec = replace(spec, first=4)  # the next cycle's vectors
    other = base(x) + x @ layer.spec.delta_weight(layer.square.data.float()).to(dtype).T
    torch.testing.assert_close(layer(x), other, **tolerance)
    layer(x).float().square().sum().backward()
    assert layer.square.grad is not None and layer.square.grad.any()
    assert [name for name, _ in layer.named_parameters()] == ["square"] == list(layer.state_dict())


def test_it_keeps_tokens_by_r_hat(tmp_path: Path) -> None:
    tokens_seen, d, r_hat = 40, 64, 8
    layer = SubspaceLinear(
        nn.Linear(d, d), SubspaceSpec(d, d, r_hat, MODULE, register_vectors(random(d, d), r_hat, tmp_path))
    )
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(tokens_seen, d, requires_grad=True)
    layer(x)
    constant = {t.untyped_storage().data_ptr() for t in (layer.weight, layer.square, *layer._sides(x))}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert sum(size for place, size in kept.items() if place not in constant) == tokens_seen * r_hat * 4


def test_delta_has_the_same_bits_for_every_number_of_threads(tmp_path: Path) -> None:
    spec = SubspaceSpec(300, 200, 40, MODULE, register_vectors(random(200, 300), 40, tmp_path))
    square, threads = random(40, 40).float(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = spec.delta_weight(square)
        torch.set_num_threads(2)
        assert torch.equal(one, spec.delta_weight(square))
    finally:
        torch.set_num_threads(threads)


def test_spectra_are_those_of_the_delta(spec: SubspaceSpec) -> None:
    squares = [random(spec.r_hat, spec.r_hat, seed=seed).float() for seed in (0, 1)]
    expected = torch.linalg.svdvals(spec.delta_weight(squares[0].double()))
    torch.testing.assert_close(singular_values(spec, squares[0]), expected, rtol=1e-10, atol=1e-12)
    first, second = layer_spectra([(spec, squares[0]), (spec, squares[1])])
    assert first.outside_reach == 1.0 and second.outside_reach == 0.0
    assert first.newest.rank == spec.r_hat == second.cumulative.rank
    if spec.r_hat * 2 <= min(spec.d_in, spec.d_out):
        moved = replace(spec, first=0)
        *_, last = layer_spectra([(spec, squares[0]), (moved, squares[1])])
        assert last.cumulative.rank == 2 * spec.r_hat and last.outside_reach == pytest.approx(1.0)


def test_specs_survive_json_and_refuse_what_is_none() -> None:
    spec = SubspaceSpec(8, 6, 4, "a.b", "0123456789abcdef", first=2)
    assert spec_from_dict(spec.to_dict()) == spec and spec.describe() == "subspace@2"
    for changes in ({"r_hat": 7}, {"r_hat": 0}, {"first": -1}):
        with pytest.raises(UserError):
            replace(spec, **changes)


# -- the vectors -------------------------------------------------------------------------------------------------------


def test_vectors_are_those_of_the_weight(tmp_path: Path) -> None:
    weight = random(9, 13)
    name = register_vectors(weight, 9, tmp_path)
    left, right = singular_vectors.read(name, MODULE, 0, 9)
    values = torch.linalg.svdvals(weight.float().double())
    torch.testing.assert_close(left.double() @ weight @ right.double().T, torch.diag(values), rtol=1e-6, atol=1e-6)
    assert (right.gather(1, right.abs().argmax(dim=1, keepdim=True)) > 0).all(), "the sign is fixed"
    assert singular_vectors.norm(name, MODULE) == pytest.approx(weight.norm().item(), rel=1e-6)
    wrapped, _ = singular_vectors.read(name, MODULE, 7, 4)
    assert torch.equal(wrapped, left[[7, 8, 0, 1]])


def test_a_weight_too_large_for_lapack_is_decomposed_by_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mora_ds.models.svd.EXACT_NUMBERS", 0)
    count, side = 4, 2 * OVERSAMPLED + 40
    values = torch.cat((torch.tensor([9.0, 7.0, 5.0, 3.0]), torch.full((side - 4,), 0.01))).double()
    left, _ = torch.linalg.qr(random(side, side))
    right, _ = torch.linalg.qr(random(side, side, seed=1))
    wanted = Wanted("w", False, side, side, count)
    assert not wanted.is_exact and replace(wanted, count=side // 2).is_exact
    state = torch.get_rng_state()
    found_left, found_right = leading_vectors(left * values @ right.T, wanted, MODULE)
    assert torch.equal(torch.get_rng_state(), state), "the run's random numbers are as they were"
    assert torch.equal(found_left, leading_vectors(left * values @ right.T, wanted, MODULE)[0])
    signs = (found_right.double() @ right[:, :count]).diagonal().sign()
    torch.testing.assert_close(found_right.double(), (right[:, :count] * signs).T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_left.double(), (left[:, :count] * signs).T, rtol=1e-4, atol=1e-4)


def test_vectors_that_are_not_there_are_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="feedfeedfeedfeed are not at hand"):
        singular_vectors.read("feedfeedfeedfeed", MODULE, 0, 1)
    name = register_vectors(random(6, 8), 3, tmp_path)
    with pytest.raises(UserError, match=r"holds 3 of layer's 6 singular vectors, not 4"):
        singular_vectors.read(name, MODULE, 1, 3)
    with pytest.raises(UserError, match="no singular vectors of other"):
        singular_vectors.read(name, "other", 0, 1)
    broken = random(4, 4)
    broken[1, 2] = float("nan")
    with pytest.raises(UserError, match="w is not finite"):
        register_vectors(broken, 2, tmp_path)
    path = singular_vectors.path_of(name)
    path.write_bytes(path.read_bytes()[:20])
    singular_vectors.register("0" * 16, path)
    with pytest.raises(UserError, match="truncated or damaged"):
        singular_vectors.read("0" * 16, MODULE, 0, 1)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_cycles_take_the_next_vectors_and_come_round() -> None:
    config = MoRAConfig(rank=1, operator="subspace", vectors="v", vector_sets=3)
    specs = [config.operator_for("m", 8, 8, cycle) for cycle in range(7)]
    assert [spec.first for spec in specs] == [0, 4, 0, 0, 4, 0, 0]  # type: ignore[union-attr]
    fixed = replace(config, vector_sets=1)
    assert {fixed.operator_for("m", 8, 8, cycle) for cycle in range(4)} == {specs[0]}
    assert MoRAConfig.from_dict(config.to_dict()) == config
    assert not {"vectors", "vector_sets"} & set(MoRAConfig().to_dict()), "old checkpoints still resume"


def test_a_square_is_no_larger_than_the_shorter_side() -> None:
    model = tiny_model("llama")
    report = inject(model, MoRAConfig(rank=20, operator="subspace"))
    assert {row.name: (row.size, row.note) for row in report.rows}["k_proj"] == (
        16, "(rank 20 asks for 30: the shorter side is enough)",
    )  # fmt: skip
    assert report.operator == "subspace"
    assert all(isinstance(layer, SubspaceLinear) for layer in mora_layers(model).values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--grouping", "strided"), "drop --grouping strided"),
        (("--grouping", "plain"), "drop --grouping plain"),
        (("--compute", "weight"), "drop --compute weight"),
        (("--tensor_parallel_size", "2"), "--operator subspace reads unsplit inputs"),
        (("--tp_grouping", "aligned"), "--tp_grouping aligned belongs to --operator share"),
        (("--subspace_cycles", "0"), "--subspace_cycles must be at least 1"),
        (("--operator", "share", "--subspace_cycles", "2"), "--subspace_cycles is for --operator subspace"),
        (("--adapter", "lora"), "--operator subspace is for MoRA matrices"),
        (("--operator", "subspce"), "Did you mean 'subspace'"),
    ],
)
def test_flags_that_do_not_go_together(user: Playground, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(parse(user.flags("out", "--operator", "subspace", *flags)))


def test_a_dry_run_plans_it_without_vectors(user: Playground) -> None:
    _, told = planned(parse(user.flags("out", "--operator", "subspace")), world=2)
    assert any("operator subspace" in text for text in told)
    adapter = MoRAConfig(rank=2, operator="subspace")
    work = Work(AutoConfig.from_pretrained(user.model), adapter, seq_len=32, dtype=torch.float32)
    layers = mora_layers(model := planned_model(work)).values()
    kept = sum((layer.in_features + layer.out_features) * layer.value.shape[0] * 4 for layer in layers)
    assert kept <= measure_step(model, work).tables < 1.1 * kept, "the vectors are counted"


# -- whole runs --------------------------------------------------------------------------------------------------------

MERGING = ("--operator", "subspace", "--merge_every", 2, "--restart_warmup_steps", 1, "--max_steps", 6)


@pytest.fixture(scope="module")
def whole(user: Playground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, two merges, two sets of vectors."""
    out = tmp_path_factory.mktemp("whole")
    summary = run(2, user.flags(out, *MERGING, "--subspace_cycles", 2, "--save_steps", 3))
    assert summary["merges"] == 2 and summary["base_bytes_gathered"] == 0
    return out


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(2, vocab=400)).logits


@pytest.mark.gloo
def test_two_ranks_are_as_one(user: Playground, whole: Path, tmp_path: Path) -> None:
    run(1, user.flags(tmp_path, *MERGING, "--subspace_cycles", 2, "--per_device_train_batch_size", 4))
    torch.testing.assert_close(losses(tmp_path), losses(whole), rtol=1e-5, atol=0)
    assert (losses(whole).diff() != 0).all()


@pytest.mark.gloo
def test_it_is_exported_verified_and_loaded_elsewhere(user: Playground, whole: Path, tmp_path: Path) -> None:
    ledger = Ledger.open(whole / "ledger")
    assert [each.operators for each in summarize(ledger)] == ["subspace@0", "subspace@13, subspace@11, subspace@9"]
    firsts = [{entry.operator.first for entry in ledger.layers(cycle).values()} for cycle in (0, 1)]
    assert ledger.cycles == 2 and firsts[0] == {0} and 0 not in firsts[1]
    assert all(verdict.is_good for verdict in verify(whole))
    assert any("all hashes" in line for line in verify_ledger(whole))
    export_merged(whole, tmp_path / "merged", verify=True)
    export_adapter(whole, tmp_path / "adapter")
    moved = shutil.move(tmp_path / "adapter", tmp_path / "elsewhere")
    singular_vectors._paths.clear()  # as another machine
    model = load_adapter(user.model, moved)
    assert singular_vectors.path_of(ledger.vectors.name).is_relative_to(moved)
    torch.testing.assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()))
    entry = ledger.layers(0)["model.layers.0.mlp.up_proj"]
    base = BaseCheckpoint.open(user.model)
    updates = list(ledger.squares_of(entry.module))
    expected = live_weight(base.read(entry.weight), updates, False, torch.float32)
    torch.testing.assert_close(model.get_submodule(entry.module).weight, expected, rtol=0, atol=0)


@pytest.mark.gloo
def test_a_resumed_run_is_the_uninterrupted_one(user: Playground, whole: Path, tmp_path: Path) -> None:
    """From a checkpoint that has moved into a folder without vectors of its own."""
    flags = (*MERGING, "--subspace_cycles", 2, "--save_steps", 3)
    checkpoint = shutil.copytree(whole / "checkpoints" / "step-000003", tmp_path / "step-000003")
    run(2, user.flags(tmp_path / "again", *flags, "--resume_from_checkpoint", checkpoint))
    assert [row for row in curve(whole) if row["step"] > 3 and "merge" not in row] == [
        row for row in curve(tmp_path / "again") if "merge" not in row
    ]
    one, other = (load_file(out / "checkpoints/latest/adapter.safetensors") for out in (whole, tmp_path / "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / "again" / "subspace").exists(), "nothing was decomposed again"
    kind, message = run_ranks(
        1, refused, user.flags(tmp_path / "third", *MERGING, "--per_device_train_batch_size", 4,
                               "--resume_from_checkpoint", checkpoint)
    )[0]  # fmt: skip
    assert kind == "UserError" and "--subspace_cycles (None: 1): 2 there" in message


@pytest.mark.gloo
def test_damaged_vectors_are_found_and_a_dropped_cycle_keeps_them(whole: Path, tmp_path: Path) -> None:
    drop(whole / "checkpoints" / "latest", [0], tmp_path / "dropped")
    assert Ledger.open(tmp_path / "dropped" / "ledger").vectors == Ledger.open(whole / "ledger").vectors
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


@pytest.mark.gloo
@pytest.mark.heavy
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--base_bits", 8),
        ("--bf16",),
        ("--optimizer", "muon"),
        ("--gradient_checkpointing",),
        ("--full_rank_steps", 1),
        ("--targets", "auto", "--trainable_budget", "5%", "--alignment_weight", 0.1),
    ],
    ids=str,
)
def test_three_ranks_and_other_settings(user: Playground, tmp_path: Path, more: tuple[Any, ...]) -> None:
    """pytest -m heavy tests/adapters/ops/test_subspace.py"""
    run(3, user.flags(tmp_path / "three", *MERGING, "--per_device_train_batch_size", 1, *more))
    run(1, user.flags(tmp_path / "one", *MERGING, "--per_device_train_batch_size", 3, *more))
    rtol = 3e-3 if more and more[0] in ("--bf16",) else 1e-4
    torch.testing.assert_close(losses(tmp_path / "three"), losses(tmp_path / "one"), rtol=rtol, atol=0)
    export_merged(tmp_path / "three", tmp_path / "merged", verify=True)


@pytest.mark.gloo
@pytest.mark.heavy
def test_nodes_that_do_not_see_the_folder_get_the_same_vectors(user: Playground, tmp_path: Path) -> None:
    from tests.helpers.nodes import job_on_two_nodes

    run(3, user.flags(tmp_path / "whole", *MERGING, "--save_steps", 3))
    first, other = tmp_path / "first", tmp_path / "other"
    for more in ((), ("--resume_from_checkpoint", first / "checkpoints" / "step-000003")):
        flags = user.flags("unused", *MERGING, "--save_steps", 3, *more)
        run_ranks(3, job_on_two_nodes, flags, str(first), str(other))
        assert torch.equal(losses(first), losses(tmp_path / "whole")[-len(losses(first)) :])
        assert Ledger.open(first / "ledger").vectors == Ledger.open(tmp_path / "whole" / "ledger").vectors
        assert not other.exists()


def test_a_loop_of_ones_own(tmp_path: Path) -> None:
    found = run_ranks(1, own_loop, str(tmp_path))[0]
    assert found["after"] == pytest.approx(found["before"], rel=1e-6) and found["verified"]


def own_loop(folder: str) -> dict[str, Any]:
    """As the README has it: GPT-2's transposed weights, tied embeddings."""
    from mora_ds.engine.initialize import initialize
    from tests.helpers.engines import ds_config
    from tests.helpers.models import causal_loss

    root, ids = Path(folder), tokens(4)
    write_own_base(tiny_model("gpt2"), root / "base")
    model = tiny_model("gpt2")
    config = with_vectors(MoRAConfig(rank=2, operator="subspace"), model, root / "base", root / "out")
    inject(model, config)
    engine, *_ = initialize(model=model, config=ds_config(3, micro=4, accumulation=1))
    work = Run(engine, config, base=root / "base", folder=root / "out")
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


def test_more_vectors_than_a_side_has_are_not_wanted() -> None:
    model = tiny_model("llama")
    keys = {f"{name}.weight": name for name, _ in model.named_modules()}
    config = MoRAConfig(rank=8, operator="subspace", vector_sets=5)
    counts = {name.rpartition(".")[2]: each.count for name, each in wanted_vectors(model, config, keys).items()}
    assert counts["k_proj"] == 16 and counts["up_proj"] == 32
