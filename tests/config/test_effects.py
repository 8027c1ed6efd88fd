"""Settings without an effect are refused by their names, and keys of a recipe left out
where a flag makes them idle.
"""

from pathlib import Path

import pytest

from mora_ds.common.errors import UserError
from mora_ds.config.arguments import dump, from_flat, parse
from mora_ds.config.effects import EFFECTS, unused_options
from mora_ds.config.validate import validate
from tests.helpers.errors import user_error
from tests.helpers.tables import each_row, parsed

RUN = ("--model_name_or_path", "m", "--train_files", "a.txt")
RECIPES = Path(__file__).parents[2] / "configs/recipes"

IDLE = """
lora_alpha: 16                  | {}
operator: share                 | {adapter: lora}
grouping: plain                 | {adapter: lora}
compute: weight                 | {adapter: lora}
r_hat_multiple: 1               | {adapter: lora}
mora_rank: 4                    | {adapter: full}
target_modules: [q_proj]        | {adapter: full}
mora_dropout: 0.1               | {adapter: none}
base_bits: 8                    | {adapter: full}
base_device: host               | {adapter: full}
merge_every: 50                 | {adapter: full}
train_embeddings: true          | {adapter: full}
train_norms: true               | {adapter: full}
train_head: true                | {adapter: none}
train_new_embeddings: true      | {adapter: full}
train_embedding_rank: 4         | {adapter: full}
export_merged: true             | {adapter: none}
profile: 3                      | {adapter: none}
push_to_hub: a/b                | {adapter: none}
resume_from_checkpoint: auto    | {adapter: none}
restart_warmup_steps: 5         | {}
embedding_learning_rate: 0.1    | {}
embedding_learning_rate: 0.2    | {adapter: full}
min_lr_ratio: 0.1               | {lr_scheduler_type: constant_with_warmup}
decay_ratio: 0.1                | {lr_scheduler_type: cosine}
decay_ratio: 0.1                | {lr_scheduler_type: wsd, decay_from: step-000004, max_steps: 9}
decay_from: step-000004         | {adapter: none, lr_scheduler_type: wsd, max_steps: 9}
num_train_epochs: 3             | {max_steps: 100}
max_eval_batches: 3             | {}
shuffle_buffer: 5               | {}
stop_when_forgotten: ["b:1.1"]  | {eval_files: [b.txt]}
best_by: ["b:1"]                | {eval_files: [b.txt]}
eval_tasks_steps: 2             | {eval_steps: 2}
"""
USED = """
lora_alpha: 16                  | {adapter: lora}
operator: share                 | {adapter: mora}
mora_rank: 4                    | {adapter: lora}
resume_from_checkpoint: auto    | {adapter: full}
restart_warmup_steps: 5         | {merge_every: 50}
embedding_learning_rate: 0.1    | {train_norms: true}
embedding_learning_rate: 0.1    | {train_embedding_rank: 4}
min_lr_ratio: 0.1               | {lr_scheduler_type: linear}
decay_ratio: 0.1                | {lr_scheduler_type: wsd}
decay_from: step-000004         | {lr_scheduler_type: wsd, max_steps: 9, warmup_steps: 20}
num_train_epochs: 3             | {}
max_eval_batches: 3             | {held_out_share: 0.1}
shuffle_buffer: 5               | {streaming: true, max_steps: 9}
best_by: ["b:1"]                | {eval_files: [b.txt], eval_steps: 2}
eval_tasks_steps: 2             | {eval_tasks: [hellaswag], eval_steps: 2}
rope_scaling: '{"rope_type":"linear","factor":2}' | {model_name_or_path: null, model_config: c.json, tokenizer_name: t}
"""


def arguments_of(setting, others):
    return from_flat(
        {
            "model_name_or_path": "m",
            "train_files": ["a.txt"],
            **parsed(setting),
            **parsed(others),
        }
    )


def test_every_setting_of_the_table_exists_and_stands_there_once():
    arguments = parse([])
    known = dump(arguments).keys()
    listed = [name for effect in EFFECTS for name in effect.settings.split()]
    assert set(listed) <= known
    assert len(listed) == len(set(listed))


@each_row("setting, others", IDLE)
def test_a_setting_without_effect_is_refused(setting, others):
    arguments = arguments_of(setting, others)
    name = setting.partition(":")[0]
    assert list(unused_options(arguments)) == [name]
    with user_error(rf"--{name} "):
        validate(arguments)


@each_row("setting, others", USED)
def test_a_setting_with_an_effect_is_taken(setting, others):
    validate(arguments_of(setting, others))


MESSAGES = """
--model_name_or_path m --train_files a.txt --lora_alpha 16 | --lora_alpha is for LoRA (--adapter lora), \
and has no effect here: leave it out
--rope_scaling {"rope_type":"linear","factor":2} | --rope_scaling is for a model that is named \
(--model_name_or_path, --model_config), and has no effect here: leave it out
# a mistake in the value comes first
--model_name_or_path m --train_files a.txt --decay_ratio -1 | --decay_ratio must be above 0 and at most 1, got -1.0
"""


@each_row("flags, message", MESSAGES)
def test_the_message_says_what_a_setting_is_for(flags, message):
    with pytest.raises(UserError) as validation_errors_of:
        validate(parse(flags.split()))
    assert str(validation_errors_of.value) == message


def test_flags_may_leave_keys_of_a_recipe_without_effect():
    recipe = str(RECIPES / "continual_7b_r8.yaml")
    arguments = parse([recipe, *RUN, *["--adapter", "full", "--max_steps", "500"]])
    assert set(arguments.left_out) == {"operator", "num_train_epochs"}
    assert not arguments.set_by_user & set(arguments.left_out)
    validate(arguments)
    assert dump(arguments)["operator"] == "auto", (
        "run.yaml is a recipe that is taken as it is"
    )


def test_what_a_flag_repeats_of_the_recipe_is_the_users(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("operator: share\n")
    arguments = parse(
        [str(recipe), *RUN, *["--adapter", "lora", "--operator", "share"]]
    )
    with user_error("--operator is for MoRA"):
        validate(arguments)


def test_keys_that_depend_on_keys_left_out_go_with_them(tmp_path):
    (tmp_path / "recipe.yaml").write_text("merge_every: 50\nrestart_warmup_steps: 5\n")
    arguments = parse([str(tmp_path / "recipe.yaml"), *RUN, "--adapter", "full"])
    assert arguments.left_out == ("merge_every", "restart_warmup_steps")
    validate(arguments)
