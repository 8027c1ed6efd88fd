"""Runs with --base_device host: curve, checkpoints and merge ledger are those of a run with
its base on the device.
"""

from unittest.mock import patch

import pytest
from transformers import AutoConfig

from mora_ds.commands.pretrain import train
from mora_ds.config.arguments import parse
from mora_ds.engine import device
from mora_ds.engine.initialize import start_distributed
from mora_ds.engine.layer_prefetcher import LayerPrefetcher
from mora_ds.engine.settings import BaseDevice
from mora_ds.runtime import node_memory
from mora_ds.runtime.ranks import Ranks
from mora_ds.train import base
from mora_ds.train.base import choose_base_device
from mora_ds.train.dry_run import planned
from mora_ds.train.setup import engine_config
from tests.helpers.gloo import run_alone, run_ranks
from tests.helpers.jobs import refused, research, run
from tests.helpers.models import FAMILIES
from tests.helpers.resume import MERGING, assert_same_run, interrupted_job

HOST = "--base_device host"


def deep(user, out, *more):
    """Flags of a run with more decoder layers than buffers, and no file of weights."""
    model = user.root / "deep.json"
    if not model.exists():
        AutoConfig.for_model(
            "llama", **{**FAMILIES["llama"], "num_hidden_layers": 4}
        ).to_json_file(model)
    flags = user.flags(user.root / out, MERGING, "--tokenizer_name", user.model, *more)
    at = flags.index("--model_name_or_path")
    flags[at : at + 2] = ["--model_config", str(model)]
    return flags


def counted(argv):
    """A run's summary, and the bytes that it copied to the buffers."""
    prefetchers = []
    original = LayerPrefetcher.__init__

    def noted(prefetcher, *args):
        original(prefetcher, *args)
        prefetchers.append(prefetcher)

    with patch.object(LayerPrefetcher, "__init__", noted):
        summary = train(parse(argv))
    return summary, sum(prefetcher.copied for prefetcher in prefetchers)


def test_a_run_is_the_same_and_goes_on_on_the_other_side(user):
    """Two merges; stopped right after the first one, and resumed with the base on the
    device.
    """
    more = "--gradient_checkpointing --bf16"
    run(1, deep(user, "resident", more))
    summary, copied = run_alone(counted, deep(user, "streamed", more, HOST))
    assert copied > 0 == summary["base_bytes_gathered"]
    assert_same_run(user.root / "streamed", user.root / "resident")
    argv = deep(user, "changed", more, "--resume_from_checkpoint auto")
    run_alone(interrupted_job, [*argv, *HOST.split()], 4)
    run(1, argv)
    assert_same_run(user.root / "changed", user.root / "resident")


MORE = """
--base_bits 8 --operator share --gradient_checkpointing --bf16
--adapter lora --gradient_accumulation_steps 4
--optimizer muon --chunked_loss --attn_implementation sdpa
--operator decouple --mora_dropout 0.1
--sequence_parallel_size 2
"""


@pytest.mark.heavy
@pytest.mark.parametrize("more", MORE.strip().splitlines())
def test_interrupted_runs_continue_with_the_base_on_the_host(user, more):
    """On two ranks; the streamed run begins with its base on the device."""
    name = more.replace(" ", "").replace("-", "")
    run(2, deep(user, f"{name}-resident", more))
    argv = deep(user, f"{name}-streamed", more, "--resume_from_checkpoint auto")
    run_ranks(2, interrupted_job, argv, 5)
    run(2, [*argv, *HOST.split()])
    assert_same_run(user.root / f"{name}-streamed", user.root / f"{name}-resident")


@pytest.mark.heavy
def test_domains_work(user):
    sources = [f"a={user.train}:1", f"b={user.other}:1"]
    for out, side in (("domains", "device"), ("domains-streamed", "host")):
        argv = deep(user, out, "--train_files", *sources, "--base_device", side)
        run(2, research(argv, user.root, domain_adapters=True))
    assert_same_run(user.root / "domains-streamed", user.root / "domains")


# -- where the base is -----------------------------------------------------------------


def without_memory(argv):
    with patch.object(node_memory, "free_bytes", lambda: 10_000):
        return refused(argv)


def test_too_little_host_memory_is_said_before_anything_is_loaded(user):
    kind, message = run_alone(without_memory, deep(user, "none", HOST))
    assert kind == "UserError"
    assert "0.000 GB are available: give the run more" in message
    assert "--base_device host" in message


def chosen_device(argv, memory):
    """The device that auto chooses on a GPU with this much memory."""
    start_distributed()
    arguments = parse(argv)
    config = AutoConfig.from_pretrained(arguments.model.model_config)
    with (
        patch.object(base, "is_cpu", lambda: False),
        patch.object(device, "memory_bytes", lambda: memory),
    ):
        ds_config = engine_config(arguments.training, arguments.adapter.adapter, 1)
        chosen = choose_base_device(arguments, config, ds_config, Ranks.current())
        return chosen.training.base_device


def test_auto_takes_the_host_where_the_base_does_not_fit(user):
    argv = deep(user, "auto")
    assert run_alone(chosen_device, argv, 80e9) == BaseDevice.DEVICE.value
    assert run_alone(chosen_device, argv, 1e5) == BaseDevice.HOST.value


def unplannable(argv):
    with patch.object(base, "planner_of", side_effect=RuntimeError("no such kernel")):
        return chosen_device(argv, 1e5)


def test_a_model_that_cannot_be_planned_stays_on_the_device(user):
    assert run_alone(unplannable, deep(user, "auto")) == BaseDevice.DEVICE.value


def test_a_dry_run_plans_both(user):
    resident, streamed = (
        planned(parse(deep(user, "dry", "--base_device", side)), 1)[0]
        for side in ("device", "host")
    )
    assert resident.memory.host_base == 0 < streamed.memory.host_base
    left = resident.memory.base - streamed.memory.host_base
    assert streamed.memory.base == left + streamed.memory.base_buffers
    assert streamed.copied > 0
