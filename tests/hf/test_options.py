"""Options of the Trainer that contradict an adapter are refused by name; and what is used of transformers."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import accelerate
import pytest
import transformers
from accelerate.state import PartialState
from transformers import TrainingArguments
from transformers.integrations import deepspeed as hf_deepspeed

import mora_ds
from mora_ds.common.errors import UserError
from mora_ds.hf import MoRACallback, MoRATrainer, load_model
from mora_ds.hf.options import REFUSED, check_options, fill_config
from tests.helpers.hf import Trainer, ds_config
from tests.helpers.models import tiny_model


def arguments(out: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(out), report_to=[], **{"deepspeed": ds_config(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deepspeed": None}, "deepspeed=...) is missing"),
        ({"torch_compile": True}, "torch_compile"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"optim": "adafactor"}, "optim='adafactor'"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "reduce_lr_on_plateau"),
        ({"deepspeed": {**ds_config(), "scheduler": {"type": "WarmupLR"}}}, '"scheduler"'),
        ({"deepspeed": {**ds_config(), "tensor_parallel": {"autotp_size": 2}}}, '"tensor_parallel"'),
    ],
)
def test_options_that_contradict_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check_options(arguments(tmp_path, **changes), {})


@pytest.mark.parametrize("name", ["model_init", "optimizers", "optimizer_cls_and_kwargs", "peft_config"])
def test_arguments_that_contradict_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=name):
        Trainer(tiny_model(), arguments(tmp_path), mora=mora_ds.MoRAConfig(), base="x", **{name: (1, 2)})
    check_options(arguments(tmp_path), {"optimizers": (None, None), name: None})


def test_every_refused_option_exists() -> None:
    """FSDP is refused by transformers too, before ours is asked."""
    known = set(inspect.signature(TrainingArguments.__init__).parameters)
    assert set(REFUSED) <= known, "an option was renamed: what is refused now?"


def test_a_model_that_is_sharded_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    next(iter(model.parameters())).ds_id = 0
    with pytest.raises(UserError, match="loaded after TrainingArguments"):
        Trainer(model, arguments(tmp_path), mora=mora_ds.MoRAConfig(), base="x")
    with pytest.raises(UserError, match=r"base=.* is missing"):
        Trainer(tiny_model(), arguments(tmp_path), mora=mora_ds.MoRAConfig())


def test_a_model_is_loaded_unsharded_in_spite_of_the_arguments(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    args = arguments(tmp_path)
    assert hf_deepspeed.is_deepspeed_zero3_enabled() and args.deepspeed
    assert not any(hasattr(parameter, "ds_id") for parameter in load_model(tmp_path / "model").parameters())
    assert hf_deepspeed.is_deepspeed_zero3_enabled()


def test_the_callback_needs_the_mixin(tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
    plain = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, max_steps=1)
    trainer = transformers.Trainer(tiny_model(), plain, train_dataset=rows, callbacks=[MoRACallback(merge_every=10)])
    with pytest.raises(UserError, match="MoRATrainer"):
        trainer.train()


def test_the_config_is_filled_from_the_adapters_parameters(tmp_path: Path) -> None:
    args = arguments(tmp_path, learning_rate=3e-4, weight_decay=0.1)
    fill_config(args, [100, 100])
    config = args.hf_deepspeed_config.config
    assert config["optimizer"]["params"] == {"lr": 3e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}
    assert config["zero_optimization"]["reduce_bucket_size"] == 200
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 0, "what the user sets stays"


def test_transformers_and_accelerate_have_what_is_overridden() -> None:
    """An upgrade that renames one of these would leave ours uncalled."""
    for name in ("_prepare_for_training", "create_scheduler", "evaluation_loop", "floating_point_ops", "save_model",
                 "_save_optimizer_and_scheduler", "_load_best_model"):  # fmt: skip
        assert name in vars(MoRATrainer)
        theirs = inspect.signature(getattr(transformers.Trainer, name)).parameters
        ours = inspect.signature(getattr(MoRATrainer, name)).parameters
        assert {*ours} <= {*theirs, "arguments", "kwargs"}, name
    assert [*inspect.signature(transformers.Trainer._prepare_for_training).parameters] == [
        "self", "max_steps", "train_dataloader", "resume_from_checkpoint",
    ]  # fmt: skip
    assert hasattr(hf_deepspeed, "_hf_deepspeed_config_weak_ref") and hasattr(PartialState, "_prepare_backend")
    source = inspect.getsource(accelerate.Accelerator._prepare_deepspeed)
    assert "ds_initialize = deepspeed.initialize" in source and "config_params=self.deepspeed_config" in source
    assert "self.deepspeed_engine_wrapped" in source and "self._models" in source
    assert "set_gradient_accumulation_boundary" in inspect.getsource(accelerate.utils.deepspeed.DeepSpeedEngineWrapper)
