"""PEFT's own tests, run on MoRA with LoRA next to it.

They come from the source distribution of the installed PEFT, which pip downloads. Each
table of theirs that lists methods lists these two instead. Models of the Hub are tiny
ones, with random weights, in a cache that this module fills.

    python -m pytest -p tests.helpers.peft_suite FOLDER/peft_suite/test_decoder_models.py
"""

import importlib
import shutil
import subprocess
import sys
import tarfile
import types
from importlib.metadata import version

import torch
import transformers
from peft import LoraConfig

from mora_ds.peft import MoraConfig

MODULES = {
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
    "test_seq_classifier": "SEQ_CLS",
    "test_custom_models": None,
}
"""PEFT's modules that try every method, and the type of their tasks."""

MLPS = (
    {"target_modules": "lin0"},
    {"target_modules": ["lin0"]},
    {"target_modules": ["lin1"]},
    {"target_modules": ["lin0", "lin1"]},
    {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
)
"""Settings of both methods for the models of test_custom_models."""

SMALL = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
LLAMA = {**SMALL, "num_key_value_heads": 2}
GPT = {
    "vocab_size": 1024,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        {**GPT, "rotary_dim": 4},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        {**LLAMA, "head_dim": 8},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        {
            "vocab_size": 1024,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
        },
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        {"vocab_size": 1024, "d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4},
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", SMALL),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", SMALL),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", SMALL),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", SMALL),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        SMALL,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        SMALL,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        LLAMA,
    ),
}
"""Name on the Hub -> class and config of the model that takes its place."""


def download(folder):
    """Unpack PEFT's tests into the package `folder`/peft_suite."""
    sdist = f"peft=={version('peft')}"
    command = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
    source_only = ("--no-binary", ":all:", "--no-build-isolation", "--dest", folder)
    subprocess.run([*command, *source_only, sdist], check=True)
    (archive,) = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (unpacked,) = folder.glob("peft-*/tests")
    shutil.copytree(unpacked, folder / "peft_suite")
    (folder / "peft_suite" / "__init__.py").touch()


def fill_cache(cache):
    """Write the models as `huggingface_hub` keeps downloaded ones."""
    revision = "0" * 40
    for name, (model_class, settings) in MODELS.items():
        model_class = getattr(transformers, model_class)
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**settings))
        folder = cache / f"models--{name.replace('/', '--')}"
        model.save_pretrained(folder / "snapshots" / revision)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(revision)


def pytest_sessionstart(session):
    """Replace PEFT's tables of methods before the tests are collected."""
    (folder,) = {path.rpartition("/peft_suite/")[0] for path in session.config.args}
    sys.path.insert(0, folder)
    # PEFT's helpers import it for models of images, which these modules do not have.
    diffusers = types.ModuleType("diffusers")
    diffusers.StableDiffusionPipeline = None
    sys.modules.setdefault("diffusers", diffusers)
    for name, task in MODULES.items():
        module = importlib.import_module(f"peft_suite.{name}")
        if task is None:
            module.TEST_CASES[:] = [
                (f"MLP {number}", "MLP", config, settings)
                for number, settings in enumerate(MLPS)
                for config in (MoraConfig, LoraConfig)
            ]
            continue
        module.ALL_CONFIGS[:] = [
            (MoraConfig, {"task_type": task, "r": 8}),
            (LoraConfig, {"task_type": task, "r": 8}),
        ]
