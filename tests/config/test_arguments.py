"""Flags, recipes and their checks: what is known passes, everything else is named."""

import dataclasses
from typing import get_args, get_type_hints
from unittest import mock

import pytest
import yaml

from mora_ds.common.errors import UserError
from mora_ds.config import flags
from mora_ds.config.adapter import AdapterArguments
from mora_ds.config.arguments import dump, from_flat, parse
from mora_ds.config.flags import documented
from mora_ds.config.training import TrainingArguments
from mora_ds.config.validate import validate
from tests.helpers.errors import user_error

RUN = ["--model_name_or_path", "model", "--train_files", "a.txt"]


def recipe(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


# -- the command line ------------------------------------------------------------------


def test_no_flag_at_all_is_the_is_demo_and_valid():
    arguments = parse([])
    assert arguments.is_demo
    assert arguments.set_by_user == frozenset()
    assert arguments.adapter == AdapterArguments()
    assert arguments.training == TrainingArguments()
    validate(arguments)


def test_booleans_and_lists_as_hugging_face_writes_them():
    words = (
        "--fp16 true --bf16 false --no_document_mask --target_modules q_proj re:.*mlp.*"
    )
    arguments = parse(words.split())
    assert (arguments.training.fp16, arguments.training.bf16) == (True, False)
    assert arguments.data.document_mask is False
    assert arguments.adapter.target_modules == ["q_proj", "re:.*mlp.*"]


@pytest.mark.parametrize("rank", ["--local_rank=3", "--local-rank=13"])
def test_launchers_put_the_local_rank_before_the_recipe(tmp_path, rank):
    path = recipe(tmp_path, "mora_rank: 16")
    arguments = parse([rank, path, "--seed", "1"])
    assert arguments == parse([path, "--seed", "1"])
    assert arguments.adapter.mora_rank == 16


def test_help_shows_docstrings_and_defaults_and_leaves_with_0(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["-h"])
    text = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    assert "Tokens of one packed training sequence. (default: 512)" in text
    assert "[recipe.yaml]" in text


def test_a_field_without_docstring_is_refused():
    with pytest.raises(TypeError, match=r"Bare\.count has no docstring"):

        @documented
        class Bare:
            count: int = 1


# -- recipes ---------------------------------------------------------------------------


def test_the_command_line_wins_over_the_recipe(tmp_path):
    path = recipe(
        tmp_path,
        "mora_rank: 16\nlearning_rate: 4e-4\ntarget_modules: q_proj\nbf16: true\nmax_eval_batches: null\n",
    )
    arguments = parse([path, "--mora_rank", "32", "--bf16", "false"])
    assert (arguments.adapter.mora_rank, arguments.training.bf16) == (32, False)
    assert arguments.training.learning_rate == 4e-4, "YAML 1.1 reads 4e-4 as a string"
    assert arguments.adapter.target_modules == ["q_proj"]
    assert arguments.training.max_eval_batches is None
    assert {"learning_rate", "mora_rank", "max_eval_batches"} <= arguments.set_by_user


def test_mistakes_in_a_recipe_are_listed_at_once(tmp_path):
    path = recipe(
        tmp_path,
        "mora_rnk: 8\nmax_steps: ten\nseq_len: 12.5\nbf16: 1\nseed: true\nlearning_rate: fast\n"
        "train_files: [1]\noutput_dir: null\n",
    )
    with pytest.raises(UserError) as caught:
        parse([path])
    assert str(caught.value).replace(f"{path}: ", "").splitlines() == [
        "unknown key 'mora_rnk'. Did you mean 'mora_rank'?",
        "max_steps must be a whole number, got 'ten'",
        "seq_len must be a whole number, got 12.5",
        "bf16 must be true or false, got 1",
        "seed must be a whole number, got True",
        "learning_rate must be a number, got 'fast'",
        "train_files[0] must be a text, got 1",
        "output_dir must be a text, got None",
    ]


def test_of_very_many_unknown_keys_the_first_are_named(tmp_path):
    """Each is compared with all known ones: 100,000 took half a minute."""
    text = "".join(f"key_{number}: 1\n" for number in range(20_000))
    nearest = mock.patch.object(flags, "nearest", side_effect=flags.nearest)
    with nearest as compared, pytest.raises(UserError, match="'key_99'") as caught:
        parse([recipe(tmp_path, text)])
    assert len(str(caught.value).splitlines()) == compared.call_count == 100


def test_an_empty_recipe_sets_nothing(tmp_path):
    assert parse([recipe(tmp_path, "# nothing yet\n")]).set_by_user == frozenset()


def test_run_yaml_is_a_recipe_that_repeats_the_run(tmp_path):
    more = "--learning_rate 1e-5 --eval_files x=a.txt --no_eval_on_start"
    first = parse([*RUN, *more.split()])
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {**dump(first), "versions": {"torch": "2"}, "resolved": {"x": 1}}
        )
    )
    again = parse([str(path)])
    assert dump(again) == dump(first)


# -- checks; each wrong setting is a line of test_bad_launches.py ----------------------


def numbers():
    """The settings that are numbers."""
    groups = [
        type(group)
        for group in vars(parse([])).values()
        if dataclasses.is_dataclass(group)
    ]
    hints = {
        name: hint for group in groups for name, hint in get_type_hints(group).items()
    }
    return [
        name for name, hint in hints.items() if {int, float} & {hint, *get_args(hint)}
    ]


@pytest.mark.parametrize("name", numbers())
def test_no_number_is_without_bounds(name):
    with user_error(f"--{name} must be "):
        validate(
            from_flat({"model_name_or_path": "m", "train_files": ["a.txt"], name: -7})
        )


def test_everything_wrong_is_listed_at_once():
    words = (
        "--mora_rank 0 --operator x --lr_scheduler_type x --learning_rate -1 --seq_len 0 "
        "--max_steps 0 --bf16 --fp16 --mora_dropout 2"
    )
    with pytest.raises(UserError) as caught:
        validate(parse(words.split()))
    assert len(str(caught.value).splitlines()) == 8
