"""Bases in FP8 and MXFP4: a run on one is that on the model which transformers dequantizes,
to the bit.
"""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from mora_ds.common.files import read_json, write_json_atomic
from mora_ds.deploy.export import export_merged
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.dequantize import dequantize_fp8
from mora_ds.models.load import local_folder, resolve_folder
from tests.helpers.errors import user_error
from tests.helpers.jobs import VOCABULARY, losses, run, validation_errors_of
from tests.helpers.models import alone, tiny_model
from tests.helpers.resume import MERGING, assert_same_tensors

FP8 = {
    "quant_method": "fp8",
    "weight_block_size": [16, 16],
    "activation_scheme": "dynamic",
}
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
}
FAMILIES = {"fp8": "qwen3", "mxfp4": "gpt_oss"}
SIZES = {"vocab_size": VOCABULARY, "intermediate_size": 64}


def to_fp8(name, weight):
    """The tensors of this weight, quantized by transformers' own quantizer."""
    quantizer = SimpleNamespace(
        quantization_config=FineGrainedFP8Config(weight_block_size=(16, 16))
    )
    return (
        Fp8Quantize(quantizer).convert({name: weight})
        if "proj" in name
        else {name: weight}
    )


def to_mxfp4(name, weight):
    """Any bytes are numbers in MXFP4; transformers' quantizer needs kernels for a GPU."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: weight}
    experts, inputs, outputs = weight.shape
    generator = torch.Generator().manual_seed(len(name))
    blocks = torch.randint(
        0,
        256,
        (experts, outputs, inputs // 32, 16),
        dtype=torch.uint8,
        generator=generator,
    )
    scales = torch.randint(
        116,
        122,
        (experts, outputs, inputs // 32),
        dtype=torch.uint8,
        generator=generator,
    )
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


def quantized_model(kind, folder, dtype=torch.float32):
    """A tiny model as it is published in `folder`. Returns the tensors of its file."""
    tiny_model(FAMILIES[kind], dtype=dtype, **SIZES).save_pretrained(folder)
    convert, settings = {"fp8": (to_fp8, FP8), "mxfp4": (to_mxfp4, MXFP4)}[kind]
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        tensors.update(convert(name, weight))
    write(folder, tensors, settings)
    return tensors


def write(folder, tensors, settings):
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {**read_json(folder / "config.json"), "quantization_config": settings}
    write_json_atomic(folder / "config.json", config)


def dequantized_by_transformers(kind, folder, target, dtype):
    """A plain model folder with the weights that transformers makes of those in
    `folder`.
    """
    settings = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}[kind](
        dequantize=True
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=settings
    )
    model = tiny_model(FAMILIES[kind], dtype=dtype, **SIZES)
    model.load_state_dict(theirs.state_dict())
    model.save_pretrained(target)


@pytest.mark.parametrize(
    "kind, dtype", [("fp8", torch.float32), ("mxfp4", torch.bfloat16)]
)
def test_a_run_is_that_on_the_model_that_transformers_dequantizes(
    user, tmp_path, kind, dtype
):
    """The run has two merges; its export is verified and no longer quantized."""
    quantized_model(kind, tmp_path / "quantized", dtype)
    dequantized_by_transformers(kind, tmp_path / "quantized", tmp_path / "plain", dtype)
    ours = tmp_path / "of-quantized"
    theirs = tmp_path / "of-plain"
    for name, out in (("quantized", ours), ("plain", theirs)):
        more = f"{MERGING} --bf16 {dtype is torch.bfloat16} --export_merged true"
        files = flags_of(tmp_path / name, user.model)
        assert run(1, user.flags(out, more, *files))["merges"] == 2
    assert torch.equal(losses(ours), losses(theirs))
    weights, expected = (
        load_file(out / "merged/model.safetensors") for out in (ours, theirs)
    )
    assert_same_tensors(weights, expected)
    assert "quantization_config" not in read_json(ours / "merged/config.json")
    export_merged(ours, tmp_path / "verified", verify=True)


def flags_of(model, tokenizer):
    return "--model_name_or_path", model, "--tokenizer_name", tokenizer


def test_a_resumed_run_keeps_the_base_that_it_has_made_unless_the_files_are_others(
    user, model_folder, out
):
    tensors = quantized_model("fp8", model_folder)
    files = flags_of(model_folder, user.model)
    flags = user.flags(out, *files, "--max_steps 2 --resume_from_checkpoint auto")
    run(1, flags)
    weights = out / "base/model.safetensors"
    before = weights.stat().st_ino
    run(2, [*flags, "--max_steps", "3", "--per_device_train_batch_size", "1"])
    assert weights.stat().st_ino == before
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    write(model_folder, {**tensors, name: tensors[name] * 2}, FP8)
    assert "weights of --model_name_or_path" in validation_errors_of(
        [*flags, "--max_steps", "4"]
    )
    assert BaseCheckpoint.open(out / "base").dtypes() == {torch.float32}


def test_blocks_at_the_edge_may_be_smaller():
    """DeepSeek-V3 has 576 rows in blocks of 128, which transformers does not
    dequantize."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2, generator=generator)
    expected = [
        [
            weight[row, column].float() * scales[row // 2, column // 4]
            for column in range(7)
        ]
        for row in range(5)
    ]
    assert torch.equal(
        dequantize_fp8(weight, scales, [2, 4], torch.float32), torch.tensor(expected)
    )


UP = "model.layers.1.mlp.up_proj.weight"
SCALES = f"{UP}_scale_inv"


def without_scales(tensors):
    del tensors[SCALES]


def with_short_scales(tensors):
    tensors[SCALES] = tensors[SCALES][:-1].contiguous()


def with_scales_in_bytes(tensors):
    """Exponents, as MXFP8 has them."""
    tensors[SCALES] = torch.full_like(tensors[SCALES], 127).to(torch.uint8)


def with_another_float8(tensors):
    tensors[UP] = tensors[UP].float().to(torch.float8_e5m2)


@pytest.mark.parametrize(
    "damage",
    [without_scales, with_short_scales, with_scales_in_bytes, with_another_float8],
)
def test_scales_that_do_not_fit_are_named(user, model_folder, out, damage):
    tensors = quantized_model("fp8", model_folder)
    damage(tensors)
    write(model_folder, tensors, FP8)
    message = validation_errors_of(user.flags(out, *flags_of(model_folder, user.model)))
    words = f"has no {SCALES} of shape (4, 2)"
    if damage is with_another_float8:
        words = f"{UP} is torch.float8_e5m2 without block scales"
    assert words in message


def test_gguf_is_named(tmp_path):
    (tmp_path / "model-Q4_K_M.gguf").touch()
    for name in (tmp_path, tmp_path / "model-Q4_K_M.gguf"):
        with user_error("GGUF is not supported: give the unquantized model"):
            resolve_folder(str(name), alone())
    (tmp_path / "config.json").write_text("{}")
    assert local_folder(str(tmp_path)) == tmp_path, "a model next to it"
