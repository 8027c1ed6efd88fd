"""Every recipe of configs/recipes/ is dry-run with a model of its size, and keeps what its
comments say.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mora_ds.commands.pretrain import train
from mora_ds.config.arguments import parse
from mora_ds.models.load import read_model_config
from mora_ds.planning.plan import USABLE
from mora_ds.train.dry_run import planned
from tests.helpers.tables import heavy, parsed

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
SEED = CONFIGS / "recipes/seed.yaml"
"""Needs the file of a plan; tests/research/test_seed.py runs it."""

LONG = (
    "continual_70b",
    "continual_7b_r8",
    "continual_7b_r256",
    "continual_7b_replay",
    "tensor_parallel_2",
    "tier_b_llama2_7b",
)
"""Recipes that take long to plan."""

SHAPES = parsed("""
1b:
  {model_type: olmo2, hidden_size: 2048, intermediate_size: 8192, num_hidden_layers: 16,
   num_attention_heads: 16, vocab_size: 100352, max_position_embeddings: 4096}
7b:
  {hidden_size: 4096, intermediate_size: 11008, num_hidden_layers: 32, num_attention_heads: 32,
   vocab_size: 32000}
8b:
  {hidden_size: 4096, intermediate_size: 14336, num_hidden_layers: 32, num_attention_heads: 32,
   num_key_value_heads: 8, vocab_size: 128256, max_position_embeddings: 131072}
70b:
  {hidden_size: 8192, intermediate_size: 28672, num_hidden_layers: 80, num_attention_heads: 64,
   num_key_value_heads: 8, vocab_size: 128256, max_position_embeddings: 131072}
""")
PARAMETERS = parsed("""
1b: 1.485e+9
7b: 6.74e+9
8b: 8.03e+9
70b: 70.55e+9
250m: 247.0e+6
1b3: 1.34e+9
""")
BATCH = re.compile(
    r"# (\d+(?: x \d+)*)(?: groups \(\d+ GPUs\)| x (\d+) GPUs) = (\d+) sequences"
)


def size_of(path):
    return next((word for word in path.stem.split("_") if word in PARAMETERS), "7b")


def model_config(size, folder):
    """The packaged config of a model that is trained from scratch; otherwise one of the
    size that the recipe is for.
    """
    packaged = CONFIGS / "models" / f"llama_{size}.json"
    if packaged.is_file():
        return packaged
    config_file = folder / "config.json"
    config_file.write_text(
        json.dumps(
            {"model_type": "llama", "tie_word_embeddings": False, **SHAPES[size]}
        )
    )
    return config_file


def dry_run_of(recipe, config, out):
    flags = f"--model_name_or_path {config} --output_dir {out} --dry_run"
    return [str(recipe), *flags.split()]


def numbers(pattern, text):
    """The numbers that `pattern` finds in `text`."""
    return [float(number) for number in re.findall(pattern, text)]


@pytest.mark.parametrize(
    "path",
    [heavy(path) if path.stem in LONG else path for path in RECIPES if path != SEED],
    ids=lambda path: path.stem,
)
def test_recipes_are_planned(path, tmp_path, out, monkeypatch, capsys):
    """--dry_run on as many ranks as the recipe is for: of the right model, within the
    device that its plan names.
    """
    size = size_of(path)
    text = path.read_text().replace("\n# ", " ")
    asked = re.search(
        r"mora-ds plan .*--gpus (\d+) --gpu_memory (\d+)", path.read_text()
    )
    ranks, memory = (int(asked[1]), float(asked[2])) if asked else (8, 80.0)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.chdir(CONFIGS.parent)
    arguments = parse(dry_run_of(path, model_config(size, tmp_path), out))
    train(arguments)
    output = capsys.readouterr().out
    assert not out.exists()
    assert f"plan: {ranks} ranks" in output
    if (
        not arguments.adapter.train_embeddings
    ):  # what is trained comes on top of the model
        elements = planned(arguments, ranks)[0].base_elements
        assert elements == pytest.approx(PARAMETERS[size], rel=0.01)
    (highest,) = numbers(r"= peak +([\d.]+) GB", output)
    assert highest <= USABLE * memory
    as_highest = pytest.approx(highest, abs=0.06)
    if asked:
        assert numbers(r"([\d.]+) GB at the peak", text)[0] == as_highest
    said = numbers(r"([\d.]+) GB per GPU per step", text)
    assert bool(said) == (path.stem in ("continual", "continual_embeddings"))
    if said:
        (sent,) = numbers(r"sent per GPU per step +([\d.]+) GB", output)
        assert said[0] == round(sent, 1)
    page = (CONFIGS.parent / "docs/recipes/choosing.md").read_text()
    (row,) = re.findall(rf"^\|.*`{path.stem}`.*$", page, re.MULTILINE)
    peaks = numbers(r"([\d.]+)", row.split("|")[4])
    assert any(peak == as_highest for peak in peaks), row


def tier_rows():
    """Name and flags of every row of runs on the page of experiments, all but every third
    for the heavy tests.
    """
    page = (CONFIGS.parent / "docs/recipes/tiers.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| (?:`([^`]+)` )?\|$", page, re.MULTILINE)
    return [
        pytest.param(
            flags.split(), id=name, marks=pytest.mark.heavy if index % 3 else ()
        )
        for index, (name, flags) in enumerate(rows)
    ]


@pytest.mark.parametrize("flags", tier_rows())
def test_experiments_are_planned(flags, tmp_path, out, monkeypatch, capsys):
    """Every method at the size of tier A, on its 8 GPUs of 80 GB and with its batch."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.chdir(CONFIGS.parent)
    recipe = CONFIGS / "recipes/tier_a_olmo2_1b.yaml"
    train(parse([*dry_run_of(recipe, model_config("1b", tmp_path), out), *flags]))
    output = capsys.readouterr().out
    assert "524,288 tokens per step" in output
    assert numbers(r"= peak +([\d.]+) GB", output)[0] <= USABLE * 80.0


@pytest.mark.parametrize("size", ["250m", "1b3"])
def test_shapes_of_the_paper_have_their_sizes(size):
    config = read_model_config(CONFIGS / "models" / f"llama_{size}.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == pytest.approx(PARAMETERS[size], rel=0.01)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_batches_are_what_the_comments_say(path):
    training = parse([str(path)]).training
    product, gpus, sequences = BATCH.search(path.read_text()).groups(default=1)
    factors = [int(number) for number in product.split(" x ")]
    assert math.prod(factors) * int(gpus) == int(sequences)
    rank_batch = (
        training.per_device_train_batch_size * training.gradient_accumulation_steps
    )
    assert int(sequences) % rank_batch == 0
    assert factors[0] == training.per_device_train_batch_size
