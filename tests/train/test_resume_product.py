"""Resumed = uninterrupted, bit for bit, for every two of: optimizer, ZeRO stage, dtype,
offload and adapter.
"""

import json

import pytest

from mora_ds.common.files import read_json
from tests.helpers.jobs import REPOSITORY, run
from tests.helpers.outcome import assert_same_outcome
from tests.helpers.pairwise import pairwise
from tests.helpers.resume import stop_and_resume

pytestmark = pytest.mark.heavy

LOOP = (
    "--max_steps 7 --save_steps 2 --gradient_accumulation_steps 2 --max_grad_norm 0.5"
)
MERGES = "--merge_every 3 --restart_warmup_steps 1 --train_norms true"


def ds_config(folder, stage, offload):
    config = read_json(REPOSITORY / "configs" / f"zero{stage}.json")
    config["zero_optimization"]["offload_optimizer"] = {"device": offload}
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(config))
    return path


def is_supported(adapter, optimizer, offload, **_):
    """Muon is for MoRA matrices, with its momentum on the device."""
    return optimizer != "muon" or (adapter == "mora" and offload == "none")


@pairwise(
    {
        "adapter": ["mora", "lora", "full"],
        "optimizer": ["adamw", "muon"],
        "stage": [1, 2, 3],
        "offload": ["none", "cpu"],
        "dtype": ["fp32", "bf16", "fp16"],
    },
    is_supported,
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    user, tmp_path, out, adapter, optimizer, stage, offload, dtype
):
    more = [f"--adapter {adapter} --optimizer {optimizer} {LOOP}"]
    if adapter != "full":
        more.append(MERGES)
    if dtype != "fp32":
        more.append(f"--{dtype}")
    more += ["--deepspeed", ds_config(tmp_path, stage, offload)]
    run(2, user.flags(tmp_path / "reference", *more))
    stop_and_resume(2, user.flags(out, *more), 4)
    assert_same_outcome(out, tmp_path / "reference")
