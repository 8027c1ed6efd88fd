"""A complete checkpoint made without training, for tests that change its files and reseal
them.
"""

import json
import struct

import torch
from safetensors.torch import load_file, save_file

from mora_ds.checkpoint.shard_table import INDEX_FILE, EngineShards, RankShard
from mora_ds.checkpoint.state import TrainerState
from mora_ds.common import files
from mora_ds.engine.shards import Extent, Layout
from mora_ds.remora.ledger import _link
from tests.helpers.exports import fake_run

SHARD = "rank-00000.safetensors"


def complete_checkpoint(folder):
    """A `fake_run` with the shards of one process, random states, and a tokenizer's
    folder."""
    run = fake_run(
        folder, cycles=2, num_hidden_layers=1, trained=("model.norm.weight",)
    )
    checkpoint = run.checkpoint
    state = TrainerState(
        step=7, tokens=7, merges=[1, 2], identity={"base": "b", "global_batch_size": 2}
    )
    files.write_json_atomic(checkpoint / "trainer_state.json", vars(state))
    (checkpoint / "tokenizer").mkdir()
    (checkpoint / "tokenizer/tokenizer_config.json").write_text('{"from": "run"}')
    _write_engine(checkpoint)
    files.write_manifest(checkpoint)
    return run


def _write_engine(checkpoint):
    tensors = load_file(checkpoint / "adapter.safetensors")
    pieces = []
    offset = 0
    for name, tensor in tensors.items():
        pieces.append(Extent(name, 0, tensor.numel(), offset))
        offset += tensor.numel()
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    state = {
        "0.exp_avg": torch.zeros_like(flat),
        "0.exp_avg_sq": torch.zeros_like(flat),
        "0.step": torch.tensor(3.0),
        "rng.cpu": torch.zeros(8, dtype=torch.uint8),
    }
    (checkpoint / "engine").mkdir()
    save_file({"0.master": flat, **state}, checkpoint / "engine" / SHARD)
    layout = Layout(
        world_size=1,
        stage=2,
        optimizer="AdamW",
        scaler={},
        groups=[{name: list(tensor.shape) for name, tensor in tensors.items()}],
        counters={"global_steps": 7},
    )
    shard = RankShard.of(layout, 0, SHARD, [pieces])
    EngineShards.of(checkpoint / "engine", layout, [shard]).write_table(
        checkpoint / "engine" / INDEX_FILE
    )


def change_layout(checkpoint, change):
    """Applies `change` to what engine/layouts.safetensors says of all ranks."""

    def change_metadata(header):
        content = json.loads(header["__metadata__"]["layout"])
        change(content)
        header["__metadata__"]["layout"] = json.dumps(content)

    change_header(checkpoint / "engine" / INDEX_FILE, change_metadata)


def reseal(folder):
    """Makes every hash that is recorded under `folder` that of the file as it is: ledgers
    first, then manifests.
    """
    for path in folder.rglob("ledger.json"):
        if path.is_file() and not path.is_symlink():
            _reseal_ledger(path)
    for path in folder.rglob("manifest.json"):
        if not path.is_symlink():
            files.write_manifest(path.parent)


def _reseal_ledger(path):
    try:
        content = json.loads(path.read_text())
        chain = content["base_fingerprint"]
        for cycle in content["cycles"]:
            file = path.parent / cycle["file"]
            if not file.is_file():  # a pipe, which would wait for ever, or a device
                return
            cycle.update(sha256=files.sha256_file(file), size=file.stat().st_size)
            cycle["chain"] = chain = _link(chain, cycle["sha256"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        return  # a mutation that has no such structure is left as it is
    path.write_text(json.dumps(content))


def change_header(path, change):
    """Applies `change` to the JSON header of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
