"""What the demo trains with: the recipe with embeddings, or less where the user's flags ask for
something else.
"""

from pathlib import Path

import pytest

from mora_ds.common.files import load_yaml
from mora_ds.config.arguments import parse
from mora_ds.train.demo import CONTINUE, RECIPE, DemoPaths, _continue_arguments
from tests.helpers.errors import user_error

ROOT = Path(__file__).resolve().parents[2]


def settings(tmp_path, *flags, world=2):
    argv = ["--output_dir", str(tmp_path), *map(str, flags)]
    return _continue_arguments(parse(argv), DemoPaths(tmp_path / "demo"), world)


def is_recipe(job):
    """All of the recipe, or nothing of it."""
    choices = [
        job.training.optimizer == "muon",
        job.adapter.train_embeddings,
        bool(job.data.replay),
    ]
    assert len(set(choices)) == 1, choices
    return choices[0]


def test_the_demo_follows_the_recipe_with_embeddings(tmp_path):
    job = settings(
        tmp_path, "--max_steps", 60, "--merge_every", 20, "--embedding_learning_rate", 1e-3
    )
    assert is_recipe(job)
    assert job.training.max_steps == 60
    assert job.training.embedding_learning_rate == 1e-3
    recipe = load_yaml(str(ROOT / "configs/recipes/continual_embeddings.yaml"), "recipe")
    assert all(
        recipe[name] == RECIPE[name] for name in ("optimizer", "train_embeddings")
    ), "not its learning rates"
    assert recipe["operator"] == CONTINUE["operator"]
    assert recipe["mora_rank"] == CONTINUE["mora_rank"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--adapter", "lora"),
        ("--tensor_parallel_size", 2),
        ("--train_embedding_rank", 4),
    ],
    ids=lambda flags: str(flags[0]),
)
def test_flags_that_the_recipe_does_not_suit_get_a_plain_demo(tmp_path, flags):
    assert not is_recipe(settings(tmp_path, *flags))


def test_a_mistake_is_no_reason_for_a_plain_demo(tmp_path):
    with user_error("--learning_rate"):
        settings(tmp_path, "--learning_rate", -1)
