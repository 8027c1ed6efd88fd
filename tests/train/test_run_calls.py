"""`mora_ds.Run` in a user's own loop: what is wrong with a call is said before anything is
changed.
"""

import math
import os
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR

import mora_ds
from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.checkpoint.sections import scheduler_state
from mora_ds.common.errors import UserError
from mora_ds.models.base import write_own_base
from mora_ds.remora.ledger import Ledger
from mora_ds.train.run import Run, _check_new
from tests.helpers.engines import LEARNING_RATE, ds_config
from tests.helpers.errors import user_error
from tests.helpers.exports import fake_run
from tests.helpers.models import causal_loss, micro_step, tiny_model, tokens
from tests.helpers.pool import run_pooled
from tests.helpers.snapshot import untouched
from tests.helpers.tables import parsed, rows

CONFIG = MoRAConfig(rank=4, operator="share")

CALLS_OF_A_RUN = """
merge | {step: -5} | merge: `step` must be a whole number from 3 on, got -5
merge | {step: x} | merge: `step` must be a whole number from 3 on, got 'x'
merge | {step: 1.5} | merge: `step` must be a whole number from 3 on, got 1.5
merge | {step: null} | merge: `step` must be a whole number from 3 on, got None
merge | {step: true} | merge: `step` must be a whole number from 3 on, got True
merge | {step: 1180591620717411303424} | merge: `step` must be a whole number from 3 on, got 1180591620717411303424
merge | {step: 2} | merge: `step` must be a whole number from 3 on, got 2
merge | {step: 3, loss_fn: 1.0} | merge: `loss_fn` must be a function
save | {step: -1} | save: `step` must be a whole number from 2 on, got -1
save | {step: x} | save: `step` must be a whole number from 2 on, got 'x'
save | {step: 1} | save: `step` must be a whole number from 2 on, got 1
save | {step: 3, folder: 3} | save: `folder` must be a path, got 3
save | {step: 3, keep: -1} | save: `keep` must be a whole number from 1 on, or None for all, got -1
save | {step: 3, keep: 0} | save: `keep` must be a whole number from 1 on, or None for all, got 0
Run | {engine: ENGINE, base: null, folder: new} | Run: `base` must be a path, got None
Run | {engine: ENGINE, base: base, folder: ""} | Run: `folder` must be a path, got ''
Run | {engine: ENGINE, base: base, folder: new, resume: true} | Run: `resume` must be a path, got True
initialize | {model: MODEL, config: {}} | initialize: `model` has an engine already
"""

CALLS = """
MoRAConfig | {rank: 0} | `rank` must be at least 1, got 0
MoRAConfig | {operator: rotat} | unknown `operator` 'rotat'
MoRAConfig | {grouping: strided} | `grouping` strided belongs to `operator` share, but
MoRAConfig | {rank: "8"} | rank must be a whole number, got '8'
MoRAConfig | {rank: true} | rank must be a whole number, got True
MoRAConfig | {rank: 4.5} | rank must be a whole number, got 4.5
MoRAConfig | {embedding_rank: -1} | `embedding_rank` must be at least 0, got -1
MoRAConfig | {new_rows_from: -5} | `new_rows_from` must be at least 0, got -5
MoRAConfig | {dropout: null} | dropout must be a number, got None
MoRAConfig | {train_norms: 1} | train_norms must be true or false, got 1
MoRAConfig | {target_modules: q_proj} | target_modules must be a list, got 'q_proj'
MoRAConfig | {layer_sizes: 3} | layer_sizes must be whole numbers by names of layers, got 3
MoRAConfig | {layer_sizes: {q_proj: x}} | layer_sizes must be whole numbers by names of layers
MoRAConfig | {domains: law} | domains must be a list, got 'law'
MoRAConfig | {target_modules: [q_proj, 3]} | target_modules[1] must be a text, got 3
MoRAConfig | {target_modules: 3} | target_modules must be a list, got 3
inject | {model: null, config: CONFIG} | inject: `model` must be of the type Module, got None
inject | {model: MODEL, config: null} | inject: `config` must be a config of an adapter (mora, lora, subspace), got None
inject | {model: LAYER, config: CONFIG} | inject: `model` is itself a linear layer
inject | {model: LAYERS, config: EMBEDDINGS} | `embedding_rank`: the embeddings are a NoneType
inject | {model: COMPILED, config: CONFIG} | inject: `model` is compiled
inject | {model: ADAPTED, config: CONFIG} | this model already has an adapter
inject | {model: MODEL, config: UNKNOWN} | `target_modules` 'q_prj' matches no linear layer
inject | {model: MODEL, config: BOTH} | `target_modules` includes 'lm_head', which `train_head` trains itself
OperatorSpec | {kind: 3, d_in: 8, d_out: 8, r_hat: 4} | unknown operator 3
delta_weight | {spec: SPEC, mora_matrix: NARROW} | delta_weight: `mora_matrix` must have the shape (4, 4), got (3, 3)
mora_update | {spec: SPEC, mora_matrix: MATRIX, x: NARROW} | mora_update: `x` must have 8 features, got the shape (3, 3)
mora_update | {spec: SPEC, mora_matrix: NARROW, x: MATRIX} | mora_update: `mora_matrix` must have the shape (4, 4)
Ledger.open | {folder: 3} | Ledger.open: `folder` must be a path, got 3
initialize | {model: ADAPTED, config: gone.json} | cannot read the DeepSpeed file gone.json
initialize | {model: MODEL, config: {}} | the model has no adapter: call mora_ds.inject
initialize | {model: COMPILED_ADAPTED, config: {}} | initialize: `model` is compiled
initialize | {model: ADAPTED, config: {}, tensor_parallel_size: "2"} | \
initialize: `tensor_parallel_size` must be a whole number from 1 on, got '2'
initialize | {model: ADAPTED, config: {}, tensor_parallel_size: true} | \
initialize: `tensor_parallel_size` must be a whole number from 1 on, got True
export_merged | {checkpoint: null, output: NEW} | export_merged: `checkpoint` must be a path, got None
export_merged | {checkpoint: out, output: ""} | export_merged: `output` must be a path, got ''
export_merged | {checkpoint: out, output: NEW, base_folder: 3} | `checkpoint`: out is neither
export_merged | {checkpoint: RUN, output: NEW, base_folder: 3} | export_merged: `base_folder` must be a path, got 3
export_merged | {checkpoint: RUN, output: NEW, base_folder: gone} | `base_folder`: no such folder
export_merged | {checkpoint: RUN, output: NEW, dtype: fp9} | unknown dtype 'fp9'
export_merged | {checkpoint: RUN, output: NEW, domain: law} | `domain` law: name a domain of this adapter
export_merged | {checkpoint: RUN, output: NEW, delta_scale: "2"} | `delta_scale` must be a finite number, got '2'
export_merged | {checkpoint: RUN, output: NEW, delta_scale: 0.5, verify: true} | `verify` compares with
export_merged | {checkpoint: RUN, output: FILE} | `output`
export_adapter | {checkpoint: 3, output: NEW} | export_adapter: `checkpoint` must be a path, got 3
export_adapter | {checkpoint: out, output: null} | export_adapter: `output` must be a path, got None
load_adapter | {base: base, adapter: null} | load_adapter: `adapter` must be a path, got None
load_adapter | {base: MODEL, adapter: FOLDER} | \
load_adapter: `base` must be the model's folder, got a LlamaForCausalLM
combine_adapters | {sources: [a], weights: [x], output: NEW} | `weights` must be finite numbers, got 'x'
combine_adapters | {sources: [3], weights: [1], output: NEW} | \
combine_adapters: one of `sources` must be a path, got 3
combine_adapters | {sources: [a], weights: [1], output: FOLDER} | `output`
combine_adapters | {sources: [], weights: [], output: NEW} | `weights`: 0 for 0 adapter(s)
Run | {engine: MODEL, base: base, folder: FOLDER} | \
Run: `engine` must be what mora_ds.initialize returns first, got a LlamaForCausalLM
"""


def assert_refused(calls, scope, **objects):
    """Calls each row's function, found in `scope`, with its arguments: the error's
    message starts with the row's. An argument that is the name of one of `objects`
    stands for that object."""
    for function, settings, message in rows(calls):
        arguments = {
            name: objects.get(str(value), value)
            for name, value in parsed(settings).items()
        }
        with pytest.raises(UserError) as refused:
            attrgetter(function)(scope)(**arguments)
        assert str(refused.value).startswith(message), f"{message}: {refused.value}"
        assert "--" not in str(refused.value), (
            f"{function} speaks of a flag: {refused.value}"
        )


def started(folder, stage):
    """A run with two micro-batches a step; one optimizer step and a merge are done, and
    saved as step 2.
    """
    os.chdir(folder)
    write_own_base(tiny_model("llama"), Path("base"))
    model = tiny_model("llama")
    mora_ds.inject(model, CONFIG)
    engine, *_ = mora_ds.initialize(model=model, config=ds_config(stage, 2, 2))
    run = mora_ds.Run(engine, base="base", folder="out")
    for number in range(2):
        micro_step(engine, tokens(2, seed=number))
    run.merge(2)
    run.save(2)
    return engine, run


def wrong_calls(folder):
    engine, run = started(folder, 3)
    with untouched(Path("out")):
        scope = SimpleNamespace(
            merge=run.merge,
            save=run.save,
            Run=mora_ds.Run,
            initialize=mora_ds.initialize,
        )
        assert_refused(CALLS_OF_A_RUN, scope, ENGINE=engine, MODEL=engine.module)
    run.save(2)
    run.merge(3)
    assert [record.step for record in run.remora.ledger.records] == [2, 3]
    run.save(5)
    for call in (run.merge, run.save):
        with user_error("`step` must be a whole number from 5 on, got 4"):
            call(4)


def test_wrong_arguments_are_refused_and_change_nothing(tmp_path):
    run_pooled(1, wrong_calls, str(tmp_path))


def scheduled(folder, name, stage, resume, last_step):
    """Steps of a run in `name` up to the last one, with a scheduler of torch; saved after
    step 2. Returns the learning rate of each step, and the loss after the last one."""
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
    results = []
    for step in range(run.state.step + 1, last_step + 1):
        results += engine.get_lr()[:1]
        micro_step(engine, tokens(2, seed=step))
        if step == 2:
            run.save(step)
    with torch.no_grad():
        return [*results, causal_loss(engine, tokens(2)).item()]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_scheduler_goes_on_where_it_was_saved(tmp_path, stage):
    (reference,) = run_pooled(1, scheduled, str(tmp_path), "reference", stage, None, 4)
    run_pooled(1, scheduled, str(tmp_path), "out", stage, None, 3)
    (resumed,) = run_pooled(1, scheduled, str(tmp_path), "out", stage, "auto", 4)
    assert reference[:4] == [LEARNING_RATE * 0.5**step for step in range(4)]
    assert resumed == reference[2:]


def test_a_run_resumes_from_what_a_killed_save_has_hidden(tmp_path):
    """Between the two renames that replace a checkpoint by one of the same step."""
    (reference,) = run_pooled(1, scheduled, str(tmp_path), "out", 3, None, 4)
    saved = tmp_path / "out/checkpoints/step-000002"
    saved.rename(saved.with_name(".step-000002.old.writing"))
    (resumed,) = run_pooled(1, scheduled, str(tmp_path), "out", 3, "auto", 4)
    assert resumed == reference[2:]


def test_a_folder_with_a_ledger_alone_holds_a_run(tmp_path):
    """One that was killed before its first checkpoint."""
    _check_new(tmp_path)
    Ledger.create(tmp_path / "ledger", "f" * 64)
    with user_error(f"{tmp_path} holds another run"):
        _check_new(tmp_path)


def test_a_scheduler_that_json_would_change_is_refused():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    changed = MultiStepLR(optimizer, [2, 4])
    infinite = LambdaLR(optimizer, lambda step: math.inf)
    for scheduler in (changed, infinite):
        with user_error(f"a {type(scheduler).__name__}, does not fit in a checkpoint"):
            scheduler_state(scheduler)


def calls_within_a_step(folder, stage):
    engine, run = started(folder, stage)
    with untouched(Path("out")):
        for number in range(2):
            engine.backward(causal_loss(engine, tokens(2, seed=number)))
            for call in (run.merge, run.save):
                with user_error(
                    "the engine has gradients of which no optimizer step is made"
                ):
                    call(3)
            engine.step()
            if number == 0:
                with user_error(
                    r"call it after the engine.step\(\) that ends gradient accumulation"
                ):
                    run.save(3)
    with torch.no_grad():
        causal_loss(engine, tokens(2))  # a forward pass leaves no gradient
    run.merge(3)
    run.save(3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_between_a_backward_pass_and_the_optimizer_step_nothing_is_merged_or_saved(
    tmp_path, stage
):
    run_pooled(1, calls_within_a_step, str(tmp_path), stage)


def test_arguments_of_a_wrong_type_are_named_as_arguments(
    tmp_path,
    tmp_path_factory,
    monkeypatch,
):
    monkeypatch.chdir(
        tmp_path_factory.mktemp("empty")
    )  # no run has written an `out` there
    model = tiny_model("llama")
    adapted = tiny_model("llama")
    mora_ds.inject(adapted, CONFIG)
    objects = {
        "CONFIG": CONFIG,
        "MODEL": model,
        "ADAPTED": adapted,
        "COMPILED": torch.compile(model),
        "COMPILED_ADAPTED": torch.compile(adapted),
        "SPEC": OperatorSpec("share", 8, 8, 4),
        "MATRIX": torch.zeros(4, 4),
        "NARROW": torch.zeros(3, 3),
        "LAYER": torch.nn.Linear(8, 8),
        "LAYERS": torch.nn.Sequential(torch.nn.Linear(8, 8)),
        "EMBEDDINGS": MoRAConfig(rank=4, embedding_rank=2),
        "FOLDER": tmp_path,
        "NEW": tmp_path / "new",
        "RUN": fake_run(tmp_path, probe=False).output,
        "FILE": Path(__file__),
        "UNKNOWN": MoRAConfig(target_modules=("q_prj",)),
        "BOTH": MoRAConfig(target_modules=("lm_head",), train_head=True),
    }
    assert_refused(CALLS, mora_ds, **objects)
    assert not (tmp_path / "new").exists()
    config = MoRAConfig(rank=4, dropout=0, target_modules=["q_proj"])
    assert config.target_modules == ("q_proj",)


def test_an_export_runs_a_models_own_code_where_training_does(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "mora_ds.train.run.export_merged",
        lambda *folders, **settings: asked.append(settings["trust_remote_code"]),
    )
    ranks = SimpleNamespace(run_on_rank0=lambda what, export, long: export())
    for module in ("transformers_modules.own", "transformers.models.llama"):
        model = type("Model", (nn.Module,), {"__module__": module})()
        run = SimpleNamespace(engine=SimpleNamespace(module=model), ranks=ranks)
        Run.export(run, tmp_path, tmp_path)
    assert asked == [True, False]
