"""Checkpoints that somebody has made by hand, with hashes that fit: nothing is written,
read or executed elsewhere.
"""

import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from mora_ds.checkpoint.manager import resume_checkpoint
from mora_ds.checkpoint.sections import RandomSection, SavedCheckpoint
from mora_ds.checkpoint.shard_table import EngineShards
from mora_ds.checkpoint.verify import verify
from mora_ds.common.files import json_digest
from mora_ds.deploy.adapter_io import export_adapter
from mora_ds.deploy.export import export_merged
from tests.helpers.crafted import (
    SHARD,
    change_header,
    change_layout,
    complete_checkpoint,
    reseal,
)
from tests.helpers.damage import change_json, set_value
from tests.helpers.errors import user_error
from tests.helpers.tables import each_row

RANK_0 = SimpleNamespace(rank=0)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return complete_checkpoint(tmp_path_factory.mktemp("crafted"))


@pytest.fixture
def checkpoint(original, tmp_path, base_folder):
    shutil.copytree(original.base, base_folder)
    return Path(
        shutil.copytree(original.checkpoint, tmp_path / "out/checkpoints/step-000007")
    )


def test_the_checkpoint_itself_is_good(checkpoint, base_folder, merged):
    (verdict,) = verify(checkpoint, base_folder)
    assert verdict.is_good, verdict.problems
    export_merged(checkpoint, merged, verify=True)


def assert_refused(tool, checkpoint, made, words):
    """Words: a regular expression. The folder `made` is not written."""
    with user_error(words):
        tool(checkpoint, made)
    assert not made.exists()


# -- names that become paths -----------------------------------------------------------


def rename_parameter(checkpoint, name):
    """model.norm.weight is called `name` in the shards."""

    def change(content):
        group = content["groups"][0]
        group[name] = group.pop("model.norm.weight")

    change_layout(checkpoint, change)
    reseal(checkpoint)


def rename_key(checkpoint, key):
    def change(header):
        header[f"0.{key}"] = header.pop("0.exp_avg")

    change_header(checkpoint / "engine" / SHARD, change)
    reseal(checkpoint)


@pytest.mark.parametrize(
    "name",
    ["../../../../evil", "/tmp/evil/mora", "", "a\\b", "a\nb", "a\0b", "x" * 300],
)
@pytest.mark.parametrize("rename", [rename_parameter, rename_key])
def test_names_in_shards_are_those_of_files(checkpoint, rename, name):
    rename(checkpoint, name)
    assert not verify(checkpoint)[0].is_good


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret"])
def test_a_manifest_lists_files_of_its_own_folder(checkpoint, name):
    def change(content):
        content["files"][name] = {"size": 1, "sha256": "a"}
        content["seal"] = json_digest(content["files"])

    change_json(checkpoint / "manifest.json", change)
    assert_refused(
        export_adapter,
        checkpoint,
        checkpoint.parent / "made",
        "cannot be the name of a file",
    )


# -- links -----------------------------------------------------------------------------

LINKS = {
    "merge": export_merged,
    "adapter": export_adapter,
    "resume": lambda folder, _: resume_checkpoint(str(folder), folder.parent),
}


@pytest.mark.parametrize("tool", LINKS)
@pytest.mark.parametrize(
    "link", ["tokenizer/vocab.txt", "stray", "engine/more", "ledger/more"]
)
def test_no_tool_follows_a_link(checkpoint, tmp_path, tool, link):
    (tmp_path / "secret").write_text("of the user")
    (checkpoint / link).symlink_to(tmp_path / "secret")
    reseal(checkpoint)
    assert_refused(LINKS[tool], checkpoint, tmp_path / "made", "links are not followed")
    assert any(
        "links are not followed" in problem
        for problem in verify(checkpoint)[0].problems
    )


def test_no_link_is_followed_out_of_a_base(checkpoint, tmp_path, merged):
    (tmp_path / "secret").write_text("of the user")
    (tmp_path / "base/LICENSE").symlink_to(tmp_path / "secret")
    assert_refused(export_merged, checkpoint, merged, "and is not copied")


def test_a_pipe_in_a_checkpoint_does_not_hang(checkpoint, merged):
    os.mkfifo(checkpoint / "tokenizer/pipe")
    assert_refused(export_merged, checkpoint, merged, "neither a file nor a folder")


# -- types, numbers and sizes ----------------------------------------------------------

HUGE = r"""
trainer_state.json | world_size = 1000000000000 | world_size must be at least 1
trainer_state.json | step = "7" | step must be a whole number
trainer_state.json | merges = true | merges must be a list
adapter.json | cycle = 1000000000000000000000000000000 | cycle must be at least 0 and below
adapter.json | layers = [] | layers must be a mapping
adapter.json | config.rank = "8" | rank must be a whole number
base.json | folder = "a\0b" | cannot be a path
base.json | keys = {a: 1} | must be a text
base.json | config_changes = {auto_map: {AutoModel: stolen.Model}} | config_changes: unknown key 'auto_map'
base.json | config_changes = {__class__: 7} | config_changes: unknown key '__class__'
base.json | config_changes = {max_position_embeddings: 0} | max_position_embeddings must be at least 1
base.json | config_changes = {max_position_embeddings: true} | max_position_embeddings must be a whole number
base.json | config_changes = {rope_parameters: [1]} | rope_parameters: unknown rope_type '[1]'
base.json | config_changes = {rope_parameters: {rope_type: {a: 1}}} | rope_parameters: unknown rope_type "{'a': 1}"
base.json | config_changes = {rope_parameters: {rope_type: linear, factor: 2}} | needs the key rope_theta
base.json | config_changes = {rope_parameters: {rope_type: default, rope_theta: x}} | rope_theta must be a number
base.json | config_changes = {rope_parameters: {rope_type: default, rope_theta: 1, extra: 1}} | has no key 'extra'
base.json | config_changes = {rope_parameters: {rope_type: default, rope_theta: 1, partial_rotary_factor: 0}} | above 0
ledger/ledger.json | cycles = {} | cycles must be a list
ledger/ledger.json | cycles.0.file = ../x | cannot be the name of a file
engine/layouts.safetensors | world_size = 1000000000000 | world_size must be at least 1
engine/layouts.safetensors | files = [/etc/hostname] | the name of a file
engine/layouts.safetensors | groups = 7 | groups must be a list
engine/layouts.safetensors | groups.0.m = [16777216, 16777216, 16777216] | do not hold all of m
engine/layouts.safetensors | groups.0.m = [0] | must be at least 1
engine/layouts.safetensors | scaler = {cur_scale: null} | must be a
"""


@each_row("file, change, words", HUGE)
def test_wrong_types_and_numbers_are_named(checkpoint, file, change, words):
    if file.endswith(".json"):
        change_json(checkpoint / file, lambda content: set_value(content, change))
    else:
        change_layout(checkpoint, lambda content: set_value(content, change))
    reseal(checkpoint)
    problems = [
        problem for problem in verify(checkpoint)[0].problems if words in problem
    ]
    assert problems
    assert file.split("/")[-1] in problems[0]


def test_random_states_that_torch_does_not_take(checkpoint):
    saved = EngineShards.open(checkpoint / "engine")
    with user_error(r"step-000007 is damaged"):
        RandomSection(None).load(SavedCheckpoint(checkpoint, None, saved, RANK_0))


def change_first_operator(change, content):
    first_layer = next(iter(content["layers"].values()))
    first_layer["operator"].update(change)


def test_an_operators_seed_and_sizes_have_bounds(checkpoint):
    for change in (
        {"seed": 10**12},
        {"d_in": 10**9},
        {"d_in": True},
        {"kind": ["share"]},
        {"more": 1},
    ):
        before = (checkpoint / "adapter.json").read_text()
        change_operator = partial(change_first_operator, change)
        change_json(checkpoint / "adapter.json", change_operator)
        reseal(checkpoint)
        assert_refused(
            export_adapter, checkpoint, checkpoint.parent / "made", "operator"
        )
        (checkpoint / "adapter.json").write_text(before)


def test_a_layer_keeps_its_shape_from_cycle_to_cycle(checkpoint, merged):
    def change(header):
        header["__metadata__"]["layers"] = header["__metadata__"]["layers"].replace(
            '"d_in": 32', '"d_in": 16777216', 1
        )

    change_header(checkpoint / "ledger/cycle-00001.safetensors", change)
    reseal(checkpoint)
    assert_refused(
        export_merged,
        checkpoint,
        merged,
        "another layer than in earlier cycles",
    )


def test_the_live_layers_have_the_shapes_of_the_ledgers(checkpoint, tmp_path):
    """Also where no base is read that would show it."""

    wider = partial(change_first_operator, {"d_in": 2**24})
    change_json(checkpoint / "adapter.json", wider)
    reseal(checkpoint)
    assert_refused(
        export_adapter,
        checkpoint,
        tmp_path / "adapter",
        "another layer than in earlier cycles",
    )
