"""Which checkpoint a run goes on from, whether it may, and with which random states."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import mora_ds
from mora_ds.checkpoint.manager import resume_checkpoint
from mora_ds.checkpoint.sections import (
    EngineSection,
    RandomSection,
    SavedCheckpoint,
)
from mora_ds.checkpoint.shard_table import EngineShards, RankShard
from mora_ds.checkpoint.state import TrainerState, check_identity, check_world_size
from mora_ds.common.errors import UserError
from mora_ds.common.files import replace_symlink
from tests.helpers.crafted import reseal
from tests.helpers.damage import change_json, checkpoint_at
from tests.helpers.engines import ds_config
from tests.helpers.errors import run_error, user_error
from tests.helpers.gloo import run_alone
from tests.helpers.models import tiny_model
from tests.helpers.tables import each_row, parsed


def test_a_checkpoint_is_found_by_its_link_and_its_path(tmp_path, monkeypatch):
    folder = checkpoint_at(tmp_path, 3)
    monkeypatch.setenv("HOME", str(tmp_path))
    replace_symlink(tmp_path / "latest", folder.name)
    for wanted in ("latest", str(folder), str(tmp_path / "latest"), "~/step-000003"):
        assert resume_checkpoint(wanted, tmp_path) == folder
    assert resume_checkpoint("auto", tmp_path / "none") is None
    with user_error("no checkpoint at"):
        resume_checkpoint(str(tmp_path / "step-000007"), tmp_path)
    with user_error(r"^Run: resume gone: no checkpoint at"):
        resume_checkpoint("gone", tmp_path, "Run: resume")


@pytest.mark.parametrize("root", [".", "linked", "absolute"])
def test_auto_stays_on_the_branch_of_latest(tmp_path, root, monkeypatch):
    """However the folder is named: relative to where one is, through a link, or by its own
    path.
    """
    old, new, abandoned = (checkpoint_at(tmp_path / "own", step) for step in (2, 4, 9))
    (tmp_path / "linked").symlink_to("own")
    monkeypatch.chdir(tmp_path / "own")
    folder = {
        ".": Path("."),
        "linked": tmp_path / "linked",
        "absolute": tmp_path / "own",
    }[root]
    replace_symlink(folder / "latest", new.name)
    assert resume_checkpoint("auto", folder) == folder / new.name
    (new / "file").unlink()
    assert resume_checkpoint("auto", folder) == folder / old.name
    assert abandoned.is_dir()


def test_differences_are_named_by_flag_and_all_at_once(tmp_path):
    saved = {
        "base": "a",
        "adapter": {"rank": 8, "target_modules": ["q_proj"]},
        "seed": 1,
    }
    check_identity(
        tmp_path,
        saved,
        {**saved, "adapter": {"rank": 8, "target_modules": ("q_proj",)}},
    )
    with pytest.raises(UserError) as error:
        check_identity(
            tmp_path,
            saved,
            {
                "base": "b",
                "adapter": {"rank": 4, "target_modules": ["q_proj"]},
                "more": 1,
            },
        )
    rank = "--mora_rank: 8 there, 4 here"
    for phrase in (
        "--model_name_or_path",
        rank,
        "--seed: 1 there, None here",
        "more: None",
    ):
        assert phrase in str(error.value)
    assert "target_modules" not in str(error.value)


DIFFERENT = """
{global_batch_size: 1} | {global_batch_size: 2} | --per_device_train_batch_size --gradient_accumulation_steps
{mixture: {sources: {law: 1}}} | {mixture: {sources: {law: 2}}} | --document_start --replay --mixture \
--train_files --text_column --held_out_share
"""


@each_row("saved, here, flags", DIFFERENT)
def test_a_difference_is_named_with_all_flags_that_may_make_it(
    tmp_path, saved, here, flags
):
    with pytest.raises(UserError) as error:
        check_identity(tmp_path, parsed(saved), parsed(here))
    assert [flag for flag in flags.split() if flag not in str(error.value)] == []


@pytest.mark.parametrize("rows", [12, 2, 1])
def test_ranks_that_cannot_share_the_batch_are_named_numbers_that_can(tmp_path, rows):
    state = TrainerState(identity={"global_batch_size": rows})
    for world in range(1, 30):
        check_world_size(tmp_path, TrainerState(), world)  # of a user's own loop
        if rows % world == 0:
            check_world_size(tmp_path, state, world)
            continue
        words = f"{rows} sequences a step, which {world} ranks cannot share evenly: start a number .* divides {rows}"
        with user_error(words):
            check_world_size(tmp_path, state, world)


def test_random_states_of_ranks_with_and_without_a_saved_one(tmp_path):
    """A rank's own state where it has one; otherwise one of its own, another at every step,
    the same each time.
    """
    states = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        states.append(torch.get_rng_state())
    for rank, state in enumerate(states):
        save_file({"rng.cpu": state}, tmp_path / f"{rank}.st")
    shards = EngineShards(tmp_path, None, ["0.st", "1.st"], None)

    def drawn(rank, step=5, seed=0):
        state = TrainerState(step=step, identity={"seed": seed})
        ranks = SimpleNamespace(rank=rank)
        RandomSection(state).load(SavedCheckpoint(tmp_path, None, shards, ranks))
        return torch.rand(1).item()

    rng_state = torch.get_rng_state()
    try:
        for rank, seed in enumerate((3, 4)):
            expected = torch.rand(
                1, generator=torch.Generator().manual_seed(seed)
            ).item()
            assert drawn(rank) == expected
        draws = [drawn(2), drawn(3), drawn(2, step=6), drawn(2, seed=1)]
        assert len(set(draws)) == 4
        assert draws[0] == drawn(2)
    finally:
        torch.set_rng_state(rng_state)


def test_ranks_that_trained_something_else_write_no_checkpoint():
    shares = [RankShard(rank, "", 1, b"", layout) for rank, layout in enumerate("aba")]
    words = r"ranks \[1\] trained other parameters or with other settings than rank 0"
    with run_error(words):
        EngineSection(None).finish(None, shares)


def refused_operator(root):
    """What is said of a checkpoint with another operator."""
    folder = Path(root)
    tiny_model("llama").save_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    config = mora_ds.MoRAConfig(rank=4, seed=42)
    mora_ds.inject(model, config)
    engine, *_ = mora_ds.initialize(model=model, config=ds_config(3, 2, 1))
    where = {"base": folder / "model", "folder": folder / "out"}
    checkpoint = mora_ds.Run(engine, **where).save(1)
    change_json(
        checkpoint / "adapter.json", lambda adapter: other_seed(adapter["layers"])
    )
    with user_error(r"^Run: `resume` .* is damaged: .*adapter.json"):
        mora_ds.Run(engine, **where, resume=checkpoint)
    reseal(checkpoint)
    before = torch.cat(
        [parameter.flatten() for parameter in engine.module.parameters()]
    )
    with pytest.raises(UserError) as caught:
        mora_ds.Run(engine, **where, resume="latest")
    assert torch.equal(
        torch.cat([parameter.flatten() for parameter in engine.module.parameters()]),
        before,
    )
    return str(caught.value)


def other_seed(layers):
    next(iter(layers.values()))["operator"]["seed"] += 1


def test_a_run_has_the_config_and_the_operators_of_its_model(tmp_path):
    message = run_alone(refused_operator, str(tmp_path))
    assert (
        "adapter.json: model.layers.0.self_attn.q_proj has another operator there"
        in message
    )
