"""Every packaged file in configs/ is read by the code that will read it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mora_ds.common.files import read_json
from mora_ds.config.arguments import parse
from mora_ds.config.data import DataArguments
from mora_ds.config.mixture import mixture_config
from mora_ds.config.validate import validate
from mora_ds.engine.ds_config import compute_dtype, fill_bucket_sizes, resolve_ds_config

CONFIGS = Path(__file__).parents[2] / "configs"
DEEPSPEED = sorted(CONFIGS.glob("*.json"))
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
MIXTURES = sorted((CONFIGS / "mixtures").glob("*.yaml"))
MODELS = sorted((CONFIGS / "models").glob("*.json"))


def test_there_is_something_of_each_kind():
    kinds = ((DEEPSPEED, 4), (RECIPES, 8), (MIXTURES, 1), (MODELS, 5))
    assert all(len(files) >= least for files, least in kinds)


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "flags, dtype",
    [([], torch.float32), (["--bf16"], torch.bfloat16), (["--fp16"], torch.float16)],
)
def test_deepspeed_configs_follow_the_flags(path, flags, dtype):
    training = parse(
        ["--deepspeed", str(path), *flags, "--per_device_train_batch_size", "3"]
    ).training
    settings = training.engine_settings()
    resolved = fill_bucket_sizes(
        resolve_ds_config(path, settings, world_size=2), [64, 128]
    )
    assert compute_dtype(resolved) == dtype
    assert resolved["train_batch_size"] == 6
    assert '"auto"' not in json.dumps(resolved)
    assert resolved["zero_optimization"]["stage"] == int(path.stem[4])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_make_valid_runs(path):
    arguments = parse(
        [str(path), "--model_name_or_path", "model", "--train_files", "a.txt"]
    )
    validate(arguments)
    assert arguments.training.deepspeed is not None
    json_file = CONFIGS.parent / arguments.training.deepspeed
    resolve_ds_config(json_file, arguments.training.engine_settings(), world_size=8)
    schedule = arguments.schedule_of(
        arguments.training.max_steps if arguments.training.max_steps > 0 else 5000
    )
    assert (
        schedule.learning_rate(schedule.warmup_steps)
        == arguments.training.peak_learning_rate
    )


@pytest.mark.parametrize(
    "name, rank, learning_rates", [("r8", 8, (4e-4, 5e-4)), ("r256", 256, (5e-5, 7e-5))]
)
def test_recipes_of_the_paper_hold_the_papers_figures(name, rank, learning_rates):
    arguments = parse([str(CONFIGS / "recipes" / f"continual_7b_{name}.yaml")])
    training = arguments.training
    assert arguments.adapter.mora_rank == rank
    assert learning_rates[0] <= training.learning_rate <= learning_rates[1]
    assert (
        training.per_device_train_batch_size * training.gradient_accumulation_steps * 8
        == 128
    )
    assert (
        arguments.data.seq_len,
        arguments.schedule.warmup_steps,
        training.num_train_epochs,
    ) == (
        2048,
        150,
        3.0,
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_leave_model_and_data_to_the_user(path):
    keys = parse([str(path)]).set_by_user
    assert not {"model_name_or_path", "train_files", "output_dir"} & keys


@pytest.mark.parametrize("path", MIXTURES, ids=lambda path: path.stem)
def test_mixtures_make_plans(path):
    mixture = mixture_config(
        DataArguments(mixture=str(path), replay=["general=old/*.jsonl:0.05"])
    )
    assert mixture is not None
    assert len(mixture.sources) == 3
    assert len(mixture.phases) == 2
    assert all(
        weights[-1] == 0.05 and sum(weights) == pytest.approx(1)
        for _, weights in mixture.phases
    )


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model_configs_build_a_model(path):
    config = AutoConfig.from_pretrained(str(path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    packaged = read_json(path)
    unknown = [key for key in packaged if key not in config.to_dict()]
    assert model.get_input_embeddings().weight.shape == (
        packaged["vocab_size"],
        packaged["hidden_size"],
    )
    assert unknown == ["rope_theta"] or not unknown
