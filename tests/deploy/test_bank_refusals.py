"""What a bank refuses: damaged adapters when they are used, others that do not fit at once, names and rows."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mora_ds.adapters.config import AdapterConfig, LoRAConfig, MoRAConfig
from mora_ds.checkpoint.layout import ADAPTER_JSON, ADAPTER_TENSORS
from mora_ds.common.errors import UserError
from mora_ds.deploy.bank import AdapterBank
from tests.helpers.banks import Bench, bench, check_rows, logits
from tests.helpers.exports import fake_run
from tests.helpers.models import tokens


def test_a_damaged_adapter_harms_nobody_until_it_is_used(rotating: Bench, tmp_path: Path) -> None:
    shutil.copytree(rotating.folder, tmp_path, dirs_exist_ok=True)
    made = Bench(tmp_path, rotating.maker, rotating.updates)
    for name in ("short", "flipped", "nothing", "nan", "json", "gone", "seed"):
        shutil.copytree(tmp_path / "bank" / "one", tmp_path / "bank" / name)
    bank_folder = tmp_path / "bank"
    tensors = (bank_folder / "short" / ADAPTER_TENSORS).read_bytes()
    (bank_folder / "short" / ADAPTER_TENSORS).write_bytes(tensors[:-5])
    flipped = bank_folder / "flipped" / "ledger" / "cycle-00000.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x77")
    (bank_folder / "nothing" / ADAPTER_TENSORS).unlink()
    (bank_folder / "json" / ADAPTER_JSON).write_text('{"format": 1, "layers')
    (bank_folder / "gone" / ADAPTER_JSON).unlink()
    text = (bank_folder / "seed" / ADAPTER_JSON).read_text()
    (bank_folder / "seed" / ADAPTER_JSON).write_text(re.sub('"seed": [0-9]+', '"seed": 1000000000000', text))
    shutil.rmtree(bank_folder / "nan")
    made.updates["nan"] = made.maker.write(bank_folder / "nan", MoRAConfig(rank=3), scale=float("nan"))
    bank = made.open()
    assert set(bank.damaged) == {"json", "gone", "seed"}
    check_rows(made, bank, ["one", "three"], tokens(2))
    for name, message in (
        ("short", ADAPTER_TENSORS), ("flipped", "cycle-00000.safetensors"), ("nothing", "is missing"),
        ("nan", "q_proj is not finite"), ("json", "adapter.json is damaged"), ("gone", "adapter.json is missing"),
        ("seed", "the seed of an operator's permutations must be"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"adapter '{name}' cannot be used: .*{message}"), bank.use(["one", name]):
            pass
    check_rows(made, bank, ["none", "one"], tokens(2))


def test_a_bank_of_damaged_adapters_alone_is_refused(rotating: Bench, tmp_path: Path) -> None:
    shutil.copytree(rotating.folder / "bank" / "one", tmp_path / "bank" / "one")
    (tmp_path / "bank" / "one" / ADAPTER_JSON).write_text("{")
    with pytest.raises(UserError, match=r"--bank: every adapter is damaged, e\.g\. .*adapter\.json"):
        AdapterBank.open(rotating.folder / "base", tmp_path / "bank")


def test_a_layer_that_was_not_there_when_the_bank_was_opened(rotating: Bench, tmp_path: Path) -> None:
    made = Bench(tmp_path, rotating.maker, dict(rotating.updates))
    shutil.copytree(rotating.folder / "base", tmp_path / "base")
    made.add("queries", MoRAConfig(rank=3, target_modules=("q_proj",)))
    bank = made.open()
    shutil.rmtree(tmp_path / "bank" / "queries")
    made.add("queries", MoRAConfig(rank=3, target_modules=("q_proj", "k_proj")))
    with pytest.raises(UserError, match=r"adapter 'queries' cannot be used: .*a layer that it did not have at first"):
        bank.cache.get("queries")


def test_without_a_manifest_the_ledger_s_own_hashes_count(rotating: Bench, tmp_path: Path) -> None:
    shutil.copytree(rotating.folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "bank" / "one" / "manifest.json").unlink()
    path = tmp_path / "bank" / "one" / "ledger" / "cycle-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x77")
    bank = AdapterBank.open(tmp_path / "base", tmp_path / "bank")
    with pytest.raises(UserError, match="adapter 'one' cannot be used: the ledger is damaged at cycle 0"):
        bank.cache.get("one")


def test_an_adapter_of_another_base_or_operator_is_refused(tmp_path: Path) -> None:
    made = bench(tmp_path)
    made.add("a", MoRAConfig(rank=3), cycles=1)

    def refused(message: str, config: AdapterConfig, **more: Any) -> None:
        made.add("team/odd", config, **more)
        with pytest.raises(UserError, match=message):
            made.open()
        shutil.rmtree(tmp_path / "bank" / "team")

    refused("adapter 'odd' .* is of another base: fingerprint abc", MoRAConfig(rank=3), fingerprint="abc")
    operator = (
        "adapter 'odd': model.layers.0.self_attn.q_proj has share of r_hat 12 .* but rotate of r_hat 12 .* in 'a'"
    )
    refused(operator, MoRAConfig(rank=3, operator="share"))
    refused("has rotate of r_hat 16 on 32 x 32, but rotate of r_hat 12", MoRAConfig(rank=4))
    refused("q_proj has lora; a bank takes the operators truncate, share, decouple, rotate", LoRAConfig(rank=3))
    norm = {"model.norm.weight": torch.ones(32)}
    refused("'odd' .* also trained model.norm.weight", MoRAConfig(rank=3), trained=norm)

    refused("'odd' .* has MoRA matrices of the domains law, code", MoRAConfig(rank=3), domains=("law", "code"))
    for kind in ("subspace", "spiral"):  # the second is known to nobody
        made.add(kind, MoRAConfig(rank=3))
        path = tmp_path / "bank" / kind / ADAPTER_JSON
        path.write_text(path.read_text().replace('"rotate"', f'"{kind}"'))
        with pytest.raises(UserError, match=rf"adapter '{kind}': .*q_proj has {kind}; a bank takes the operators"):
            made.open()
        shutil.rmtree(path.parent)

    content = json.loads((tmp_path / "bank" / "a" / ADAPTER_JSON).read_text())
    operator = next(iter(content["layers"].values()))
    content["layers"]["model.layers.7.up"] = {**operator, "weight": "model.layers.7.up.weight"}
    (tmp_path / "bank" / "a" / ADAPTER_JSON).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"'a': the base has no linear layer model.layers.7.up of 32 x 32"):
        made.open()


def test_a_merged_cycle_of_another_operator_is_named_when_it_is_read(tmp_path: Path) -> None:
    """Only adapter.json is read before."""
    made = bench(tmp_path)
    made.add("a", MoRAConfig(rank=3))
    made.add("b", MoRAConfig(rank=4), cycles=1)
    source = tmp_path / "bank" / "a"
    for name in (ADAPTER_JSON, ADAPTER_TENSORS):
        shutil.copyfile(source / name, tmp_path / "bank" / "b" / name)
    (tmp_path / "bank" / "b" / "manifest.json").unlink()
    content = json.loads((source / ADAPTER_JSON).read_text())
    (tmp_path / "bank" / "b" / ADAPTER_JSON).write_text(json.dumps({**content, "cycle": 1}))
    bank = made.open()
    with pytest.raises(UserError, match=r"adapter 'b': a merged cycle of .*q_proj has rotate of r_hat 16"):
        bank.cache.get("b")


@pytest.mark.timeout(120)  # a search that does not end is noticed
def test_names_folders_and_rows_that_do_not_fit_are_named(rotating: Bench, tmp_path: Path) -> None:
    bank = rotating.open()
    with pytest.raises(UserError, match=r"no adapter 'thre'. Did you mean 'three'\?"), bank.use(["one", "thre"]):
        pass
    with pytest.raises(UserError, match="no adapter is named"), bank.use([]):
        pass
    with bank.use(["one", "three"]):
        for rows in (1, 3, 4):
            with pytest.raises(UserError, match=rf"named for 2 row\(s\), but the batch has {rows}"):
                logits(bank.model, tokens(rows))
        logits(bank.model, tokens(2))
        layer = bank.model.model.layers[0].mlp.up_proj
        layer(torch.zeros(2 * 16, 32))  # rows and tokens flattened, as some models do
        with pytest.raises(
            UserError, match=r"up_proj gets \(31, 32\) of a batch of \(2, 16\): its rows cannot be separated"
        ):
            layer(torch.zeros(31, 32))
    for settings, message in (({"cache_adapters": 0}, "cache_adapters"), ({"cache_bytes": -1}, "cache_bytes")):
        with pytest.raises(UserError, match=f"{message} must be at least 1"):
            rotating.open(**settings)
    shutil.copytree(rotating.folder / "bank", tmp_path / "bank")
    shutil.copytree(rotating.folder / "bank" / "one", tmp_path / "bank" / "team" / "one")
    with pytest.raises(UserError, match=r"two adapters are called 'one': .*/bank/one and .*/bank/team/one"):
        AdapterBank.open(rotating.folder / "base", tmp_path / "bank")
    (tmp_path / "empty" / "x").mkdir(parents=True)
    for name in ("back", "again"):  # two links into a loop: without a memory there are 2^40 ways through them
        (tmp_path / "empty" / "x" / name).symlink_to(tmp_path / "empty")
    for folder, message in (("empty", "no folder in .*empty holds an adapter"), ("nowhere", "no such folder")):
        with pytest.raises(UserError, match=message):
            AdapterBank.open(rotating.folder / "base", tmp_path / folder)
    with pytest.raises(UserError, match="MODEL: no such folder"):
        AdapterBank.open(tmp_path / "base", rotating.folder / "bank")


def test_runs_and_checkpoints_are_adapters_too(tmp_path: Path) -> None:
    """A layer each of another operator, which is no matter: one a layer it is. Their engine's shards are not hashed."""
    made = fake_run(tmp_path / "run", cycles=2)
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "whole").symlink_to(made.output)
    shutil.copytree(made.checkpoint, tmp_path / "bank" / "step")
    bank, ids = AdapterBank.open(made.base, tmp_path / "bank"), tokens(2)
    expected = logits(made.live, ids)
    for names in ("whole", ["step", "whole"]):
        with bank.use(names):
            torch.testing.assert_close(logits(bank.model, ids), expected, rtol=0, atol=1e-5)
