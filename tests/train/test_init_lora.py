"""--adapter lora --init_adapter: a run starts from a LoRA adapter of PEFT, as PEFT's own model computes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mora_ds.adapters.config import LoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.common.errors import UserError
from mora_ds.deploy.export import export_merged
from mora_ds.deploy.peft_export import CONFIG_FILE, FINGERPRINT, WEIGHTS_FILE
from mora_ds.train.init_lora import InitialLoRA
from tests.helpers.jobs import Playground, refusal, run
from tests.helpers.models import tokens

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write(base: Path, folder: Path, **settings: Any) -> None:
    """An adapter by PEFT itself, whose factors are all random."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{"target_modules": LINEAR, **settings})
    )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)


def flags(user: Playground, out: Path, adapter: Path, *more: str | int) -> list[str]:
    own = ("--adapter", "lora", "--init_adapter", adapter, "--mora_rank", 3, "--max_steps", 1, "--warmup_steps", 0)
    return user.flags(out, *map(str, own), *map(str, more))


@torch.inference_mode()
def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=tokens(2, 24), use_cache=False).logits


@pytest.mark.gloo
def test_a_sharded_run_starts_where_peft_ended(user: Playground, tmp_path: Path) -> None:
    """One step with a vanishing learning rate: what is exported is the adapter that the run began with."""
    write(user.model, tmp_path / "lora", r=3, lora_alpha=7, alpha_pattern={"layers.1.mlp.up_proj": 2})
    run(2, flags(user, tmp_path / "out", tmp_path / "lora", "--learning_rate", "1e-30", "--no_eval_on_start"))
    export_merged(tmp_path / "out", tmp_path / "merged")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(user.model), tmp_path / "lora")
    ours = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (ours - logits_of(theirs)).abs().max() <= 1e-5 * ours.abs().max()
    assert (ours - logits_of(AutoModelForCausalLM.from_pretrained(user.model))).abs().max() > 1e-2


def test_the_scaling_is_peft_s(user: Playground, tmp_path: Path) -> None:
    write(user.model, tmp_path / "lora", r=4, lora_alpha=6, use_rslora=True)
    model = AutoModelForCausalLM.from_pretrained(user.model)
    inject(model, LoRAConfig(rank=4, alpha=1.0))
    for name, value in InitialLoRA.open(tmp_path / "lora", model, "any").values.items():
        mora_layers(model)[name].value.data.copy_(value)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(user.model), tmp_path / "lora")
    assert (logits_of(model) - logits_of(theirs)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("rank", "settings", "message"),
    [
        (3, {"r": 4}, "--mora_rank 4"),
        (4, {"r": 4, "target_modules": ["q_proj"]}, r"\(--target_modules\), e.g. model.layers.0.mlp.down_proj"),
        (4, {"r": 4, "use_dora": True}, "lora_magnitude_vector"),
        (4, {"r": 4, "modules_to_save": ["norm"]}, "norm.weight"),
        (4, {"r": 4, "alpha_pattern": {"layers.(0|1).*": 2}}, "alpha_pattern"),
    ],
)
def test_what_does_not_fit_is_named(
    user: Playground, tmp_path: Path, rank: int, settings: dict[str, Any], message: str
) -> None:
    write(user.model, tmp_path / "lora", **settings)
    model = AutoModelForCausalLM.from_pretrained(user.model)
    inject(model, LoRAConfig(rank=rank))
    with pytest.raises(UserError, match=f"--init_adapter .*{message}"):
        InitialLoRA.open(tmp_path / "lora", model, "any")


def test_files_that_were_changed_are_refused(user: Playground, tmp_path: Path) -> None:
    write(user.model, tmp_path / "lora", r=3)
    model = AutoModelForCausalLM.from_pretrained(user.model)
    inject(model, LoRAConfig(rank=3))
    tensors = load_file(tmp_path / "lora" / WEIGHTS_FILE)

    def refused(name: str, message: str, change: Any) -> None:
        folder = tmp_path / name
        shutil.copytree(tmp_path / "lora", folder)
        change(folder)
        with pytest.raises(UserError, match=message):
            InitialLoRA.open(folder, model, "own")

    first = next(iter(tensors))
    bad = {**tensors, first: torch.full_like(tensors[first], float("nan"))}
    wide = {**tensors, first: torch.zeros(3, 5)}
    kind = json.dumps({"peft_type": "VERA"})
    refused("nan", "not finite", lambda folder: save_file(bad, folder / WEIGHTS_FILE))
    refused("wide", "for another base", lambda folder: save_file(wide, folder / WEIGHTS_FILE))
    refused("base", "another base", lambda folder: save_file(tensors, folder / WEIGHTS_FILE, {FINGERPRINT: "other"}))
    refused("half", "holds no", lambda folder: save_file(dict(list(tensors.items())[1:]), folder / WEIGHTS_FILE))
    refused("kind", "'VERA'", lambda folder: (folder / CONFIG_FILE).write_text(kind))
    refused("gone", "no adapter_config.json|no folder", lambda folder: (folder / CONFIG_FILE).unlink())
    refused("pickled", "is missing", lambda folder: (folder / WEIGHTS_FILE).unlink())


def test_a_run_refuses_before_the_model_is_loaded(user: Playground, tmp_path: Path) -> None:
    assert "has no adapter_config.json" in refusal(flags(user, tmp_path / "out", tmp_path / "nowhere"))
