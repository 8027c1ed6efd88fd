"""`mora-ds verify`: a good run is good, and whatever is damaged is named, manifest or
not.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mora_ds.checkpoint.verify import verify
from mora_ds.common.files import replace_symlink, write_manifest
from mora_ds.deploy.adapter_io import export_adapter
from tests.helpers.crafted import reseal
from tests.helpers.damage import another_base, change_json, flip, set_value
from tests.helpers.errors import run_error, user_error
from tests.helpers.exports import fake_run
from tests.helpers.tables import each_row
from tests.helpers.tools import call


@pytest.fixture
def checkpoint(golden, tmp_path):
    """A copy to damage."""
    return Path(
        shutil.copytree(
            (golden / "checkpoints/latest").resolve(), tmp_path / "step-000006"
        )
    )


def wrong(folder, **options):
    (verdict,) = verify(folder, **options)
    assert not verdict.is_good
    return "\n".join(verdict.problems)


def test_a_good_run(user, golden):
    verdicts = verify(golden, user.model)
    assert [(verdict.is_good, verdict.is_latest) for verdict in verdicts] == [
        (True, False),
        (True, False),
        (True, True),
    ]
    text = "\n".join(verdicts[-1].lines())
    for phrase in (
        "step-000006: good, latest", "as the manifest says", "state: step 6, 768 tokens, 2 merge(s), 2 rank(s)",
        "2 file(s) of 2 rank(s), ZeRO 3, 19 tensors (exp_avg, exp_avg_sq, master)", "14 layers, cycle 2, 5 other",
        "ledger: 2 cycle(s)", "19 live tensor(s) equal their master weights", "has the recorded fingerprint",
    ):  # fmt: skip
        assert phrase in text, text
    assert [verdict.folder for verdict in verify(golden / "checkpoints")] == [
        verdict.folder for verdict in verdicts
    ]
    assert (
        verify(golden / "checkpoints/latest")[0].folder == verdicts[-1].folder.resolve()
    )


def test_what_the_command_prints_and_how_it_ends(golden, checkpoint, tmp_path, capsys):
    call("verify", golden)
    assert capsys.readouterr().out.count(": good") == 3
    (checkpoint / "trainer_state.json").write_text("{}")
    with run_error(r"^1 of 1 checkpoint\(s\) damaged: step-000006"):
        call("verify", checkpoint)
    printed = capsys.readouterr().out
    assert "wrong: " in printed
    assert "trainer_state.json has 2 bytes" in printed
    with user_error("neither a checkpoint, nor a ledger"):
        call("verify", tmp_path / "nothing")


def test_without_a_manifest_the_rest_is_still_looked_at(checkpoint):
    (checkpoint / "manifest.json").write_text("[]")
    (checkpoint / "engine/layouts.safetensors").unlink()
    text = wrong(checkpoint)
    assert "manifest.json is damaged" in text
    assert "layouts.safetensors is missing" in text


def test_an_adapter_alone_is_what_is_checked_of_it(checkpoint, user, tmp_path):
    adapter = tmp_path / "adapter"
    export_adapter(checkpoint, adapter)
    (verdict,) = verify(adapter, user.model)
    assert verdict.is_good, verdict.problems
    assert [fact.partition(":")[0] for fact in verdict.facts] == [
        "files",
        "adapter",
        "ledger",
        "base",
    ]
    (adapter / "ledger/cycle-00000.safetensors").unlink()
    assert "cycle-00000.safetensors is missing" in wrong(adapter)
    (checkpoint / "trainer_state.json").unlink()
    assert "trainer_state.json is missing" in wrong(checkpoint)


# -- what hashes do not tell: somebody, or a fault of ours, wrote it like that ---------


def changed_tensor(folder, value):
    path = folder / "adapter.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = value
    save_file(tensors, path)


def another_tensor(folder):
    path = folder / "adapter.safetensors"
    save_file({**load_file(path), "another.weight": torch.ones(2)}, path)
    change_json(
        folder / "adapter.json",
        lambda adapter: adapter["trainables"].append("another.weight"),
    )


def changed_shard(folder, name, change):
    path = folder / "engine/rank-00001.safetensors"
    tensors = load_file(path)
    save_file({**tensors, name: change(tensors[name])}, path)


def without_random_state(folder):
    path = folder / "engine/rank-00001.safetensors"
    tensors = load_file(path)
    del tensors["rng.cpu"]
    save_file(tensors, path)


def changed_table(folder, change):
    path = folder / "engine/layouts.safetensors"
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
        rows = handle.get_tensor("extents")
    save_file({"extents": change(rows).contiguous()}, path, metadata)


VALUES = """
trainer_state.json | step = 5 | is of step 5, its folder of
trainer_state.json | world_size = 3 | was written by 2 ranks
trainer_state.json | x = 1 | is damaged
trainer_state.json | merges = [] | records 0 merge
adapter.json | cycle = 0 | was written in cycle 0
ledger/ledger.json | cycles.0.chain = "0" | chain of
base.json | fingerprint = "0" | belongs to another base
"""


@each_row("file, change, message", VALUES)
def test_values_that_do_not_go_together(checkpoint, file, change, message):
    change_json(checkpoint / file, lambda content: set_value(content, change))
    write_manifest(checkpoint)
    assert message in wrong(checkpoint)


def test_an_adapter_that_an_export_refuses_is_not_good(checkpoint):
    def transpose(content):
        next(iter(content["layers"].values()))["transposed"] = True

    change_json(checkpoint / "adapter.json", transpose)
    write_manifest(checkpoint)
    assert "is another layer than in earlier cycles" in wrong(checkpoint)


DEEPER = [
    ("a number", lambda folder: changed_tensor(folder, 7.0), "is not what the shards hold"),
    ("no number", lambda folder: changed_tensor(folder, float("inf")), "is not finite"),
    ("no random state", without_random_state, "holds no random state of rank 1"),
    ("no probe", lambda folder: (folder / "probe.safetensors").unlink(), "probe.safetensors is missing"),
    ("another tensor", another_tensor, "do not hold the same tensors, e.g. another.weight"),
    ("a moment", lambda folder: changed_shard(folder, "0.exp_avg", lambda moment: moment + torch.inf), "exp_avg of"),
    ("NaN moment", lambda folder: changed_shard(folder, "0.exp_avg", lambda values: values * torch.nan), "exp_avg of"),
    ("a short shard", lambda folder: changed_shard(folder, "0.master", lambda flat: flat[:-40].clone()), "incomplete"),
    ("a count", lambda folder: changed_shard(folder, "0.step", lambda step: step + 1), "another rank's shard"),
    ("a part", lambda folder: changed_table(folder, lambda rows: rows[:-1]), "do not hold all of"),
    ("a part twice", lambda folder: changed_table(folder, lambda rows: torch.cat([rows, rows[:1]])), "element once"),
    ("a parameter", lambda folder: changed_table(folder, lambda rows: rows + 10**6), "do not hold all of"),
    ("a pickle", lambda folder: torch.save(Path, folder / "engine/rank-00001.safetensors"), "rank-00001"),
]  # fmt: skip


@pytest.mark.parametrize(
    "change, output",
    [entry[1:] for entry in DEEPER],
    ids=[entry[0] for entry in DEEPER],
)
def test_what_the_hashes_do_not_tell(checkpoint, change, output):
    change(checkpoint)
    write_manifest(checkpoint)
    assert output in wrong(checkpoint)


def not_finite(ledger):
    path = ledger / "cycle-00001.safetensors"
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(path)
    next(iter(tensors.values())).fill_(float("nan"))
    path.unlink()  # a hard link
    save_file(tensors, path, metadata)
    reseal(ledger)


def test_a_ledger_alone(tmp_path):
    fake = fake_run(tmp_path, cycles=3, num_hidden_layers=1)
    ledger = fake.checkpoint / "ledger"
    (verdict,) = verify(ledger, fake.base)
    assert verdict.is_good
    assert "ledger: 3 cycle(s), hashes and chain" in verdict.facts
    other = fake_run(
        tmp_path / "other", num_hidden_layers=1, hidden_size=16, probe=False, cycles=0
    ).base
    with user_error(r"--base: .* is not the base of"):
        verify(ledger, other)
    not_finite(ledger)
    assert "the MoRA matrix of model.layers.0.self_attn.q_proj is not finite" in wrong(
        ledger
    )
    flip(ledger / "cycle-00001.safetensors")
    assert "cycle-00001.safetensors is damaged" in wrong(ledger)


def test_another_base(golden, checkpoint, user, tmp_path, model_folder):
    """The command is wrong then, and no checkpoint is called damaged; of a damaged one the
    damage is output.
    """
    other = another_base(user.model, model_folder)
    with user_error(r"--base: .* is not the base of"):
        verify(golden, other)
    with user_error("--base: no such folder"):
        verify(golden, tmp_path / "none")
    with user_error(r"--base: .* is not a model folder"):
        verify(checkpoint, tmp_path)
    changed_tensor(checkpoint, 7.0)
    assert "is not what the shards hold" in wrong(checkpoint, base=other)


def test_latest_that_leads_nowhere(golden, tmp_path, out):
    copy = Path(shutil.copytree(golden, out, symlinks=True))
    replace_symlink(copy / "checkpoints/latest", "step-000009")
    assert "latest names no checkpoint" in "\n".join(verify(copy)[-1].problems)
    with user_error("neither a checkpoint"):
        verify(tmp_path)
