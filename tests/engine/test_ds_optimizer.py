"""The optimizer's part of a DeepSpeed config: filled from the flags, and refused where it
cannot be.
"""

import re

from mora_ds.config.arguments import parse
from mora_ds.engine.ds_config import complete_ds_config, resolve_ds_config
from tests.helpers.errors import user_error
from tests.helpers.tables import each_row, parsed


def flags(more=""):
    return parse(f"--model_name_or_path m --train_files t {more}".split())


def test_the_flags_fill_the_config():
    arguments = flags("--optimizer muon --embedding_learning_rate 1e-3")
    settings = arguments.training.engine_settings()
    for config in ({}, {"optimizer": {"type": "auto"}}):
        resolved = resolve_ds_config(config, settings, 2)
        assert resolved["optimizer"]["type"] == "Muon"
        wanted = {"lr": 1e-3, "muon_lr": 0.01, "momentum": 0.95, "torch_adam": True}
        assert wanted.items() <= resolved["optimizer"]["params"].items()
        assert resolved["zero_optimization"]["reduce_scatter"] is False
        assert resolved["communication_data_type"] == "fp32"
    stage_2 = resolve_ds_config({"zero_optimization": {"stage": 2}}, settings, 2)
    assert "reduce_scatter" not in stage_2["zero_optimization"]
    assert arguments.schedule_of(10).peak == 0.01


WRONG = """
{optimizer: {type: AdamW}} | optimizer.type = "AdamW" but --optimizer = muon; set it to "auto"
{optimizer: {params: {muon_lr: 1.0}}} | muon_lr = 1.0 but --learning_rate = 0.01
{optimizer: {params: {lr: 1.0}}} | lr = 1.0 but --embedding_learning_rate = 0.0004
{optimizer: {params: {momentum: 0.5}}} | momentum = 0.5 but it is 0.95 here
{optimizer: {params: {adam_lr: 0.5}}} | "lr" is the learning rate of AdamW
{optimizer: {params: {per_head_muon: true}}} | a MoRA matrix is not an attention projection
{optimizer: {params: {fused: true}}} | fused is not for Muon
{optimizer: {params: {torch_adam: false}}} | torch_adam = false but DeepSpeed's own Adam
{optimizer: {params: {ns_method: newton}}} | ns_method must be "gram" or "standard"
{zero_optimization: {stage: 3, reduce_scatter: true}} | reduce_scatter = true but Muon needs unsharded
{zero_optimization: {stage: 3}, communication_data_type: bf16} | communication_data_type
{zero_optimization: {save_muon_momentum_buffer_in_memory: true}} | momentum at zero
{zero_optimization: {offload_optimizer: {device: cpu}}} | offload_optimizer is for AdamW
{zero_optimization: {round_robin_gradients: true}} | round_robin_gradients
{zero_optimization: {stage: 1, compute_grad_norm: false}} | compute_grad_norm must stay true
"""


@each_row("config, message", WRONG)
def test_each_wrong_setting_is_named(config, message):
    settings = flags("--optimizer muon").training.engine_settings()
    with user_error(re.escape(message)):
        resolve_ds_config(parsed(config), settings, 2)


def test_a_config_that_names_muon_contradicts_the_other_flag():
    with user_error(r'optimizer\.type = "Muon" but --optimizer = adamw'):
        resolve_ds_config(
            {"optimizer": {"type": "Muon"}}, flags().training.engine_settings(), 1
        )
    with user_error(r"optimizer\.params\.momentum is not for AdamW"):
        complete_ds_config({"optimizer": {"params": {"momentum": 0.9}}}, [1])
