"""Options of the Trainer that contradict an adapter are refused by name; merges; and what
is used of transformers.
"""

import inspect
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate.state import PartialState
from transformers import TrainingArguments
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.trainer_utils import HubStrategy

import mora_ds
from mora_ds.engine.accelerate import optimizer_steps
from mora_ds.hf import MoRACallback, MoRATrainer, load_model
from mora_ds.hf import trainer as trainer_module
from mora_ds.hf.options import REFUSED, check_options, fill_config
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.load import kept_in_fp32
from tests.helpers.errors import user_error
from tests.helpers.hf import Trainer, ds_config
from tests.helpers.models import tiny_model
from tests.helpers.tables import each_row, parsed


def arguments(out, **changes):
    return TrainingArguments(
        output_dir=str(out), report_to=[], **{"deepspeed": ds_config(), **changes}
    )


@pytest.fixture(autouse=True)
def _forget_the_config():
    """transformers shards every model that is made while `TrainingArguments` with ZeRO-3
    live, and an exception of a test may keep them."""
    yield
    hf_deepspeed.unset_hf_deepspeed_config()


CONTRADICTIONS = """
{deepspeed: null} | deepspeed=...) is missing
{torch_compile: true} | torch_compile
{auto_find_batch_size: true} | auto_find_batch_size
{optim: adafactor} | optim='adafactor'
{lr_scheduler_type: reduce_lr_on_plateau, eval_strategy: steps} | lr_scheduler_type='reduce_lr_on_plateau'
{lr_scheduler_type: greedy, eval_strategy: steps} | lr_scheduler_type='greedy'
{deepspeed: {zero_optimization: {stage: 3}, scheduler: {type: WarmupLR}}} | "scheduler"
{deepspeed: {zero_optimization: {}}} | must be 1, 2 or 3
"""


@each_row("changes, message", CONTRADICTIONS)
def test_options_that_contradict_are_named(tmp_path, changes, message):
    with user_error(re.escape(message)):
        check_options(arguments(tmp_path, **parsed(changes)), {})


def test_only_data_parallelism_is_supported(tmp_path):
    args = arguments(tmp_path)
    args.parallelism_config = SimpleNamespace(non_data_parallel_size=2)
    with user_error("parallelism_config"):
        check_options(args, {})


def test_operations_are_counted_with_the_frozen_base():
    model = tiny_model()
    total = model.num_parameters()
    mora_ds.inject(model, mora_ds.MoRAConfig(rank=2))
    total += model.num_parameters(only_trainable=True)
    rows = {"input_ids": torch.zeros(2, 16)}
    trainer = SimpleNamespace(model=model)
    assert MoRATrainer.floating_point_ops(trainer, rows) == 6 * 32 * total


def test_steps_dropped_by_loss_scaling_do_not_count():
    assert optimizer_steps(SimpleNamespace(global_steps=7, skipped_steps=2)) == 5


def test_supported_arguments_pass(tmp_path):
    check_options(arguments(tmp_path, optim="adamw_torch_fused"), {})
    with_optimizer = {**ds_config(), "optimizer": {"type": "Muon"}}
    check_options(arguments(tmp_path, optim="adafactor", deepspeed=with_optimizer), {})
    check_options(arguments(tmp_path, lr_scheduler_type="cosine"), {})


@pytest.mark.parametrize(
    "name", ["model_init", "optimizers", "optimizer_cls_and_kwargs", "peft_config"]
)
def test_arguments_that_contradict_are_named(tmp_path, name):
    adapted = {"mora": mora_ds.MoRAConfig(), "base": "x"}
    with user_error(name):
        Trainer(tiny_model(), arguments(tmp_path), **adapted, **{name: (1, 2)})
    check_options(arguments(tmp_path), {"optimizers": (None, None), name: None})


def test_every_refused_option_exists():
    """FSDP is refused by transformers too, before ours is asked."""
    known = set(inspect.signature(TrainingArguments.__init__).parameters)
    assert set(REFUSED) <= known, "an option was renamed: what is refused now?"


def test_a_model_that_is_sharded_is_refused(tmp_path):
    model = tiny_model()
    next(iter(model.parameters())).ds_id = 0
    with user_error("loaded after TrainingArguments"):
        Trainer(model, arguments(tmp_path), mora=mora_ds.MoRAConfig(), base="x")
    with user_error(r"base=.* is missing"):
        Trainer(tiny_model(), arguments(tmp_path), mora=mora_ds.MoRAConfig())


def test_a_model_is_loaded_unsharded_in_spite_of_the_arguments(tmp_path, model_folder):
    tiny_model("deepseek_v3").save_pretrained(model_folder)
    args = arguments(tmp_path)  # which transformers looks at while they live
    assert hf_deepspeed.is_deepspeed_zero3_enabled()
    base = BaseCheckpoint.open(model_folder)
    assert kept_in_fp32(base, torch.bfloat16, False), "exports sketch the model"
    parameters = load_model(model_folder).parameters()
    assert not any(hasattr(parameter, "ds_id") for parameter in parameters)
    assert args.deepspeed
    assert hf_deepspeed.is_deepspeed_zero3_enabled()


def test_a_path_is_loaded_as_the_arguments_say(tmp_path, model_folder, monkeypatch):
    """trl's arguments have `model_init_kwargs`."""
    tiny_model().save_pretrained(model_folder)
    loaded = []
    monkeypatch.setattr(
        trainer_module, "inject", lambda model, mora: loaded.append(model) or 1 / 0
    )
    args = arguments(tmp_path)
    for more, dtype in (({"dtype": "bfloat16"}, torch.bfloat16), (None, torch.float32)):
        args.model_init_kwargs = more
        with pytest.raises(ZeroDivisionError):
            Trainer(str(model_folder), args, mora=mora_ds.MoRAConfig())
        assert loaded[-1].dtype is dtype


SAVES = """
# the folder of the run, and then a checkpoint
{} | model | merged
{} | checkpoint | as it is
{save_only_model: true} | checkpoint | merged
{push_to_hub: true, hub_strategy: every_save} | checkpoint | merged
{push_to_hub: true, hub_strategy: end} | checkpoint | as it is
"""


@each_row("settings, kind, how", SAVES)
def test_where_the_merged_model_is_written(tmp_path, settings, kind, how):
    """The tokenizer lies in every folder, written by one process."""
    is_checkpoint = kind == "checkpoint"
    folder = tmp_path / "checkpoint-1" if is_checkpoint else tmp_path
    defaults = {"save_only_model": False, "push_to_hub": False, "hub_strategy": "end"}
    args = SimpleNamespace(output_dir=str(tmp_path), **{**defaults, **parsed(settings)})
    args.hub_strategy = HubStrategy(args.hub_strategy)
    written = []
    tokenizers = []
    trainer = SimpleNamespace(
        args=args,
        _write_merged=written.append,
        processing_class=SimpleNamespace(save_pretrained=tokenizers.append),
    )
    for args.should_save in (True, False):
        target = str(folder) if is_checkpoint else None
        MoRATrainer.save_model(trainer, target, is_checkpoint)
    assert folder.is_dir()
    assert written == [folder] * (2 if how == "merged" else 0)
    assert tokenizers == [folder]


def test_merges_come_after_whole_numbers_of_steps():
    for number in (-1, 2.5, True):
        with user_error("MoRACallback: `merge_every` must be a whole number from 0 on"):
            MoRACallback(number)


def test_the_callback_needs_the_mixin(tmp_path):
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
    plain = TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, max_steps=1
    )
    trainer = transformers.Trainer(
        tiny_model(),
        plain,
        train_dataset=rows,
        callbacks=[MoRACallback(merge_every=10)],
    )
    with user_error("MoRATrainer"):
        trainer.train()


def test_the_config_is_filled_from_the_adapters_parameters(tmp_path):
    betas = {"adam_beta1": 0.8, "adam_beta2": 0.95}
    args = arguments(
        tmp_path, learning_rate=3e-4, weight_decay=0.1, adam_epsilon=1e-7, **betas
    )
    fill_config(args, [100, 100])
    config = args.hf_deepspeed_config.config
    filled = {"lr": 3e-4, "betas": [0.8, 0.95], "eps": 1e-7, "weight_decay": 0.1}
    assert config["optimizer"] == {"type": "AdamW", "params": filled}
    zero = config["zero_optimization"]
    assert zero["reduce_bucket_size"] == 200
    assert zero["stage3_param_persistence_threshold"] == 0, "what the user sets stays"


def test_an_optimizer_of_the_config_stays(tmp_path):
    section = {"type": "auto", "params": {"lr": 0.5}}
    args = arguments(tmp_path, deepspeed={**ds_config(), "optimizer": section})
    fill_config(args, [100])
    optimizer = args.hf_deepspeed_config.config["optimizer"]
    assert optimizer["type"] == "AdamW"
    assert optimizer["params"]["lr"] == 0.5
    assert optimizer["params"]["eps"] == 1e-8


@pytest.mark.parametrize(
    "sections", [{"optimizer": None}, {"optimizer": {"params": None}}]
)
def test_a_section_that_is_null_is_one_that_is_absent(tmp_path, sections):
    args = arguments(tmp_path, deepspeed={**ds_config(), **sections})
    check_options(args, {})
    fill_config(args, [100])
    optimizer = args.hf_deepspeed_config.config["optimizer"]
    assert optimizer["params"]["lr"] == args.learning_rate


def test_transformers_and_accelerate_have_what_is_overridden():
    """An upgrade that renames one of these would leave ours uncalled."""
    for name in (
        "_prepare_for_training",
        "create_scheduler",
        "evaluation_loop",
        "floating_point_ops",
        "save_model",
        "_save_optimizer_and_scheduler",
        "_load_best_model",
    ):
        assert name in vars(MoRATrainer)
        theirs = inspect.signature(getattr(transformers.Trainer, name)).parameters
        ours = inspect.signature(getattr(MoRATrainer, name)).parameters
        assert {*ours} <= {*theirs, "arguments", "kwargs"}, name
    assert hasattr(hf_deepspeed, "_hf_deepspeed_config_weak_ref")
    assert hasattr(PartialState, "_prepare_backend")
