"""`mora_ds.Run` in a user's own loop: what is wrong with a call is said before anything is changed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR

import mora_ds
from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.common.errors import UserError
from mora_ds.common.files import read_json
from mora_ds.models.base import write_own_base
from mora_ds.train.run import _scheduler_state
from tests.helpers.engines import LEARNING_RATE, ds_config
from tests.helpers.gloo import run_ranks
from tests.helpers.models import causal_loss, tiny_model, tokens
from tests.helpers.snapshot import untouched

CONFIG = MoRAConfig(rank=4, operator="share")

WRONG: dict[str, Callable[[mora_ds.Run], object]] = {
    "merge: `step` must be a whole number from 3 on, got -5": lambda run: run.merge(-5),
    "merge: `step` must be a whole number from 3 on, got 'x'": lambda run: run.merge("x"),  # type: ignore[arg-type]
    "merge: `step` must be a whole number from 3 on, got 1.5": lambda run: run.merge(1.5),  # type: ignore[arg-type]
    "merge: `step` must be a whole number from 3 on, got None": lambda run: run.merge(None),  # type: ignore[arg-type]
    "merge: `step` must be a whole number from 3 on, got True": lambda run: run.merge(True),
    f"merge: `step` must be a whole number from 3 on, got {2**70}": lambda run: run.merge(2**70),
    "merge: `step` must be a whole number from 3 on, got 2": lambda run: run.merge(2),
    "merge: `probe` must be a function": lambda run: run.merge(3, 1.0),  # type: ignore[arg-type]
    "save: `step` must be a whole number from 2 on, got -1": lambda run: run.save(-1),
    "save: `step` must be a whole number from 2 on, got 'x'": lambda run: run.save("x"),  # type: ignore[arg-type]
    "save: `step` must be a whole number from 2 on, got 1": lambda run: run.save(1),
    "save: `folder` must be a path, got 3": lambda run: run.save(3, folder=3),  # type: ignore[arg-type]
    "Run: `base` must be a path, got None": lambda run: mora_ds.Run(run.engine, base=None, folder="new"),  # type: ignore[arg-type]
    "Run: `folder` must be a path, got ''": lambda run: mora_ds.Run(run.engine, base="base", folder=""),
    "Run: `resume` must be a path, got True": lambda run: mora_ds.Run(
        run.engine,
        base="base",
        folder="new",
        resume=True,  # type: ignore[arg-type]
    ),
    "initialize: `model` has an engine already": lambda run: mora_ds.initialize(model=run.engine.module, config={}),
    "save: `keep` must be a whole number from 1 on, or None for all, got -1": lambda run: run.save(3, keep=-1),
    "save: `keep` must be a whole number from 1 on, or None for all, got 0": lambda run: run.save(3, keep=0),
}


def started(folder: str, stage: int) -> tuple[Any, mora_ds.Run]:
    """A run with two micro-batches a step; one optimizer step and a merge are done, and saved as step 2."""
    os.chdir(folder)
    write_own_base(tiny_model("llama"), Path("base"))
    model = tiny_model("llama")
    mora_ds.inject(model, CONFIG)
    engine, *_ = mora_ds.initialize(model=model, config=ds_config(stage, 2, 2))
    run = mora_ds.Run(engine, base="base", folder="out")
    for number in range(2):
        micro_step(engine, number)
    run.merge(2)
    run.save(2)
    return engine, run


def micro_step(engine: Any, seed: int) -> None:
    engine.backward(causal_loss(engine, tokens(2, seed=seed)))
    engine.step()


def wrong_calls(folder: str) -> None:
    _, run = started(folder, 3)
    with untouched(Path("out")):
        for message, call in WRONG.items():
            with pytest.raises(UserError) as refused:
                call(run)
            assert str(refused.value).startswith(message), f"{message}: {refused.value}"
    run.save(2)
    run.merge(3)
    assert [cycle["step"] for cycle in read_json(Path("out/ledger/ledger.json"))["cycles"]] == [2, 3]


def test_wrong_arguments_are_refused_and_change_nothing(tmp_path: Path) -> None:
    run_ranks(1, wrong_calls, str(tmp_path))


def scheduled(folder: str, name: str, stage: int, resume: str | None, last_step: int) -> list[Any]:
    """Steps of a run in `name` up to the last one, with a scheduler of torch; saved after step 2. Returns the learning
    rate of each step, and the loss after the last one."""
    os.chdir(folder)
    model = tiny_model("llama")
    if not Path("base").exists():
        write_own_base(model, Path("base"))
    mora_ds.inject(model, CONFIG)
    engine, *_ = mora_ds.initialize(
        model=model,
        config=ds_config(stage, 2, 1),
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: 0.5**step),
    )
    run = mora_ds.Run(engine, base="base", folder=name, resume=resume)
    results: list[Any] = []
    for step in range(run.state.step + 1, last_step + 1):
        results += engine.get_lr()[:1]
        micro_step(engine, step)
        if step == 2:
            run.save(step)
    with torch.no_grad():
        return [*results, causal_loss(engine, tokens(2)).item()]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_scheduler_goes_on_where_it_was_saved(tmp_path: Path, stage: int) -> None:
    (whole,) = run_ranks(1, scheduled, str(tmp_path), "whole", stage, None, 4)
    run_ranks(1, scheduled, str(tmp_path), "out", stage, None, 3)
    (resumed,) = run_ranks(1, scheduled, str(tmp_path), "out", stage, "auto", 4)
    assert whole[:4] == [LEARNING_RATE * 0.5**step for step in range(4)]
    assert resumed == whole[2:]


def test_a_scheduler_that_json_would_change_is_refused() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with pytest.raises(UserError, match="the state of `lr_scheduler`, a MultiStepLR, does not fit in a checkpoint"):
        _scheduler_state(MultiStepLR(optimizer, [2, 4]))


def calls_within_a_step(folder: str, stage: int) -> None:
    engine, run = started(folder, stage)
    with untouched(Path("out")):
        for number in range(2):
            engine.backward(causal_loss(engine, tokens(2, seed=number)))
            for call in (run.merge, run.save):
                with pytest.raises(UserError, match="the engine has gradients of which no optimizer step is made"):
                    call(3)
            engine.step()
            if number == 0:
                with pytest.raises(
                    UserError, match=r"call it after the engine.step\(\) that ends gradient accumulation"
                ):
                    run.save(3)
    with torch.no_grad():
        causal_loss(engine, tokens(2))  # a forward pass leaves no gradient
    run.merge(3)
    run.save(3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_between_a_backward_pass_and_the_optimizer_step_nothing_is_merged_or_saved(tmp_path: Path, stage: int) -> None:
    run_ranks(1, calls_within_a_step, str(tmp_path), stage)


def test_arguments_of_a_wrong_type_are_named_as_arguments(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapted = tiny_model("llama")
    mora_ds.inject(adapted, CONFIG)
    new = tmp_path / "new"
    spec = OperatorSpec("share", 8, 8, 4)  # type: ignore[arg-type]
    square = torch.zeros(4, 4)
    calls: dict[str, Callable[[], object]] = {
        "`rank` must be at least 1, got 0": lambda: MoRAConfig(rank=0),
        "unknown `operator` 'rotat'": lambda: MoRAConfig(operator="rotat"),
        "`grouping` strided belongs to `operator` share, but": lambda: MoRAConfig(grouping="strided"),
        "rank must be of the type int, got '8'": lambda: MoRAConfig(rank="8"),  # type: ignore[arg-type]
        "rank must be of the type int, got True": lambda: MoRAConfig(rank=True),
        "rank must be of the type int, got 4.5": lambda: MoRAConfig(rank=4.5),  # type: ignore[arg-type]
        "dropout must be of the type float, got None": lambda: MoRAConfig(dropout=None),  # type: ignore[arg-type]
        "train_norms must be of the type bool, got 1": lambda: MoRAConfig(train_norms=1),  # type: ignore[arg-type]
        "target_modules must be names in a list or tuple, got 'q_proj'": lambda: MoRAConfig(target_modules="q_proj"),  # type: ignore[arg-type]
        "target_modules must be names in a list or tuple, got 3": lambda: MoRAConfig(target_modules=3),  # type: ignore[arg-type]
        "inject: `model` must be of the type Module, got None": lambda: mora_ds.inject(None, CONFIG),  # type: ignore[arg-type]
        "inject: `config` must be a MoRAConfig or a LoRAConfig, got None": lambda: mora_ds.inject(model, None),  # type: ignore[arg-type]
        "mora_layers: `model` must be of the type Module, got 'm'": lambda: mora_ds.mora_layers("m"),  # type: ignore[arg-type]
        "domains_of: `model` must be of the type Module, got 3": lambda: mora_ds.domains_of(3),  # type: ignore[arg-type]
        "OperatorSpec: `d_in` must be of the type int, got '8'": lambda: OperatorSpec("share", "8", 8, 4),  # type: ignore[arg-type]
        "OperatorSpec: `seed` must be of the type int, got 0.5": lambda: OperatorSpec("share", 8, 8, 4, seed=0.5),  # type: ignore[arg-type]
        "unknown operator 3": lambda: OperatorSpec(3, 8, 8, 4),  # type: ignore[arg-type]
        "delta_weight: `spec` must be of the type OperatorSpec, got 3": lambda: mora_ds.delta_weight(3, square),  # type: ignore[arg-type]
        "delta_weight: `square` must be of the type Tensor, got None": lambda: mora_ds.delta_weight(spec, None),  # type: ignore[arg-type]
        "mora_update: `square` must be of the type Tensor, got 1": lambda: mora_ds.mora_update(spec, 1, square),  # type: ignore[arg-type]
        "mora_update: `x` must be of the type Tensor, got 'x'": lambda: mora_ds.mora_update(spec, square, "x"),  # type: ignore[arg-type]
        "Ledger.open: `folder` must be a path, got 3": lambda: mora_ds.Ledger.open(3),  # type: ignore[arg-type]
        "initialize: `config` must be a DeepSpeed config": lambda: mora_ds.initialize(model=model, config=None),  # type: ignore[arg-type]
        "unknown node_base 'shared'; known: auto, private": lambda: mora_ds.initialize(
            model=model, config={}, node_base="shared"
        ),
        "inject: `model` is compiled": lambda: mora_ds.inject(torch.compile(model), CONFIG),
        "the model has no adapter: call mora_ds.inject": lambda: mora_ds.initialize(model=model, config={}),
        "initialize: `model` is compiled": lambda: mora_ds.initialize(model=torch.compile(adapted), config={}),
        "initialize: `tensor_parallel_size` must be a whole number, got '2'": lambda: mora_ds.initialize(
            model=adapted,
            config={},
            tensor_parallel_size="2",  # type: ignore[arg-type]
        ),
        "initialize: the DeepSpeed config has no batch size": lambda: mora_ds.initialize(model=adapted, config={}),
        "this model already has an adapter": lambda: mora_ds.inject(adapted, CONFIG),
        "export_merged: `checkpoint` must be a path, got None": lambda: mora_ds.export_merged(None, new),  # type: ignore[arg-type]
        "export_merged: `output` must be a path, got ''": lambda: mora_ds.export_merged("out", ""),
        "export_adapter: `checkpoint` must be a path, got 3": lambda: mora_ds.export_adapter(3, new),  # type: ignore[arg-type]
        "export_adapter: `output` must be a path, got None": lambda: mora_ds.export_adapter("out", None),  # type: ignore[arg-type]
        "load_adapter: `adapter` must be a path, got None": lambda: mora_ds.load_adapter("base", None),  # type: ignore[arg-type]
        "combine_adapters: `sources` must be paths in a list, got 'a'": lambda: mora_ds.combine_adapters("a", [1], "b"),
        "combine_adapters: `weights` must be numbers in a list, got ['x']": lambda: mora_ds.combine_adapters(
            ["a"],
            ["x"],  # type: ignore[list-item]
            new,
        ),
        "combine_adapters: one of `sources` must be a path, got 3": lambda: mora_ds.combine_adapters(
            [3],  # type: ignore[list-item]
            [1],
            new,
        ),
        "--weights: 0 for 0 adapter(s)": lambda: mora_ds.combine_adapters([], [], new),
        "load_adapter: `base` must be the model's folder, got a LlamaForCausalLM": lambda: mora_ds.load_adapter(
            model, tmp_path
        ),
        "Run: `engine` must be what mora_ds.initialize returns first, got a LlamaForCausalLM": lambda: mora_ds.Run(
            model,  # type: ignore[arg-type]
            base="base",
            folder=tmp_path,
        ),
    }
    for message, call in calls.items():
        with pytest.raises(UserError) as refused:
            call()
        assert str(refused.value).startswith(message)
    assert MoRAConfig(rank=4, dropout=0, target_modules=["q_proj"]).target_modules == ("q_proj",)  # type: ignore[arg-type]
