"""Model folders that come from someone else: no file outside is read, nothing waits, and no
memory is taken for what the files do not hold.
"""

import json
import os
import resource
import shutil

import pytest

from mora_ds.models import load
from mora_ds.models.load import load_model
from tests.helpers.errors import user_error
from tests.helpers.models import tiny_model


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "good"
    tiny_model("llama").save_pretrained(folder, max_shard_size="20kB")
    return folder


@pytest.fixture
def folder(good, tmp_path, monkeypatch):
    """A copy of a good model, which transformers must not load."""

    def loaded(*arguments, **options):
        raise AssertionError("transformers has read the folder")

    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", loaded)
    return shutil.copytree(good, tmp_path / "model")


def test_an_index_that_leads_out_of_the_folder_is_refused(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    content["weight_map"][first] = "../outside.safetensors"
    index.write_text(json.dumps(content))
    with user_error("outside.safetensors' cannot be the name of a file"):
        load_model(folder, "float32")


def test_an_index_of_pickled_weights_that_leads_out_is_refused(folder):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model-1.bin").touch()
    content = {"weight_map": {"a": "/etc/passwd"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))
    with user_error("passwd' cannot be the name of a file"):
        load_model(folder, "float32")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_refused(folder, name, kind):
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    with user_error(f"{name} is neither a file nor a folder"):
        load_model(folder, "float32")


def test_a_huge_config_is_refused(folder):
    with (folder / "config.json").open("wb") as file:
        file.truncate(2**40)
    with user_error(r"config\.json is larger than"):
        load_model(folder, "float32")


def test_sizes_are_compared_before_memory_is_taken(folder):
    """134 GB of embeddings, of a file of 100 kB."""
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = 2**30
    (folder / "config.json").write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with user_error("weights do not fit the config: it asks for"):
        load_model(folder, "float32")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300e3, "kB"
