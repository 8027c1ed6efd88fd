"""The recipe of the demo: with embeddings, or plain if the user's flags contradict
that."""

from pathlib import Path

import pytest

from mora_ds.common.files import load_yaml
from mora_ds.config.arguments import parse
from mora_ds.train.demo import CONTINUE, RECIPE, DemoPaths, _continue_arguments
from tests.helpers.errors import user_error

ROOT = Path(__file__).resolve().parents[2]


def settings(folder, flags):
    arguments = parse(["--output_dir", str(folder), *flags.split()])
    return _continue_arguments(arguments, DemoPaths(folder / "demo"), world=2)


def choices_of(job):
    """The settings that the recipe has and a plain demo has not."""
    return [
        job.training.optimizer == "muon",
        job.adapter.train_embeddings,
        bool(job.data.replay),
    ]


def test_the_demo_follows_the_recipe_with_embeddings(tmp_path):
    job = settings(
        tmp_path, "--max_steps 60 --merge_every 20 --embedding_learning_rate 1e-3"
    )
    assert choices_of(job) == [True] * 3
    assert job.training.max_steps == 60
    assert job.training.embedding_learning_rate == 1e-3
    recipe = load_yaml(
        str(ROOT / "configs/recipes/continual_embeddings.yaml"), "recipe"
    )
    demo = {**RECIPE, **CONTINUE}
    # Its learning rates are its own
    for name in ("optimizer", "train_embeddings", "operator", "mora_rank"):
        assert recipe[name] == demo[name]


@pytest.mark.parametrize(
    "flags", ["--adapter lora", "--tensor_parallel_size 2", "--train_embedding_rank 4"]
)
def test_flags_that_the_recipe_does_not_suit_get_a_plain_demo(tmp_path, flags):
    assert choices_of(settings(tmp_path, flags)) == [False] * 3


def test_a_mistake_is_no_reason_for_a_plain_demo(tmp_path):
    with user_error("--learning_rate"):
        settings(tmp_path, "--learning_rate -1")
