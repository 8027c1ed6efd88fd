"""Which files of a Hub repository are downloaded, and in which precision a run keeps
weights that are not one to one; folders on disk are loaded by most other tests."""

import ast
import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mora_ds.common.files import write_json_atomic
from mora_ds.hf.trainer import load_model as load_of_trainer
from mora_ds.models import load
from mora_ds.models.base import write_own_base
from tests.helpers.errors import user_error
from tests.helpers.models import alone, tiny_model, with_own_code
from tests.helpers.resume import assert_same_tensors
from tests.helpers.tables import each_row


@pytest.mark.parametrize(
    "stored, wanted",
    [
        (
            "config.json model.safetensors pytorch_model.bin",
            "config.json model.safetensors",
        ),
        (
            "config.json pytorch_model.bin rust_model.ot",
            "config.json pytorch_model.bin",
        ),
    ],
)
def test_pickled_weights_are_downloaded_where_there_are_no_others(
    stored, wanted, tmp_path, monkeypatch
):
    """facebook/opt-125m and many of its age have no safetensors."""

    def snapshot(name, allow_patterns):
        for file in stored.split():
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    files = {path.name for path in load.download_model("some/model").iterdir()}
    assert files == set(wanted.split())


# -- code that comes with a model ------------------------------------------------------


def test_a_models_own_code_is_run_where_that_is_allowed(
    tmp_path, base_folder, monkeypatch
):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    tiny_model().save_pretrained(tmp_path / "llama")
    folder = with_own_code(tmp_path / "llama", tmp_path / "own")
    model = load.load_model(folder, torch.float32, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert type(load.folder_config(folder, True)).__name__ == "OwnConfig"
    assert type(load.named_config(str(folder), True)).__name__ == "OwnConfig"
    with torch.device("meta"):
        meta_model = load.make_model(model.config, "the model", trust_remote_code=True)
    assert type(meta_model).__name__ == "OwnForCausalLM"
    base = load.load_base(
        folder, base_folder, alone(), torch.bfloat16, None, trust_remote_code=True
    )
    assert type(base.model).__name__ == "OwnForCausalLM"
    assert base.model.dtype == torch.bfloat16
    for use in (
        lambda: load.load_model(folder, torch.float32),
        lambda: load.folder_config(folder),
        lambda: load.named_config(str(folder)),
        lambda: load.load_base(folder, base_folder, alone(), torch.float32, None),
    ):
        with user_error(
            "/own: it needs its remote code: allow it with --trust_remote_code"
        ):
            use()


def test_attention_that_a_family_does_not_have_is_named_where_no_weights_are_read():
    """Example: a plan of the model."""
    with user_error(
        r"--attn_implementation sdpa: .*Gemma2ForCausalLM does not support"
    ):
        load.make_model(
            tiny_model("gemma2").config, "the model", attn_implementation="sdpa"
        )
    config = AutoConfig.for_model("gemma2", attn_implementation="sdpa")
    with user_error(
        r"--model_config own\.json: no model .*Gemma2ForCausalLM does not support"
    ):
        load.make_model(config, "--model_config own.json")


def test_no_layer_is_replaced_by_code_of_the_hub(user, monkeypatch):
    monkeypatch.delenv("USE_HUB_KERNELS")
    asked = []
    monkeypatch.setattr(
        PreTrainedModel, "set_use_kernels", lambda _, use, *more: asked.append(use)
    )
    load.load_model(user.model, torch.float32)
    load_of_trainer(user.model)
    assert asked == [False, False]


def test_every_call_that_loads_a_model_says_whether_it_uses_kernels():
    root = Path(__file__).parents[2]
    loads = 0
    for path in (*(root / "mora_ds").rglob("*.py"), *(root / "tools").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            if ast.unparse(node.func) == "AutoModelForCausalLM.from_pretrained":
                assert "use_kernels" in {keyword.arg for keyword in node.keywords}, path
                loads += 1
    assert loads >= 8


def test_a_mistyped_path_is_no_name_of_the_hub():
    with user_error(
        r"--model_name_or_path \./no/such/model: no such folder, and not a valid name"
    ):
        load.named_config("./no/such/model")


# -- pickled weights -------------------------------------------------------------------


def pickled(folder, dtype, shards=1, zipped=True):
    """A folder with pickled weights only. Returns them."""
    model = tiny_model(dtype=dtype)
    model.config.save_pretrained(folder)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weight_map = {}
    for shard in range(shards):
        number = f"-{shard + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        file = f"pytorch_model{number}.bin"
        shard_weights = {key: weights[key] for key in sorted(weights)[shard::shards]}
        torch.save(shard_weights, folder / file, _use_new_zipfile_serialization=zipped)
        weight_map |= dict.fromkeys(shard_weights, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        write_json_atomic(folder / "pytorch_model.bin.index.json", index)
    return weights


@pytest.fixture
def own_base(tmp_path):
    """The run's own base, which is not there yet."""
    return tmp_path / "own"


def originals(folder, own_base, dtype):
    """The live model, and the tensors of the run's own base."""

    def loaded(dtype):
        return load.load_model(folder, dtype)

    model = loaded(dtype)
    keys = load.original_tensors(model, folder, own_base, dtype, loaded, "pickled")
    assert keys.keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
    return model, load_file(own_base / "model.safetensors")


PRECISIONS = """
float32 | bfloat16 | float32
float32 | float16 | float32
float32 | float32 | float32
float16 | bfloat16 | float16
bfloat16 | bfloat16 | bfloat16
bfloat16 | float32 | float32
"""
"""Precision of the pickled weights | of the run | of the base that it writes."""


@each_row("stored, dtype, of_base", PRECISIONS)
@pytest.mark.parametrize("shards, zipped", [(1, True), (2, False)])
def test_a_run_keeps_the_precision_of_pickled_weights(
    own_base, model_folder, stored, dtype, of_base, shards, zipped
):
    precision = getattr(torch, of_base)
    weights = pickled(model_folder, getattr(torch, stored), shards, zipped)
    folders = (model_folder, own_base)
    model, base_tensors = originals(*folders, getattr(torch, dtype))
    for name, tensor in base_tensors.items():
        assert tensor.dtype is precision, name
        assert torch.equal(tensor, weights[name].to(precision)), name
    assert model.dtype is getattr(torch, dtype)


def test_a_resumed_run_reads_the_base_that_it_has(own_base, model_folder):
    """Whatever its precision, as its fingerprint is in every checkpoint."""
    pickled(model_folder, torch.float32)
    write_own_base(load.load_model(model_folder, torch.bfloat16), own_base)
    before = (own_base / "model.safetensors").stat()
    _, base_tensors = originals(model_folder, own_base, torch.bfloat16)
    after = (own_base / "model.safetensors").stat()
    assert {tensor.dtype for tensor in base_tensors.values()} == {torch.bfloat16}
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_the_base_of_another_model_is_replaced(own_base, model_folder):
    weights = pickled(model_folder, torch.float32)
    write_own_base(tiny_model(seed=5), own_base)
    _, base_tensors = originals(model_folder, own_base, torch.bfloat16)
    assert_same_tensors(base_tensors, weights)


def test_a_base_is_not_written_over_the_files_that_are_read(tmp_path):
    with user_error(
        "only pickled; the run would write its base to the same folder: move the model"
    ):
        load.original_tensors(
            None, tmp_path, tmp_path, torch.float32, None, "only pickled"
        )


def test_precision_that_cannot_be_kept_is_said(own_base, model_folder, caplog):
    pickled(model_folder, torch.float32)
    model = load.load_model(model_folder, torch.bfloat16)
    with torch.no_grad():
        # As where weights are computed, not copied, when they are loaded
        next(model.parameters()).add_(1)
    load.original_tensors(
        model,
        model_folder,
        own_base,
        torch.bfloat16,
        lambda dtype: AutoModelForCausalLM.from_pretrained(model_folder),
        "pickled",
    )
    assert "are float32, but the run's base is saved in bfloat16" in caplog.text
