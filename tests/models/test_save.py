"""Written models: which tensor is in which file, the base's other files, and every
dtype."""

import errno
import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from mora_ds.common.files import read_json
from mora_ds.common.tensor_files import (
    CODES,
    SafetensorsWriter,
    open_safetensors,
    shape_dtype,
    tensor_nbytes,
    write_safetensors_atomic,
)
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.save import layout_of, write_companions, write_shards
from tests.helpers.errors import user_error
from tests.helpers.tables import parsed

# -- shards ----------------------------------------------------------------------------


def test_a_file_is_filled_up_to_its_limit(tmp_path, monkeypatch):
    """A tensor above the limit has a file alone; none is empty."""
    monkeypatch.setattr("mora_ds.models.save.SHARD_BYTES", 10)
    sizes = {"large": 30, "a": 4, "b": 6, "c": 1, "huge": 40, "d": 10}
    layout = {key: ((size,), torch.uint8) for key, size in sizes.items()}
    names = write_shards(
        tmp_path, layout, lambda key, dtype: torch.zeros(sizes[key], dtype=dtype)
    )
    contents = [" ".join(sorted(load_file(tmp_path / name))) for name in names]
    assert contents == ["large", "a b", "huge", "c", "d"]


def base_folder(folder, config):
    folder.mkdir()
    tensors = {
        "w": torch.arange(6.0).view(2, 3),
        "half": torch.ones(3).half(),
        "count": torch.tensor([7, 8]),
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return BaseCheckpoint.open(folder)


def test_an_index_is_written_for_several_files_alone(tmp_path, monkeypatch):
    base = base_folder(tmp_path / "base", {"model_type": "llama"})
    layout = layout_of(base, ["w", "half", "count"], torch.bfloat16)

    def written(folder, limit):
        folder.mkdir()
        monkeypatch.setattr("mora_ds.models.save.SHARD_BYTES", limit)
        return write_shards(folder, layout, lambda key, dtype: base.read(key).to(dtype))

    unsharded = tmp_path / "unsharded"
    assert written(unsharded, 100) == ("model.safetensors",)
    assert [path.name for path in unsharded.iterdir()] == ["model.safetensors"]
    split = tmp_path / "split"
    first, second = written(split, 20)
    assert first == "model-00001-of-00002.safetensors"
    assert load_file(split / first)["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert load_file(split / first)["half"].dtype == torch.bfloat16
    assert load_file(split / second)["count"].dtype == torch.int64, "whole numbers stay"
    index = read_json(split / "model.safetensors.index.json")
    assert index == {
        "metadata": {"total_size": 34},
        "weight_map": {"count": second, "half": first, "w": first},
    }


# -- the other files -------------------------------------------------------------------


def test_a_config_has_the_new_dtype_wherever_it_has_one(tmp_path, out):
    config = parsed("""
    {model_type: é, torch_dtype: float32, text_config: {dtype: float32, inner_config: {dtype: 1}}, quant_config: null,
     other: {dtype: float32}}
    """)
    out.mkdir()
    write_companions(base_folder(tmp_path / "base", config), out, torch.bfloat16)
    written = (out / "config.json").read_text()
    assert "é" in written
    assert json.loads(written) == parsed("""
    {model_type: é, torch_dtype: bfloat16, dtype: bfloat16, quant_config: null,
     text_config: {dtype: bfloat16, inner_config: {dtype: bfloat16}}, other: {dtype: float32}}
    """)


COPIED = {
    "generation_config.json", "modeling_own.py", "LICENSE.txt", "vocabulary_extension.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "own.tiktoken", "chat_template.jinja",
}  # fmt: skip


def test_the_bases_files_and_one_tokenizer_are_copied(tmp_path):
    base = base_folder(tmp_path / "base", {"model_type": "llama"})
    tokenizer_folder = tmp_path / "tokenizer"
    for name in (*COPIED, "README.md", "optimizer.pt"):
        (base.folder / name).write_text("base")
    (base.folder / "vocab.d").mkdir()
    (tokenizer_folder / "deep").mkdir(parents=True)
    for name in ("tokenizer.json", "own.json", "LICENSE.txt", "config.json"):
        (tokenizer_folder / name).write_text("own")

    def written(name, tokenizer):
        """The content of each file, but for the config."""
        out = tmp_path / name
        out.mkdir()
        write_companions(base, out, torch.float32, tokenizer)
        contents = {path.name: path.read_text() for path in out.iterdir()}
        assert json.loads(contents.pop("config.json"))["dtype"] == "float32"
        return contents

    assert written("one", None) == dict.fromkeys(COPIED, "base")
    of_model = (
        "generation_config.json modeling_own.py LICENSE.txt vocabulary_extension.json"
    )
    assert written("two", tokenizer_folder) == {
        **dict.fromkeys(of_model.split(), "base"),
        "tokenizer.json": "own",
        "own.json": "own",
    }


def test_links_are_followed_within_the_model_and_the_hubs_cache_alone(tmp_path, out):
    """The cache keeps the files of snapshots/REVISION in blobs/, next to snapshots/."""
    hub = tmp_path / "hub"
    (hub / "snapshots").mkdir(parents=True)
    base = base_folder(hub / "snapshots/1a2b", {"model_type": "llama"})
    (hub / "blobs").mkdir()
    secrets = (tmp_path / "secret", hub / "secret")
    for path in (hub / "blobs/ff", base.folder / "kept.txt", *secrets):
        path.write_text(path.name)
    (base.folder / "tokenizer.json").symlink_to("../../blobs/ff")
    (base.folder / "merges.txt").symlink_to("kept.txt")
    out.mkdir()
    write_companions(base, out, torch.float32)
    assert (out / "tokenizer.json").read_text() == "ff"
    assert (out / "merges.txt").read_text() == "kept.txt"
    assert not (out / "tokenizer.json").is_symlink()
    for target in secrets:
        (base.folder / "vocab.json").unlink(missing_ok=True)
        (base.folder / "vocab.json").symlink_to(target)
        with user_error(
            r"vocab.json is a link to .*secret, outside of the folder, and is not copied"
        ):
            write_companions(base, out, torch.float32)
        assert not (out / "vocab.json").exists()


# -- safetensors files -----------------------------------------------------------------


def test_every_dtype_reads_back_from_a_place_that_fits_it(tmp_path):
    """Each tensor begins at a multiple of its element size, which readers that map the file
    rely on.
    """
    path = tmp_path / "t.safetensors"
    tensors = {}
    # Tensors begin at a multiple of eight bytes, however long the header is
    for note in ("xx", "xxx"):
        write_safetensors_atomic(path, {"a": torch.ones(1)}, {"note": note})
        assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0
    for number, dtype in enumerate(sorted(CODES, key=lambda dtype: dtype.itemsize)):
        tensors[f"é{number}"] = torch.tensor([0.0, 1.0, 2.0]).to(dtype)
    tensors.update(
        empty=torch.zeros(0, 4),
        scalar=torch.tensor(2.5),
        strided=torch.arange(24.0).view(4, 6).T,
    )
    write_safetensors_atomic(path, tensors, {"step": "3"})
    read = load_file(path)
    raw = path.read_bytes()
    handle = open_safetensors(path)
    assert read.keys() == tensors.keys()
    assert handle.metadata() == {"format": "pt", "step": "3"}
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype, name
        assert torch.equal(read[name].double(), tensor.double()), name
        assert shape_dtype(handle, name) == (tuple(tensor.shape), tensor.dtype)
        begin = 8 + length + header[name]["data_offsets"][0]
        assert begin % tensor.dtype.itemsize == 0, name
        assert tensor_nbytes(tensor.shape, tensor.dtype) == tensor.nbytes


def test_a_file_may_end_with_a_tensor_that_is_written_first(tmp_path):
    layout = {
        "small": ((3,), torch.uint8),
        "large": ((2,), torch.float64),
    }
    with SafetensorsWriter(tmp_path / "t", layout, {"about": "x"}) as writer:
        writer.write("small", torch.tensor([1, 2, 3], dtype=torch.uint8))
        with pytest.raises(ValueError, match="'large' is "):
            writer.write("large", torch.zeros(2))
        with pytest.raises(
            ValueError, match="'small' is not in the layout, or was already written"
        ):
            writer.write("small", torch.zeros(3))
        size = os.stat(tmp_path / "t").st_size
        writer.write(
            "large", torch.tensor([0.5, 0.25], dtype=torch.float64, requires_grad=True)
        )
    assert os.stat(tmp_path / "t").st_size == size, (
        "the file has its size from the start"
    )
    read = load_file(tmp_path / "t")
    assert read["large"].tolist() == [0.5, 0.25]
    assert read["small"].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="not written: large, small"):
        SafetensorsWriter(tmp_path / "v", layout, {}).__exit__(None, None, None)
    full = pytest.raises(OSError, match="No space left")
    with full, SafetensorsWriter(tmp_path / "w", layout, {}):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_is_no_file_of_tensors_is_named(tmp_path):
    path = tmp_path / "t.safetensors"
    with user_error(r"t.safetensors is missing"):
        open_safetensors(path)
    save_file({"a": torch.zeros(64), "b": torch.zeros(1, dtype=torch.complex64)}, path)
    assert shape_dtype(open_safetensors(path), "a") == ((64,), torch.float32)
    with user_error("tensor 'b' has dtype C64, which is not supported"):
        shape_dtype(open_safetensors(path), "b")
    path.write_bytes(path.read_bytes()[:-1])
    with user_error(r"t.safetensors is truncated or damaged"):
        open_safetensors(path)
