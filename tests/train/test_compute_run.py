"""--compute auto in whole runs: rank 0's times decide, and a run keeps its paths, which no other times change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import mora_ds
from mora_ds.adapters import path_times
from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.ops.linear import Compute
from mora_ds.adapters.path_times import PATHS, shape_of, undecided
from mora_ds.checkpoint.state import TrainerState
from mora_ds.common.errors import UserError
from mora_ds.models.base import write_own_base
from mora_ds.runtime.ranks import Ranks
from mora_ds.train import compute
from mora_ds.train.adapter_job import AdapterJob
from tests.helpers.engines import ds_config
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, job, playground, refusal, run
from tests.helpers.models import alone, tiny_model, tokens
from tests.helpers.paths import always
from tests.helpers.resume import assert_same_result, assert_same_tensors, checkpoint_tensors, merged


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Playground:
    return playground(tmp_path_factory.mktemp("user"))


def job_where(quick: Compute | None, argv: list[str]) -> None:
    """A run where a path is always quicker; None: of a version that times none. For `run_ranks`."""
    if quick is None:
        AdapterJob.choose_compute = lambda job: None  # type: ignore[method-assign]  # in this forked rank alone
    else:
        path_times.time_paths = always(quick)
    job(argv)


def saved(out: Path, step: str = "latest") -> dict[str, Compute]:
    return TrainerState.read(out / "checkpoints" / step).compute


AUTO = ("--compute", "auto", "--save_steps", 3, "--merge_every", 2, "--restart_warmup_steps", 1)


@pytest.mark.gloo
def test_a_resumed_run_keeps_its_paths_whatever_it_would_measure(user: Playground, tmp_path: Path) -> None:
    whole, out, other = (tmp_path / name for name in ("whole", "out", "other"))
    run_ranks(1, job_where, Compute.ACTIVATION, user.flags(whole, *AUTO))
    run_ranks(1, job_where, Compute.BLOCKS, user.flags(other, *AUTO))
    assert set(saved(whole).values()) == {Compute.ACTIVATION} and set(saved(other).values()) == {Compute.BLOCKS}
    tensors, others = checkpoint_tensors(whole), checkpoint_tensors(other)
    assert any(not torch.equal(tensors[name], others[name]) for name in tensors), "or this test shows nothing"

    step = whole / "checkpoints" / "step-000003"
    run_ranks(1, job_where, Compute.WEIGHT, user.flags(out, *AUTO, "--resume_from_checkpoint", step))
    assert saved(out) == saved(whole)
    assert_same_tensors(checkpoint_tensors(out), tensors)
    assert_same_tensors(merged(out, tmp_path / "a"), merged(whole, tmp_path / "b"))

    file = whole / "run.yaml"
    recorded = yaml.safe_load(file.read_text(encoding="utf-8"))["resolved"]["compute"]
    assert recorded == dict.fromkeys(saved(whole), "activation")
    again = tmp_path / "again"
    run_ranks(1, job_where, Compute.WEIGHT, user.flags(again, *AUTO, "--compute", file))
    assert_same_result(again, whole)

    changed = (*AUTO, "--compute", other / "run.yaml", "--resume_from_checkpoint", step)
    assert "--compute: a run keeps the paths that it began with" in refusal(user.flags(tmp_path / "no", *changed))
    unsuited = ("--operator", "share", "--compute", file)
    assert f"--compute {file} has no path for model.layers.0" in refusal(user.flags(tmp_path / "no", *unsuited))


@pytest.mark.gloo
def test_a_run_that_began_before_paths_were_timed_keeps_the_formula(user: Playground, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run_ranks(1, job_where, None, user.flags(whole, *AUTO))
    resumed = user.flags(out, *AUTO, "--resume_from_checkpoint", whole / "checkpoints" / "step-000003")
    run_ranks(1, job_where, Compute.ACTIVATION, resumed)  # the formula takes the weight here
    assert saved(out) == saved(whole) == {}
    assert_same_tensors(checkpoint_tensors(out), checkpoint_tensors(whole))


def decided(folder: str) -> dict[str, str]:
    """Two ranks of which each finds another path quicker."""
    ranks, model = Ranks.current(), tiny_model("llama")
    inject(model, MoRAConfig(rank=4, operator="share"))
    path_times.time_paths = always(PATHS[ranks.rank])  # in this forked rank alone
    found = compute.choose(model, ranks, lambda: model(input_ids=tokens(2 + ranks.rank)))
    compute.take(model, found, "here")
    assert not undecided(model)
    return {shape: path.value for shape, path in found.items()}


@pytest.mark.gloo
def test_the_times_of_the_first_rank_decide(tmp_path: Path) -> None:
    one, other = run_ranks(2, decided, str(tmp_path))
    assert one == other and set(one.values()) == {PATHS[0].value}


def in_an_own_loop(folder: str) -> None:
    """`Run.choose_compute` waits for the first call in training; another run around the engine chooses anew."""
    base, config, ids = Path(folder) / "base", MoRAConfig(rank=4, operator="share"), tokens(2)
    model = tiny_model("llama")
    write_own_base(model, base)
    inject(model, config)
    engine, *_ = mora_ds.initialize(model=model, config=ds_config(3, 2, 1))
    for quick in PATHS[:2]:
        path_times.time_paths = always(quick)
        work = mora_ds.Run(engine, config, base, Path(folder) / "out", overwrite=True)
        work.choose_compute()
        with torch.no_grad():
            engine(input_ids=ids)
        assert undecided(model) and not work.state.compute
        model.train()  # a checkpoint's logits are those of evaluation
        model.model.layers[0].eval()
        modes = [module.training for module in model.modules()]
        calls: list[bool] = []
        handle = model.register_forward_hook(lambda *_, seen=calls: seen.append(torch.is_grad_enabled()))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        handle.remove()
        assert calls == [False, True], "one call to see the batch, one to train"
        assert set(work.state.compute.values()) == {quick} == {each.compute for each in mora_layers(model).values()}
        assert [module.training for module in model.modules()] == modes
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        work.save(2)
    path_times.time_paths = always(PATHS[0])
    again = mora_ds.Run(engine, config, base, Path(folder) / "out", resume="latest")
    again.choose_compute()
    engine(input_ids=ids)
    assert set(again.state.compute.values()) == {PATHS[1]} == {each.compute for each in mora_layers(model).values()}


@pytest.mark.gloo
def test_a_loop_of_ones_own_chooses_before_its_first_step_and_keeps_its_paths(tmp_path: Path) -> None:
    run_ranks(1, in_an_own_loop, str(tmp_path))


@pytest.mark.gloo
def test_paths_are_timed_in_a_tensor_parallel_run_and_kept_without(user: Playground, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ("--operator", "share", "--compute", "auto", "--save_steps", 2, "--max_steps", 4)
    run(2, user.flags(out, *more, "--tensor_parallel_size", 2))
    began = saved(out, "step-000002")
    assert began and set(began.values()) <= set(PATHS)
    step = out / "checkpoints" / "step-000002"
    flags = user.flags(tmp_path / "one", *more, "--resume_from_checkpoint", step)
    run(1, flags)
    assert saved(tmp_path / "one") == began


def test_a_layer_that_is_not_timed_takes_the_activations() -> None:
    """With dropout there is one path to train over; evaluation takes it, too."""

    model = tiny_model("llama")
    inject(model, MoRAConfig(rank=4, operator="share", dropout=0.1))
    layers = undecided(model).values()
    found = compute.choose(model, alone(), lambda: model(input_ids=tokens(2)))
    assert found == {shape_of(layer): Compute.ACTIVATION for layer in layers}


def test_layers_that_are_not_called_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Mamba multiplies with the weight of its dt_proj itself."""
    config = AutoConfig.for_model("mamba", vocab_size=128, hidden_size=32, state_size=8, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config)
    inject(model, MoRAConfig(rank=4))
    with caplog.at_level("INFO"):
        compute.choose(model, alone(), lambda: model(input_ids=tokens(2)))
    assert "2 of 8 adapted layers, backbone.layers.0.mixer.dt_proj the first, are not called" in caplog.text


def test_a_file_of_paths_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for text, message in (
        ("compute: auto\n", "it holds no paths under resolved: compute"),
        ("resolved: {compute: {share: fast}}\n", f"--compute {file}"),
        ("resolved: {compute: [weight]}\n", f"--compute {file}"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            compute.paths_of_file(file)
    assert compute.paths_of_file(None) is None
