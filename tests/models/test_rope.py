"""--rope_scaling: a model computes as transformers' own of that config, is exported as one,
and mistakes are named.
"""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import mora_ds
from mora_ds.checkpoint.adapter_files import BaseReference
from mora_ds.common.files import read_json, write_json_atomic
from mora_ds.common.rope import rope_settings
from mora_ds.deploy.peft_export import export_peft
from mora_ds.models import rope
from mora_ds.models.load import folder_config, load_model
from mora_ds.train.data import _check_positions
from tests.helpers.errors import user_error
from tests.helpers.jobs import assert_close_losses, losses, run, validation_errors_of
from tests.helpers.models import FAMILIES, tiny_model, tokens
from tests.helpers.resume import MERGING, assert_same_tensors
from tests.helpers.tables import each_row
from tests.helpers.tools import call

YARN = '{"rope_type": "yarn", "factor": 4.0}'
SETTINGS = """
512 | {"rope_type": "yarn", "factor": 4.0}
256 | {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64}
320 | {"rope_type": "linear", "factor": 2.5, "rope_theta": 5e5}
256 | {"rope_type": "dynamic", "factor": 2.0}
1024 | {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
128 | {"rope_type": "default", "rope_theta": 500000}
"""
"""The longest row of a model that was made for 128 positions | --rope_scaling."""


def asked(family, folder, text):
    """A tiny model in `folder`, loaded with these settings; the changes of its config."""
    tiny_model(family).save_pretrained(folder)
    changes = rope.rope_changes(folder_config(folder), rope_settings(text))
    return load_model(folder, torch.float32, changes=changes), changes


@each_row("longest, text", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_are_those_of_transformers_own_model(family, text, longest, tmp_path):
    model, changes = asked(family, tmp_path, text)
    rope.check_used(model, changes["rope_parameters"]["rope_type"])
    config = AutoConfig.for_model(
        family, **{**FAMILIES[family], **copy.deepcopy(changes)}
    )
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    plain = tiny_model(family)
    theirs.load_state_dict(plain.state_dict())
    ids = tokens(2, 200)  # beyond the 128 positions, from where on dynamic differs
    assert torch.equal(model(ids).logits, theirs(ids).logits)
    assert not torch.equal(model(ids).logits, plain(ids).logits)
    assert rope.max_positions(model.config) == int(longest)
    # None of which a reader of base.json refuses
    assert rope.changes_of(model.config, tmp_path) == changes


def test_a_model_that_rotates_a_part_of_each_head_goes_on_to_do_so(tmp_path):
    part = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    plain = tiny_model("gpt_neox", rope_parameters=part)
    plain.save_pretrained(tmp_path)
    settings = rope_settings('{"rope_type": "linear", "factor": 2.0}')
    changes = rope.rope_changes(folder_config(tmp_path), settings)
    assert changes["rope_parameters"]["partial_rotary_factor"] == 0.5
    model = load_model(tmp_path, torch.float32, changes=changes)
    frequencies = model.gpt_neox.rotary_emb.inv_freq
    assert torch.equal(frequencies, plain.gpt_neox.rotary_emb.inv_freq / 2)


OF_OTHERS = """
gpt2 | --rope_scaling: a gpt2 model has no rotary embeddings that are the same in all layers
gemma3_text | --rope_scaling: a gemma3_text model has no rotary embeddings that are the same in all layers
phi3 | --rope_scaling: not valid for a phi3 model: `rope_parameters`'s type field must be one of
"""


@each_row("family, words", OF_OTHERS)
def test_a_family_that_ignores_rope_scaling_is_named(
    user, tmp_path, out, family, words
):
    """The run, its dry run and its plan name it."""
    tiny_model(family).save_pretrained(tmp_path / family)
    model = tmp_path / family
    files = ("--model_name_or_path", model, "--tokenizer_name", user.model)
    for dry_run in (False, True):
        flags = (*files, "--rope_scaling", YARN, "--dry_run", dry_run)
        assert words in validation_errors_of(user.flags(out, *flags))
    with user_error(words):
        call("plan", "--gpus 8 --model", model, "--rope_scaling", YARN)


@pytest.mark.parametrize("version", ["of transformers 5", "of transformers 4"])
def test_a_changed_config_keeps_nothing_of_the_scaling_before(version, tmp_path):
    """Both names are written: transformers 5 and 4 read the same."""
    model, changes = asked("llama", tmp_path, YARN)
    content = read_json(tmp_path / "config.json")
    if version == "of transformers 4":
        del content["rope_parameters"]
        content.update(
            rope_theta=5.0, rope_scaling={"rope_type": "linear", "factor": 3.0}
        )
    rope.change_file(content, changes)
    write_json_atomic(tmp_path / "config.json", content)
    assert folder_config(tmp_path).rope_parameters == model.config.rope_parameters
    for name in ("rope_scaling", "rope_parameters"):
        assert content[name] == changes["rope_parameters"]
    assert content["rope_theta"] == 10_000.0
    assert rope.changes_of(model.config, tmp_path) == {}


# -- runs ------------------------------------------------------------------------------


def test_a_run_on_longer_rows_is_that_of_a_base_with_this_config(
    user, tmp_path, base_folder, out
):
    """Equal to the bit, with merges and a resume; the export is that model, with the
    run's config."""
    longer = (
        f"{MERGING} --seq_len 160 --per_device_train_batch_size 1 --train_norms true"
    )
    message = validation_errors_of(user.flags(tmp_path / "short", longer))
    assert "--rope_scaling extends them" in message
    run(1, user.flags(out, longer, "--rope_scaling", YARN, "--export_merged true"))
    model = load_model(user.model, torch.float32)
    rope.with_changes(
        model.config, rope.rope_changes(model.config, rope_settings(YARN))
    )
    model.save_pretrained(base_folder)
    theirs = tmp_path / "theirs"
    files = ("--model_name_or_path", base_folder, "--tokenizer_name", user.model)
    run(1, user.flags(theirs, longer, *files, "--export_merged true"))
    assert torch.equal(losses(out), losses(theirs))
    weights, expected = (
        load_file(folder / "merged/model.safetensors") for folder in (out, theirs)
    )
    assert_same_tensors(weights, expected)

    plain = AutoModelForCausalLM.from_pretrained(out / "merged")
    ids = tokens(1, 400, vocab=400)
    assert plain.config.max_position_embeddings == 512
    assert plain.config.rope_parameters == model.config.rope_parameters
    live = mora_ds.load_adapter(user.model, out)
    assert torch.allclose(live(ids).logits, plain(ids).logits, atol=1e-5)

    resume = f"{longer} --resume_from_checkpoint auto --max_steps 10"
    for scaling in ((), ("--rope_scaling", YARN.replace("4.0", "2.0"))):
        assert "--rope_scaling" in validation_errors_of(
            user.flags(out, resume, *scaling)
        )
    export_peft(out, tmp_path / "peft", rank=4)
    changes = BaseReference.read(out / "checkpoints/latest").config_changes
    assert json.dumps(changes) in (tmp_path / "peft/README.md").read_text()


def test_rows_may_have_as_many_tokens_as_there_are_positions():
    config = tiny_model("llama").config
    _check_positions(config, config.max_position_embeddings)


def test_rows_that_are_split_over_ranks_are_scaled_alike(user, tmp_path):
    longer = (
        "--seq_len 256 --per_device_train_batch_size 1 --max_steps 3 --no_document_mask"
    )
    split = f"{longer} --sequence_parallel_size 2 --rope_scaling"
    run(1, user.flags(tmp_path / "one", f"{longer} --rope_scaling", YARN))
    run(2, user.flags(tmp_path / "two", split, YARN))
    assert_close_losses(tmp_path / "two", tmp_path / "one")
    # Which follows a complete row's length
    dynamic = user.flags(tmp_path / "dynamic", split, YARN.replace("yarn", "dynamic"))
    assert "rope_type dynamic" in validation_errors_of(dynamic, ranks=2)


MISTAKES = """
{"rope_type": "yarm", "factor": 2} | --rope_scaling: unknown rope_type 'yarm'; known: default, linear
[1] | --rope_scaling: unknown rope_type '[1]'
{ | --rope_scaling is damaged
{"factor": 2} | --rope_scaling: unknown rope_type 'None'
{"rope_type": "yarn"} | --rope_scaling: rope_type yarn needs the key factor
{"rope_type": "default"} | --rope_scaling: rope_type default needs the key rope_theta
{"rope_type": "llama3", "factor": 2, "high_freq_factor": 4} | llama3 needs the key low_freq_factor
{"rope_type": "linear", "factor": 2, "beta_fast": 1} | rope_type linear has no key 'beta_fast'
{"rope_type": "yarn", "factor": 2, "beta_fats": 1} | no key 'beta_fats'. Did you mean 'beta_fast'?
{"rope_type": "linear", "factor": 0.5} | --rope_scaling: factor must be at least 1, got 0.5
{"rope_type": "linear", "factor": NaN} | --rope_scaling: factor must be at least 1
{"rope_type": "linear", "factor": true} | --rope_scaling: factor must be a number, got True
{"rope_type": "linear", "factor": 2, "rope_theta": -1} | --rope_scaling: rope_theta must be above 0
{"rope_type": "yarn", "factor": 2, "truncate": 1} | --rope_scaling: truncate must be true or false
{"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 2.5} | must be a whole number, got 2.5
{"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4} | must be above low_freq
"""


@each_row("text, words", MISTAKES)
def test_mistakes_are_named(text, words):
    with user_error(re.escape(words)):
        rope_settings(text)
