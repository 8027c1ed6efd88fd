"""`mora-ds plan`: what its flags mean, and what it prints."""

import json
import re

import pytest
import torch

from mora_ds.adapters.config import MoRAConfig
from mora_ds.commands import plan as tool
from mora_ds.planning.plan import Cluster
from tests.helpers.jobs import REPOSITORY
from tests.helpers.tools import call

TINY = REPOSITORY / "configs/models/tiny_llama.json"


def planner_of(flags):
    options, settings = tool._parser().parse_known_args(flags.split())
    return tool._planner(options, tool._arguments(options, settings))


def test_the_tool_plans_what_its_flags_and_a_recipe_say(monkeypatch, tmp_path):
    """The flags win, as in training; a recipe's micro-batches a step are kept."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    (tmp_path / "recipe.yaml").write_text(
        "mora_rank: 8\ntrain_embedding_rank: 3\ngradient_accumulation_steps: 3\n"
    )
    flags = (
        f"{tmp_path}/recipe.yaml --model {TINY} --gpus 16 --gpus_per_node 4 --gpu_memory 40 --seq_len 256 "
        "--micro_batch 2 --sequence_parallel_size 2 --fp16 --no_document_mask --mora_rank 4 --deepspeed=~/ds.json"
    )
    planner = planner_of(flags)
    work = planner.work
    config = planner.ds_config
    assert (work.seq_len, work.micro_batch, work.dtype, work.sequence_parallel) == (
        256,
        2,
        torch.float16,
        2,
    )
    assert (work.document_mask, work.checkpointing, work.by_documents) == (
        False,
        False,
        True,
    )
    assert work.adapter == MoRAConfig(rank=4, embedding_rank=3)
    assert (planner.cluster, planner.on_cpu, planner.accumulation) == (
        Cluster(16, 4, 40e9),
        False,
        3,
    )
    assert config["train_batch_size"] == 2 * 3 * 8
    assert config["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    "recipe, flags, dtype",
    [
        ("mora_rank: 8", "", torch.bfloat16),
        ("fp16: true", "", torch.float16),
        ("bf16: false", "", torch.float32),
        ("mora_rank: 8", "--fp16", torch.float16),
    ],
)
def test_a_plan_has_the_precision_of_its_recipe_and_the_model_of_its_flag(
    tmp_path, recipe, flags, dtype
):
    (tmp_path / "recipe.yaml").write_text(f"model_config: another.json\n{recipe}\n")
    planner = planner_of(f"{tmp_path}/recipe.yaml --model {TINY} --gpus 8 {flags}")
    assert planner.work.dtype == dtype


def test_a_recipe_is_planned_as_it_stands_before_a_recommendation(capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "per_device_train_batch_size: 2\ngradient_accumulation_steps: 2\nseq_len: 128\n"
        "train_embedding_rank: 3\nmax_steps: 100000\n"
    )
    flags = f"{recipe} --model {TINY} --gpus 8 --assume_mfu 0.5"
    plan = planner_of(flags).plan()
    assert plan.checkpoint == 16 * plan.trained.total
    call("plan", *flags.split())
    given, recommended = capsys.readouterr().out.split(tool.RECOMMENDED)
    assert given.startswith(tool.AS_GIVEN)
    assert "--per_device_train_batch_size 2 --gradient_accumulation_steps 2" in given
    assert "4,096 tokens per step" in given
    assert re.search(r"embeddings and others +0.\d+ MB  1/8", given)
    assert "100,000 steps, 409,600,000 tokens" in given
    hours = 409.6e6 * plan.token_flops / (0.5 * 989e12 * 3600)
    assert f"at an MFU of 50%: {hours:,.1f} GPU-hours of an H100" in given
    assert "--per_device_train_batch_size 256" in recommended


def test_the_tool_prints_json(capsys):
    call("plan", "--model", TINY, "--gpus", 16, "--gpu_memory", 1, "--json")
    printed = capsys.readouterr()
    plan = json.loads(printed.out)
    assert plan["recommended"]
    assert plan["fits"]
    assert plan["bytes"]["peak"] < 1e9
    assert plan["bytes_gathered"] == pytest.approx(
        2 * plan["trained_elements"], rel=0.01
    ), "each parameter once"
