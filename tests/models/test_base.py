"""Base weights on disk: opening, mapping, fingerprints, checksums."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from mora_ds.common.files import read_json
from mora_ds.models.base import (
    BaseChanged,
    BaseCheckpoint,
    WeightMappingError,
    map_model,
    verify_against_model,
    write_own_base,
)
from tests.helpers.errors import run_error, user_error
from tests.helpers.models import tiny_model
from tests.helpers.resume import assert_same_tensors

SHARD = "20KB"


def parameters(model):
    return dict(model.named_parameters(remove_duplicate=False))


def mapping_of(model, base):
    return map_model(base, model, parameters(model))


@pytest.fixture
def llama(tmp_path):
    tiny_model().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def sharded(tmp_path):
    tiny_model().save_pretrained(tmp_path / "sharded", max_shard_size=SHARD)
    return tmp_path / "sharded"


# -- opening ---------------------------------------------------------------------------


def mappings_of(folder):
    """How many times files of a folder are mapped into this process."""
    return Path("/proc/self/maps").read_text().count(str(folder))


def test_files_are_mapped_until_they_are_released(llama):
    base = BaseCheckpoint.open(llama)
    before = mappings_of(llama)
    base.read("lm_head.weight")
    assert mappings_of(llama) > before
    base.release()
    assert mappings_of(llama) == before
    assert base.read("lm_head.weight").shape == (128, 32)


def test_sharded_folder_reads_the_same(llama, sharded):
    one = BaseCheckpoint.open(llama)
    many = BaseCheckpoint.open(sharded)
    assert len(many.files()) > 2
    assert all(torch.equal(one.read(key), many.read(key)) for key in set(many.keys()))
    assert one.fingerprint() == many.fingerprint()


def test_a_folder_below_home_needs_a_config_of_weights_that_are_not_quantized(
    llama, monkeypatch
):
    """A shell leaves the ~ of `--base=~/model` as it is."""
    monkeypatch.setenv("HOME", str(llama.parent))
    content = read_json(llama / "config.json")
    (llama / "config.json").write_text(
        json.dumps({**content, "quantization_config": None})
    )
    assert BaseCheckpoint.open(f"~/{llama.name}").keys()
    (llama / "config.json").unlink()
    with user_error(r"--base: .*/llama is not a model folder: it has no config.json"):
        BaseCheckpoint.open(llama, "--base")


def test_pickled_weights_lead_to_an_own_base(tmp_path):
    folder = tmp_path / "bin"
    model = tiny_model()
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(
        WeightMappingError, match=r"only pickled weights \(pytorch_model.bin\)"
    ):
        BaseCheckpoint.open(folder)
    base = write_own_base(
        AutoModelForCausalLM.from_pretrained(folder), tmp_path / "own"
    )
    verify_against_model(
        base, mapping_of(model, base), parameters(model), parameters(model)
    )


def overwritten(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x40
    path.write_bytes(content)


def replaced(path):
    content = path.read_bytes()
    status = path.stat()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 0x40]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def shortened(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("harm", [overwritten, replaced, shortened, Path.unlink])
def test_a_file_that_changes_after_it_was_opened_is_named(sharded, harm):
    base = BaseCheckpoint.open(sharded)
    fingerprint = base.fingerprint()
    base.require_unchanged(fingerprint)
    path = base.files()[1]
    harm(path)
    for _ in range(2):
        with pytest.raises(
            BaseChanged, match=f"{path.name} was changed or replaced during the run"
        ):
            BaseCheckpoint.require_unchanged(base, fingerprint)


@pytest.mark.parametrize(
    "how", [os.utime, lambda path: shutil.move(shutil.copy(path, f"{path}.copy"), path)]
)
def test_a_file_that_was_only_touched_or_copied_is_read_once(sharded, how, monkeypatch):
    base = BaseCheckpoint.open(sharded)
    fingerprint = base.fingerprint()
    how(base.files()[0])
    base.require_unchanged(fingerprint)
    monkeypatch.setattr(BaseCheckpoint, "read", None)
    base.require_unchanged(fingerprint)


# -- mapping ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "gpt2", "gpt_neox", "gemma3_text", "olmo2", "phi3"]
)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_every_parameter_is_mapped_and_equal(tmp_path, family, stored):
    """Tied embeddings, as qwen2's, included."""
    tiny_model(family, dtype=stored).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    base = BaseCheckpoint.open(tmp_path)
    mapping = mapping_of(model, base)
    assert set(mapping) == set(parameters(model))
    verify_against_model(base, mapping, parameters(model), mapping)


def test_hub_files_without_the_prefix(tmp_path):
    model = tiny_model("gpt2")
    model.config.save_pretrained(tmp_path)
    state = {
        name.removeprefix("transformer."): tensor
        for name, tensor in model.state_dict().items()
    }
    state.pop("lm_head.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    mapping = mapping_of(model, BaseCheckpoint.open(tmp_path))
    assert mapping["transformer.h.0.attn.c_attn.weight"] == "h.0.attn.c_attn.weight"
    assert (
        mapping["lm_head.weight"] == mapping["transformer.wte.weight"] == "wte.weight"
    )


def test_tie_is_symmetric_and_prefers_the_twin(llama):
    base = BaseCheckpoint.open(llama)
    model = tiny_model()
    model.all_tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    names = ["lm_head.weight", "model.embed_tokens.weight"]
    head, embeddings = names
    assert set(map_model(base, model, names).values()) == {embeddings}
    only_head = BaseCheckpoint(llama, {head: llama / "model.safetensors"})
    assert set(map_model(only_head, model, names).values()) == {head}


def test_unmapped_names_are_listed(llama):
    with pytest.raises(
        WeightMappingError,
        match=r"2 parameter\(s\) of the model: a\.weight, b\.weight$",
    ):
        map_model(
            BaseCheckpoint.open(llama),
            tiny_model(),
            ["lm_head.weight", "a.weight", "b.weight"],
        )


def test_first_differing_tensor_is_named(llama):
    model = tiny_model()
    base = BaseCheckpoint.open(llama)
    mapping = mapping_of(model, base)
    tensors = parameters(model)
    norm = tensors["model.norm.weight"].data
    norm[3] = torch.nextafter(norm[3], torch.tensor(9.0))
    with pytest.raises(
        WeightMappingError, match=r"model\.norm\.weight of the model is not the tensor"
    ):
        verify_against_model(base, mapping, tensors, mapping)
    tensors["lm_head.weight"] = torch.zeros(130, 32)
    with pytest.raises(
        WeightMappingError, match=r"\(130, 32\) in the model, \(128, 32\)"
    ):
        verify_against_model(base, mapping, tensors, ["lm_head.weight"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_own_base_loads_and_replaces(tmp_path, family):
    folder = tmp_path / "own"
    write_own_base(tiny_model(family, seed=1), folder)
    model = tiny_model(family)
    base = write_own_base(model, folder)
    for name, key in mapping_of(model, base).items():
        assert key in (name, "transformer.wte.weight")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_tensors(parameters(loaded), parameters(model))
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_own_base_that_fails_leaves_the_old_one(tmp_path):
    folder = tmp_path / "own"
    before = write_own_base(tiny_model(), folder).fingerprint()

    class Tokenizer:
        def save_pretrained(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    with run_error("full"):
        write_own_base(tiny_model(seed=1), folder, Tokenizer())
    assert BaseCheckpoint.open(folder).fingerprint() == before
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_a_tensor_with_the_name_of_a_stack_of_experts_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    save_file({"experts.*.weight": torch.ones(2, 3)}, file)
    with user_error(f"{file} is damaged: a tensor is called 'experts.*.weight'"):
        BaseCheckpoint.open(tmp_path)


# -- fingerprint -----------------------------------------------------------------------


def test_fingerprint_depends_on_name_dtype_shape_and_bytes(tmp_path):
    tensor = torch.arange(24, dtype=torch.int32)
    variants = [
        {"a": tensor},
        {"b": tensor},
        {"a": tensor.view(4, 6)},
        {"a": tensor.view(torch.float32)},
        {"a": tensor.flip(0)},
    ]
    prints = []
    for i, variant in enumerate(variants):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file(variant, folder / "model.safetensors")
        prints.append(BaseCheckpoint.open(folder).fingerprint())
    assert len(set(prints)) == len(variants)
