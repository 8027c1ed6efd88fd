"""tools/convert_checkpoint.py: DeepSpeed's own loader takes the universal format, and it comes back; load_adapter."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mora_ds
from mora_ds.adapters.config import MoRAConfig
from mora_ds.checkpoint.adapter_files import read_adapter
from mora_ds.checkpoint.universal import from_universal, to_universal
from mora_ds.checkpoint.verify import verify
from mora_ds.common.errors import UserError
from mora_ds.engine import zero
from mora_ds.engine.initialize import parameter_groups
from mora_ds.engine.shard_reader import MASTER
from tests.helpers.engines import ds_config
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import REPOSITORY, Playground, losses, run
from tests.helpers.shards import assert_same, contents_of

pytestmark = pytest.mark.gloo

MORE = (
    "--max_steps", 6, "--merge_every", 2, "--restart_warmup_steps", 1, "--save_steps", 5, "--train_norms", "true",
)  # fmt: skip


@pytest.fixture(scope="module")
def out(user: Playground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with three merges; the checkpoint of step 5 has live squares."""
    folder = tmp_path_factory.mktemp("run") / "out"
    run(2, user.flags(folder, *MORE))
    return folder


@pytest.fixture(scope="module")
def checkpoint(out: Path) -> Path:
    return out / "checkpoints" / "step-000005"


@pytest.fixture(scope="module")
def universal(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "universal"
    to_universal(checkpoint, folder)
    return folder


# -- universal ---------------------------------------------------------------------------------------------------------


def loaded_by_deepspeed(model_folder: str, checkpoint: str, universal: str) -> list[dict[str, torch.Tensor]]:
    """Plain `deepspeed.initialize` and `load_checkpoint`, under ZeRO 1 to 3: what the engine holds afterwards."""
    found = []
    for stage in (1, 2, 3):
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        mora_ds.inject(model, MoRAConfig.from_dict(read_adapter(Path(checkpoint)).facts["config"]))
        config = ds_config(stage, 1, 1, checkpoint={"load_universal": True})
        engine = deepspeed.initialize(model=model, config=config, model_parameters=parameter_groups(model))[0]
        path, _ = engine.load_checkpoint(universal)
        assert path is not None and engine.global_steps == 5
        held = {}
        for name, parameter in model.named_parameters():
            held[f"{name} {MASTER}"] = zero.full_fp32(engine, parameter).cpu().clone()
            for key in ("exp_avg", "exp_avg_sq"):
                moment = safe_get_full_optimizer_state(parameter, key)
                held[f"{name} {key}"] = moment.view(held[f"{name} {MASTER}"].shape).clone()
        steps = {float(value) for key, value in zero.state_tensors(engine, 0) if key == "step"}
        assert steps == {1.0}, "one step since the merge"
        found.append(held)
    return found


@pytest.mark.parametrize("world", [1, 3])
def test_deepspeeds_own_loader_takes_it(user: Playground, checkpoint: Path, universal: Path, world: int) -> None:
    expected = contents_of(checkpoint / "engine")
    for rank in run_ranks(world, loaded_by_deepspeed, str(user.model), str(checkpoint), str(universal)):
        for held in rank:
            assert len(held) == 3 * 19
            assert_same(held, {name: expected[name] for name in held})


def test_there_and_back(user: Playground, out: Path, checkpoint: Path, universal: Path, tmp_path: Path) -> None:
    """The same tensors, good by `verify`, and a run resumed from it is the run resumed from the original."""
    back = tmp_path / "out" / "checkpoints" / "step-000005"
    from_universal(universal, back)
    assert_same(contents_of(back / "engine"), contents_of(checkpoint / "engine"))
    assert_same(load_file(back / "adapter.safetensors"), load_file(checkpoint / "adapter.safetensors"))
    (verdict,) = verify(back, user.model)
    assert verdict.is_good, verdict.problems
    run(2, user.flags(tmp_path / "two", *MORE, "--resume_from_checkpoint", back))
    assert torch.equal(losses(tmp_path / "two"), losses(out)[5:])


def test_what_cannot_be_converted_is_told(checkpoint: Path, universal: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        to_universal(checkpoint, tmp_path)
    with pytest.raises(UserError, match="no universal checkpoint"):
        from_universal(checkpoint, tmp_path / "back")
    copy = Path(shutil.copytree(universal, tmp_path / "universal"))
    fp32 = next(copy.rglob("fp32.pt"))
    fp32.write_bytes(fp32.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"fp32\.pt has"):
        from_universal(copy, tmp_path / "back")
    damaged = Path(shutil.copytree(checkpoint, tmp_path / "damaged"))
    (damaged / "adapter.json").unlink()
    with pytest.raises(UserError, match=r"adapter\.json is missing"):
        to_universal(damaged, tmp_path / "u")
    assert not (tmp_path / "back").exists() and not (tmp_path / "u").exists()


# -- the adapter alone -------------------------------------------------------------------------------------------------


def logits(model: Any, checkpoint: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(of the model, as the run recorded them)."""
    probe = load_file(checkpoint / "probe.safetensors")
    with torch.no_grad():
        return model(input_ids=probe["input_ids"], use_cache=False).logits.float(), probe["logits"]


@pytest.mark.parametrize("more", [(), ("--bf16", "true")], ids=["fp32", "bf16"])
def test_one_call_gives_the_live_model_to_the_bit(
    user: Playground, out: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    if more:
        out = tmp_path / "bf16"
        run(1, user.flags(out, *MORE, *more))
    checkpoint = out / "checkpoints" / "step-000005"
    mora_ds.export_adapter(checkpoint, tmp_path / "adapter")
    names = {path.relative_to(tmp_path / "adapter").as_posix() for path in (tmp_path / "adapter").rglob("*.*")}
    assert names == {
        "adapter.json", "adapter.safetensors", "base.json", "manifest.json", "ledger/ledger.json",
        "ledger/cycle-00000.safetensors", "ledger/cycle-00001.safetensors", "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    }  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(user.model)
    for model in (
        mora_ds.load_adapter(user.model, tmp_path / "adapter"),
        mora_ds.load_adapter(user.model, checkpoint),
        mora_ds.load_adapter(base, tmp_path / "adapter"),
    ):
        found, recorded = logits(model, checkpoint)
        assert torch.equal(found, recorded)
        assert len(mora_ds.mora_layers(model)) == 14 and not model.training


def test_a_merged_model_is_made_from_the_adapter_alone(checkpoint: Path, tmp_path: Path) -> None:
    mora_ds.export_adapter(checkpoint, tmp_path / "adapter")
    kept, copied = (
        {file.name: file.read_bytes() for file in (folder / "tokenizer").iterdir()}
        for folder in (checkpoint, tmp_path / "adapter")
    )
    assert kept and copied == kept
    for name, source in (("one", checkpoint), ("other", tmp_path / "adapter")):
        mora_ds.export_merged(source, tmp_path / name)
    assert_same(load_file(tmp_path / "one" / "model.safetensors"), load_file(tmp_path / "other" / "model.safetensors"))


def test_an_adapter_that_does_not_fit_is_refused(user: Playground, checkpoint: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(user.model, tmp_path / "model"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="is not the base of"):
        mora_ds.load_adapter(other, checkpoint)
    adapter = tmp_path / "adapter"
    mora_ds.export_adapter(checkpoint, adapter)
    (adapter / "ledger" / "cycle-00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"cycle-00001\.safetensors is missing"):
        mora_ds.load_adapter(user.model, adapter)
    with pytest.raises(UserError, match="neither an adapter"):
        mora_ds.load_adapter(user.model, tmp_path)
    incremental = tmp_path / "incremental"  # of version 0.2
    mora_ds.export_adapter(checkpoint, incremental)
    content = (incremental / "adapter.json").read_text()
    (incremental / "manifest.json").unlink()
    (incremental / "adapter.json").write_text(content.replace('"exact"', '"incremental"'))
    with pytest.raises(UserError, match="incremental merges, which were removed"):
        mora_ds.load_adapter(user.model, incremental)


def test_the_program(checkpoint: Path, tmp_path: Path) -> None:
    program = [sys.executable, str(REPOSITORY / "tools" / "convert_checkpoint.py")]
    steps = [
        ("universal", checkpoint.parents[1], tmp_path / "u"),
        ("from_universal", tmp_path / "u", tmp_path / "back" / "step-000005"),
        ("universal", checkpoint, tmp_path / "u"),
    ]
    codes = []
    for action, path, output in steps:
        command = [*program, action, str(path), "--output", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        codes.append(done.returncode)
        assert ("wrote" in done.stdout) != ("exists already" in done.stderr)
    assert codes == [0, 0, 2]
