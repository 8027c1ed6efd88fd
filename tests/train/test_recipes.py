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

from mora_ds.config.arguments import parse
from mora_ds.models.load import read_model_config
from mora_ds.planning.plan import USABLE
from mora_ds.train.dry_run import planned
from mora_ds.train.pretrain import pretrain

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))

LONG = (
    "continual_70b",
    "continual_7b_r8",
    "continual_7b_r256",
    "continual_7b_replay",
    "tensor_parallel_2",
    "tier_b_llama2_7b",
)
"""To plan."""

_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_LLAMA_3 = {
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
}
SHAPES = {
    "1b": {
        "model_type": "olmo2", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 16, "vocab_size": 100_352, "max_position_embeddings": 4096,
    },
    "7b": {**_7B, "vocab_size": 32_000},
    "8b": {**_7B, **_LLAMA_3, "intermediate_size": 14_336},
    "70b": {
        **_LLAMA_3, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}  # fmt: skip
PARAMETERS = {
    "1b": 1.485e9,
    "7b": 6.74e9,
    "8b": 8.03e9,
    "70b": 70.55e9,
    "250m": 247e6,
    "1b3": 1.34e9,
}
BATCH = re.compile(
    r"# (\d+(?: x \d+)*)(?: groups \(\d+ GPUs\)| x (\d+) GPUs) = (\d+) sequences"
)


def size_of(path):
    return next((word for word in path.stem.split("_") if word in PARAMETERS), "7b")


def model_config(size, folder):
    """The shipped one of a model that is trained from scratch; otherwise one of the size
    that the recipe is for.
    """
    shipped = CONFIGS / "models" / f"llama_{size}.json"
    if shipped.is_file():
        return shipped
    config_file = folder / "config.json"
    config_file.write_text(
        json.dumps({"model_type": "llama", "tie_word_embeddings": False, **SHAPES[size]})
    )
    return config_file


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, marks=pytest.mark.heavy if path.stem in LONG else (), id=path.stem
        )
        for path in RECIPES
    ],
)
def test_recipes_are_planned(path, tmp_path, monkeypatch, capsys):
    """--dry_run on as many ranks as the recipe is for: of the right model, within the
    device that its plan names.
    """
    size = size_of(path)
    text = path.read_text()
    asked = re.search(r"mora-ds plan .*--gpus (\d+) --gpu_memory (\d+)", text)
    ranks, memory = (int(asked[1]), float(asked[2])) if asked else (8, 80.0)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.chdir(CONFIGS.parent)
    flags = [
        "--model_name_or_path",
        str(model_config(size, tmp_path)),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    arguments = parse([str(path), *flags, "--dry_run"])
    pretrain(arguments)
    told = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert f"plan: {ranks} ranks" in told
    if not arguments.adapter.train_embeddings:  # what is trained comes on top of the model
        assert planned(arguments, ranks)[0].base_elements == pytest.approx(
            PARAMETERS[size], rel=0.01
        )
    highest = re.search(r"= peak +([\d.]+) GB", told)
    assert highest is not None
    assert float(highest[1]) <= USABLE * memory
    promised = re.search(r"([\d.]+) GB at the peak", text.replace("\n# ", " "))
    assert asked is None or promised is not None
    if asked is not None and promised is not None:
        assert float(promised[1]) == pytest.approx(float(highest[1]), abs=0.06)
    said = re.search(
        r"([\d.]+) GB on the network of a GPU and step", text.replace("\n# ", " ")
    )
    assert (said is not None) == (path.stem in ("continual", "continual_embeddings"))
    if said is not None:
        sent = re.search(r"sent a step and GPU +([\d.]+) GB", told)
        assert sent is not None
        assert float(said[1]) == round(float(sent[1]), 1)
    page = (CONFIGS.parent / "docs/recipes/choosing.md").read_text()
    (row,) = (
        line
        for line in page.splitlines()
        if line.startswith("|") and f"`{path.stem}`" in line
    )
    peaks = [float(number) for number in re.findall(r"[\d.]+", row.split("|")[4])]
    assert any(peak == pytest.approx(float(highest[1]), abs=0.06) for peak in peaks), row


def tier_rows():
    """Name and flags of every row of runs on the page of experiments."""
    page = (CONFIGS.parent / "docs/recipes/tiers.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| (?:`([^`]+)` )?\|$", page, re.MULTILINE)
    return [pytest.param(flags.split(), id=name) for name, flags in rows]


@pytest.mark.parametrize("flags", tier_rows())
def test_experiments_are_planned(flags, tmp_path, monkeypatch, capsys):
    """Every method at the size of tier A, on its 8 GPUs of 80 GB and with its batch."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.chdir(CONFIGS.parent)
    recipe = [
        str(CONFIGS / "recipes/tier_a_olmo2_1b.yaml"),
        "--model_name_or_path",
        str(model_config("1b", tmp_path)),
    ]
    pretrain(parse([*recipe, "--output_dir", str(tmp_path / "out"), *flags, "--dry_run"]))
    told = capsys.readouterr().out
    assert "524,288 tokens a step" in told
    assert float(re.findall(r"= peak +([\d.]+) GB", told)[0]) <= USABLE * 80.0


@pytest.mark.parametrize("size", ["250m", "1b3"])
def test_shapes_of_the_paper_have_their_sizes(size):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            read_model_config(CONFIGS / "models" / f"llama_{size}.json")
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(
        PARAMETERS[size], rel=0.01
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_batches_are_what_the_comments_say(path):
    training = parse([str(path)]).training
    matched = BATCH.search(path.read_text())
    assert matched is not None
    factors = [
        int(number)
        for number in (matched[1] + (f" x {matched[2]}" if matched[2] else "")).split(" x ")
    ]
    assert math.prod(factors) == int(matched[3])
    rank_batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert int(matched[3]) % rank_batch == 0
    assert factors[0] == training.per_device_train_batch_size
