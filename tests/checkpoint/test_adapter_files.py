"""adapter.json, adapter.safetensors and base.json: what they store, and how damage is
named.
"""

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mora_ds.adapters.config import MoRAConfig
from mora_ds.checkpoint.adapter_files import (
    Adapter,
    AdapterFile,
    AdapterTensors,
    BaseReference,
    read_adapter,
    write_adapter,
)
from mora_ds.common.files import read_json, write_manifest
from mora_ds.models.base import BaseCheckpoint
from mora_ds.remora.ledger import LayerEntry, Ledger
from tests.helpers.damage import change_json, flip, set_value
from tests.helpers.errors import user_error
from tests.helpers.ledgers import entry, layers_of, mora_matrices_for
from tests.helpers.models import tiny_model
from tests.helpers.tables import each_row

CONFIG = MoRAConfig(rank=8, layer_sizes={"a.q": 6})  # given as JSON has it


@pytest.fixture
def adapter(tmp_path):
    layers = layers_of(2)
    adapter = AdapterFile(
        layers, CONFIG, "bfloat16", 2, 250, trainables=("n.weight",), facts={"seed": 3}
    )
    write_adapter(
        tmp_path,
        adapter,
        mora_matrices_for(layers, 0),
        {"n.weight": torch.ones(5).bfloat16()},
    )
    return adapter


@pytest.fixture
def ledger(adapter, tmp_path):
    """Of two cycles with the adapter's layers, in its folder."""
    ledger = Ledger.create(tmp_path / "ledger", "f")
    for step in (1, 2):
        ledger.append(
            step, adapter.layers, mora_matrices_for(adapter.layers, step).items()
        )
    return ledger


def test_adapter_round_trip(adapter, tmp_path):
    assert read_adapter(tmp_path) == adapter
    assert read_json(tmp_path / "adapter.json")["facts"] == {"seed": 3}
    tensors = AdapterTensors(tmp_path, adapter)
    assert torch.equal(
        tensors.mora_matrix("a.v"), mora_matrices_for(adapter.layers, 0)["a.v"]
    )
    assert tensors.trained("n.weight").dtype == torch.float32
    assert tensors.trained_shape("n.weight") == (5,)


WRONG = """
adapter.json | format = 9 | format 9
adapter.json | dtype = int4 | unknown dtype 'int4'
adapter.json | layers = {a.q: {}} | adapter.json is damaged: layers: a.q: weight is missing
adapter.json | cycle = two | adapter.json is damaged: cycle must be a whole number
adapter.json | config = {kind: dora} | unknown adapter 'dora'; known: mora, lora, subspace
adapter.json | config = {kind: mora, rank: 8} | the adapter's settings: target_modules is missing
base.json | format = 2 | base.json has format 2
base.json | dtype = int4 | base.json: unknown dtype 'int4'
base.json | keys = null | base.json is damaged
"""


@each_row("file, change, words", WRONG)
def test_damage_is_named(adapter, tmp_path, file, change, words):
    BaseReference("base", "f", {"a": "b"}, "float32").write(tmp_path)
    change_json(tmp_path / file, lambda content: set_value(content, change))
    read = {"adapter.json": read_adapter, "base.json": BaseReference.read}[file]
    with user_error(words):
        read(tmp_path)


def test_a_missing_adapter_file_is_named(tmp_path):
    with user_error(r"adapter\.json is missing"):
        read_adapter(tmp_path)


def test_adapter_tensors_must_fit(adapter, tmp_path):
    fewer = replace(adapter, layers={"a.q": adapter.layers["a.q"]})
    with user_error(r"a\.v\.mora_matrix"):
        AdapterTensors(tmp_path, fewer)
    wider = replace(adapter, layers={**adapter.layers, "a.q": entry("a.q", r_hat=8)})
    with user_error(r"a\.q\.mora_matrix is \(6, 6\)"):
        AdapterTensors(tmp_path, wider)
    tensors = load_file(tmp_path / "adapter.safetensors")
    save_file(
        {**tensors, "a.q.mora_matrix": tensors["a.q.mora_matrix"].half()},
        tmp_path / "adapter.safetensors",
    )
    with user_error(
        r"a\.q\.mora_matrix is \(6, 6\) torch\.float16, which does not fit"
    ):
        AdapterTensors(tmp_path, adapter)
    with pytest.raises(ValueError, match="not those that the adapter lists"):
        write_adapter(tmp_path, adapter, {}, {})
    os.truncate(tmp_path / "adapter.safetensors", 300)
    with user_error(r"adapter\.safetensors is truncated or damaged"):
        AdapterTensors(tmp_path, adapter)


@pytest.mark.parametrize(
    "name",
    [
        "adapter.json",
        "adapter.safetensors",
        "base.json",
        "ledger/cycle-00000.safetensors",
    ],
)
def test_each_file_of_an_adapter_is_hashed_and_no_other_where_only_that_is_read(
    adapter, ledger, tmp_path, name
):
    """An engine's shards are larger by far; their sizes are looked at all the same."""
    BaseReference("base", "f", {}, "float32").write(tmp_path)
    (tmp_path / "shard").write_bytes(b"shard")
    write_manifest(tmp_path)
    (tmp_path / "shard").write_bytes(b"drahs")
    opened = Adapter.open(tmp_path)
    assert opened.file == adapter
    flip(tmp_path / name, 0.9)
    with user_error(f"{name} is damaged"):
        Adapter.open(tmp_path)
    (tmp_path / "shard").write_bytes(b"s")
    with user_error("shard has 1 bytes"):
        Adapter.open(tmp_path)
    if name.startswith("ledger/"):
        (tmp_path / "manifest.json").unlink()
        with user_error("the ledger is damaged at cycle 0"):
            Adapter.open(tmp_path)


def test_an_adapter_follows_the_cycles_of_its_ledger(adapter, ledger):
    adapter.check_ledger(ledger)
    for cycle in (1, 3):
        with user_error(f"has 2 cycles, but .* was written in cycle {cycle}"):
            replace(adapter, cycle=cycle).check_ledger(ledger)
    turned = {**adapter.layers, "a.q": replace(adapter.layers["a.q"], transposed=True)}
    with user_error("a.q is another layer than in earlier cycles"):
        replace(adapter, layers=turned).check_ledger(ledger)


def test_base_reference_finds_its_base_and_refuses_another(tmp_path):
    for seed in (0, 1):
        tiny_model(seed=seed).save_pretrained(tmp_path / f"base-{seed}")
    checkpoint = tmp_path / "checkpoints/step-1"
    checkpoint.mkdir(parents=True)
    fingerprint = BaseCheckpoint.open(tmp_path / "base-0").fingerprint()
    reference = BaseReference("../../base-0", fingerprint, {"a": "b"}, "float32")
    reference.write(checkpoint)
    (tmp_path / "latest").symlink_to(checkpoint)
    assert BaseReference.read(checkpoint) == reference
    assert reference.open_base(tmp_path / "latest").fingerprint() == fingerprint
    with user_error(r"--base: .*base-1 is not the base of .*step-1"):
        reference.open_base(checkpoint, tmp_path / "base-1", "--base")


def test_a_base_at_a_url_is_no_path(tmp_path):
    reference = BaseReference("s3://bucket/model", "f", {}, "float32")
    assert reference.absolute(tmp_path) == reference


def test_an_entry_has_the_weight_of_its_module():
    with user_error(r"a\.q: its weight cannot be 'b\.q\.weight'"):
        LayerEntry.from_dict("a.q", {**entry("a.q").to_dict(), "weight": "b.q.weight"})
