"""DeepSpeed's JSON: "auto" is filled, contradictions are listed at once, and DeepSpeed
accepts what comes out.
"""

import copy
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mora_ds.common.errors import UserError
from mora_ds.common.files import config_path
from mora_ds.engine.ds_config import (
    AUTO,
    PERSIST_BUDGET_BYTES,
    REDUCE_BUCKET_NUMEL,
    avoid_slices,
    compute_dtype,
    fill_bucket_sizes,
    resolve_ds_config,
)
from mora_ds.engine.ds_keys import REFUSED, TOP_LEVEL
from mora_ds.engine.settings import EngineSettings
from tests.helpers.errors import user_error
from tests.helpers.tables import each_row, parsed, rows

SETTINGS = EngineSettings(
    micro_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=4e-4,
    other_learning_rate=4e-4,
    betas=(0.9, 0.95),
    epsilon=1e-8,
    weight_decay=0.1,
    max_grad_norm=1.0,
    bf16=False,
    fp16=False,
)


def validation_errors_of(config):
    """The message with which a config is refused."""
    with pytest.raises(UserError) as caught:
        resolve_ds_config(config, SETTINGS, world_size=3)
    return str(caught.value)


# -- filling ---------------------------------------------------------------------------


def test_an_empty_config_and_one_of_autos_resolve_alike():
    auto = {
        **dict.fromkeys(
            (
                "train_batch_size",
                "train_micro_batch_size_per_gpu",
                "gradient_accumulation_steps",
            ),
            AUTO,
        ),
        "gradient_clipping": AUTO,
        "optimizer": {
            "type": "AdamW",
            "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), AUTO),
        },
        "data_types": {"grad_accum_dtype": AUTO},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": AUTO},
    }
    resolved = resolve_ds_config(auto, SETTINGS, world_size=3)
    for empty in ({}, None):
        assert resolved == resolve_ds_config(empty, SETTINGS, world_size=3)
    assert resolved["train_batch_size"] == 24
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["gradient_accumulation_steps"] == 2
    assert resolved["gradient_clipping"] == 1.0
    assert resolved["optimizer"] == parsed(
        "{type: AdamW, params: {lr: 4.0e-4, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.1, torch_adam: true}}"
    )
    assert resolved["data_types"]["grad_accum_dtype"] == "fp32"
    assert resolved["zero_optimization"]["memory_efficient_linear"] is False


@pytest.mark.parametrize("comet", ["s3cret", {"enabled": True, "api_key": ["s3cret"]}])
def test_no_message_has_a_secret(comet):
    with user_error("comet") as caught:
        resolve_ds_config({"comet": comet}, SETTINGS, 1)
    assert "s3cret" not in str(caught.value)


def test_the_users_config_is_not_touched_and_own_values_stay():
    config = {
        "zero_optimization": {
            "stage": 3,
            "memory_efficient_linear": True,
            "stage3_param_persistence_threshold": 0,
        },
        "steps_per_print": 7,
    }
    before = json.dumps(config)
    resolved = fill_bucket_sizes(resolve_ds_config(config, SETTINGS, 1), [100])
    assert json.dumps(config) == before
    assert resolved["zero_optimization"]["memory_efficient_linear"] is True
    assert resolved["zero_optimization"]["stage3_param_persistence_threshold"] == 0
    assert resolved["steps_per_print"] == 7


def test_what_is_written_down_as_off_is_off():
    off = parsed("""
    zero_optimization: {stage: 3, zero_hpz_partition_size: 1, zero_quantized_weights: false}
    tensor_parallel: {autotp_size: 1}
    data_types: {grad_accum_dtype: null}
    """)
    resolved = resolve_ds_config(off, SETTINGS, 1)
    assert "zero_hpz_partition_size" not in resolved["zero_optimization"]
    assert "tensor_parallel" not in resolved
    assert resolved["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize(
    "flag, dtype",
    [("bf16", torch.bfloat16), ("fp16", torch.float16), (None, torch.float32)],
)
@pytest.mark.parametrize(
    "written",
    [{}, {"bf16": {"enabled": AUTO}, "fp16": {"enabled": AUTO}}, {"bf16": None}],
)
def test_compute_dtype_follows_the_flag(flag, dtype, written):
    settings = replace(SETTINGS, bf16=flag == "bf16", fp16=flag == "fp16")
    assert compute_dtype(resolve_ds_config(written, settings, 1)) == dtype


def zero_sizes(numels, settings=SETTINGS):
    """The settings that are filled in for trained parameters with these numbers of
    elements."""
    config = resolve_ds_config({}, settings, 2)
    return fill_bucket_sizes(config, numels)["zero_optimization"]


PERSISTENT = "stage3_param_persistence_threshold"


def test_small_mora_matrices_persist_and_large_ones_are_partitioned():
    bf16 = replace(SETTINGS, bf16=True)
    small = zero_sizes([256 * 256, 362 * 362] * 7, bf16)
    assert small[PERSISTENT] == 362 * 362
    assert small["reduce_bucket_size"] == 7 * (256**2 + 362**2)
    assert small["stage3_prefetch_bucket_size"] == 8 * 362**2
    mora_matrices = [1448**2] * 128 + [1944**2] * 96  # Llama-2-7B at rank 256
    large = zero_sizes([*mora_matrices, *[4096] * 65], bf16)
    assert large[PERSISTENT] == 4096, "the norms persist, the matrices do not"
    assert large["reduce_bucket_size"] == REDUCE_BUCKET_NUMEL
    assert zero_sizes(mora_matrices, bf16)[PERSISTENT] == 0


def test_persistence_budget_is_in_bytes_of_the_compute_dtype():
    numel = PERSIST_BUDGET_BYTES // 2
    assert zero_sizes([numel], replace(SETTINGS, bf16=True))[PERSISTENT] == numel
    assert zero_sizes([numel])[PERSISTENT] == 0


def test_a_bucket_is_even_and_holds_the_largest_parameter():
    """ZeRO-1 and ZeRO-2 refuse an odd one."""
    largest = REDUCE_BUCKET_NUMEL * 2
    for numels, size in (
        ([3, 4], 8),
        ([3, 5], 8),
        ([7], 8),
        ([], 2),
        ([largest, 10], largest),
    ):
        zero = zero_sizes(numels)
        assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (
            size,
            size,
        )
        assert zero["stage3_prefetch_bucket_size"] == sum(numels)
    assert zero_sizes([])[PERSISTENT] == 0


MATRICES_7B = [256**2] * 128 + [344**2] * 96
"""About those of rank 8."""


CHOSEN = """
# few ranks
36 | {} | {}
37 | {} | {reduce_scatter: false, stage3_allgather_sequential: true}
# one of the two is written, then both
4096 | {reduce_scatter: true} | {stage3_allgather_sequential: true}
4096 | {reduce_scatter: true, stage3_allgather_sequential: false} | {}
"""
"""Ranks | what the config says itself | what is chosen."""


@pytest.mark.parametrize("row", rows(CHOSEN), ids=" ".join)
def test_many_ranks_take_collectives_without_loops(row):
    ranks, written, chosen = map(parsed, row)
    config = resolve_ds_config(
        {"zero_optimization": {"stage": 3, **written}}, replace(SETTINGS, bf16=True), 2
    )
    before = dict(config["zero_optimization"])
    text = avoid_slices(config, MATRICES_7B, ranks)
    assert config["zero_optimization"] == {**before, **chosen}
    assert bool(text) == bool(chosen)
    assert all(key in text for key in chosen)
    assert ("39.5 MB more" in text) == ("reduce_scatter" in chosen)


def test_large_gradients_keep_the_collectives_that_send_less():
    config = resolve_ds_config({}, replace(SETTINGS, bf16=True), 2)
    assert avoid_slices(config, [10**8] * 224, 64) == ""


FULL_BUCKETS = """
2 | bf16 | 255  | {} | no
2 | bf16 | 256  | {} | yes
2 | fp32 | 4096 | {} | yes
1 | fp32 | 4096 | {} | yes
# fp32 gradients are sent in 16 bits
1 | bf16 | 4096 | {} | no
# what the file says itself stays
2 | bf16 | 4096 | {zero_optimization: {reduce_scatter: true}} | no
2 | bf16 | 4096 | {zero_optimization: {use_multi_rank_bucket_allreduce: false}} | no
2 | bf16 | 4096 | {prescale_gradients: false} | no
2 | bf16 | 4096 | {communication_data_type: fp32} | no
"""


@each_row("stage, dtype, ranks, written, chosen", FULL_BUCKETS)
def test_many_ranks_of_the_lower_stages_reduce_full_buckets(
    stage, dtype, ranks, written, chosen
):
    settings = parsed(written)
    settings["zero_optimization"] = {
        "stage": int(stage),
        **settings.get("zero_optimization", {}),
    }
    config = resolve_ds_config(settings, replace(SETTINGS, bf16=dtype == "bf16"), 2)
    expected = copy.deepcopy(config)
    if chosen == "yes":
        expected["prescale_gradients"] = True
        expected["zero_optimization"]["reduce_scatter"] = False
    text = avoid_slices(config, MATRICES_7B, int(ranks))
    assert config == expected
    assert ("as many bytes as before" in text) == (chosen == "yes")


# -- refusing --------------------------------------------------------------------------


CONTRADICTIONS = """{
  "train_micro_batch_size_per_gpu": 8,
  "gradient_accumulation_steps": 1,
  "train_batch_size": 100,
  "gradient_clipping": 0.5,
  "bf16": {"enabled": true},
  "optimizer": {"params": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 0.0}}
}"""


def test_contradictions_are_listed_at_once(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(CONTRADICTIONS)
    assert validation_errors_of(path).splitlines() == [
        f'{path}: train_micro_batch_size_per_gpu = 8 but --per_device_train_batch_size = 4; set it to "auto"',
        f'{path}: gradient_accumulation_steps = 1 but --gradient_accumulation_steps = 2; set it to "auto"',
        f'{path}: gradient_clipping = 0.5 but --max_grad_norm = 1.0; set it to "auto"',
        f'{path}: optimizer.params.betas = [0.9, 0.999] but --adam_beta1, --adam_beta2 = [0.9, 0.95]; set it to "auto"',
        f'{path}: optimizer.params.eps = 1e-06 but --adam_epsilon = 1e-08; set it to "auto"',
        f'{path}: optimizer.params.weight_decay = 0.0 but --weight_decay = 0.1; set it to "auto"',
        f'{path}: train_batch_size = 100 but 4 per process x 2 accumulated x 3 processes = 24; set it to "auto"',
        f'{path}: optimizer.params.lr = 0.001 but --learning_rate = 0.0004; set it to "auto"',
        f'{path}: bf16.enabled = true but --bf16 is not given; set it to "auto"',
    ]


WRONG = """
{zero_optimization: {stag: 3}} | unknown key 'zero_optimization.stag'. Did you mean 'stage'?
{optimizer: {params: {learning_rate: 1}}} | unknown key 'optimizer.params.learning_rate'
{zero_optimization: {offload_optimizer: {devise: cpu}}} | Did you mean 'device'?
{zero_optimization: {stage: true}} | stage must be 1, 2 or 3, got true
{zero_optimization: {stage: 0}} | stage must be 1, 2 or 3, got 0; 1 shards the least
{zero_optimization: {offload_optimizer: {device: cpu, ratio: 0.0}}} | ratio must stay 1
{optimizer: {params: {fused: true, foreach: true}}} | fused and foreach exclude each other
{gradient_allreduce_op: sum} | average over tokens
{managed_gradient_accumulation: false} | must stay true
{steps_per_print: auto} | steps_per_print: "auto" works only for settings that
"""
"""Others are lines of tests/config/test_bad_launches.py."""


@each_row("config, message", WRONG)
def test_each_wrong_setting_is_named(config, message):
    text = validation_errors_of(parsed(config))
    assert message in text
    assert len(text.splitlines()) == 1


def test_the_packaged_files_need_no_flags():
    """ "auto" follows the model, otherwise it is the default of DeepSpeed or torch."""
    config = resolve_ds_config(config_path("zero3"), dtype=torch.bfloat16)
    assert compute_dtype(config) == torch.bfloat16
    assert config["train_micro_batch_size_per_gpu"] == 1
    assert config["optimizer"] == {"type": "AdamW", "params": {"torch_adam": True}}
    assert compute_dtype(resolve_ds_config(config_path("zero2"))) == torch.float32
    given = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": AUTO}
    assert "train_micro_batch_size_per_gpu" not in resolve_ds_config(given)
    with user_error("zero9.*there are .*models/llama3_8b.json"):
        config_path("zero9")


@pytest.mark.parametrize("path", REFUSED)
def test_refused_keys_give_their_reason_and_pass_when_off(path):
    def nested(value):
        for key in reversed(path.split(".")):
            value = {key: value}
        return value

    assert REFUSED[path] in validation_errors_of(
        nested({"enabled": True, "device": "cpu"})
    )
    for off in (False, None, {"enabled": False}):
        assert resolve_ds_config(nested(off), SETTINGS, 1)


# -- against the installed DeepSpeed ---------------------------------------------------


def test_every_known_top_level_key_is_named_in_deepspeeds_source():
    (root,) = importlib.util.find_spec("deepspeed").submodule_search_locations
    names = "config.py constants.py config_utils.py precision_config.py aio_config.py"
    paths = [path for name in names.split() for path in Path(root).rglob(name)]
    source = "".join(path.read_text() for path in paths).replace("'", '"')
    assert [key for key in TOP_LEVEL if f'"{key}"' not in source] == []
