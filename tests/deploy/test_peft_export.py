"""A checkpoint as PEFT's LoRA adapter: PEFT loads it, and on the base it is the merged
model.
"""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mora_ds.adapters import config
from mora_ds.adapters.config import MoRAConfig
from mora_ds.common.files import read_json
from mora_ds.deploy.peft_export import CONFIG_FILE, export_peft
from tests.helpers.adapters import Maker, merge, originals, summed
from tests.helpers.errors import user_error
from tests.helpers.exports import fake_run
from tests.helpers.models import tiny_model, tokens
from tests.helpers.tables import each_row, parsed


@torch.inference_mode()
def logits_of(model):
    return model.eval()(input_ids=tokens(2, 24), use_cache=False).logits


@pytest.fixture
def lora_folder(tmp_path):
    """The folder of the PEFT adapter."""
    return tmp_path / "lora"


def loaded(base, adapter):
    """PEFT's model, all of whose tensors came from the files."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), adapter
    )
    assert any("lora_A" in name for name, _ in model.named_parameters())
    return model


def close(one, another):
    assert (one - another).abs().max() <= 1e-5 * max(1.0, another.abs().max().item())


def adapter(folder, wanted, cycles, family="llama"):
    """The base, with the adapter at `folder`/adapter merged into it, and the updates."""
    model = tiny_model(family)
    maker = Maker(model, folder / "base")
    updates = maker.write(folder / "adapter", wanted, cycles)
    merge(model, originals(model), updates)
    return model, updates


EXACT = """
LoRAConfig | {rank: 3} | 0 | llama
LoRAConfig | {rank: 3, alpha: 5.0} | 2 | llama
MoRAConfig | {rank: 1, operator: share} | 1 | llama
MoRAConfig | {rank: 1, operator: share, grouping: alternate} | 1 | gpt2
MoRAConfig | {rank: 1, operator: truncate} | 0 | llama
# next to layers that PEFT takes for experts
LoRAConfig | {rank: 2, target_modules: [o_proj]} | 0 | deepseek_v3
# more ranks than the shorter side has
MoRAConfig | {rank: 2, operator: share} | 9 | llama
"""
"""A kind of adapter | its settings | merged cycles | a family."""


@each_row("kind, settings, cycles, family", EXACT)
def test_an_exact_adapter_is_the_merged_model(
    tmp_path, lora_folder, base_folder, kind, settings, cycles, family
):
    wanted = getattr(config, kind)(**parsed(settings))
    merged, updates = adapter(tmp_path, wanted, int(cycles), family)
    lines = export_peft(tmp_path / "adapter", lora_folder)
    assert any(line.startswith("exact") for line in lines), lines
    model = loaded(base_folder, lora_folder)
    close(logits_of(model), logits_of(merged))
    close(logits_of(model.merge_and_unload()), logits_of(merged))
    ranks = read_json(lora_folder / CONFIG_FILE)
    name, terms = next(iter(updates.items()))
    side = min(terms[0][0].d_in, terms[0][0].d_out)
    total = sum(spec.rank if hasattr(spec, "rank") else spec.r_hat for spec, _ in terms)
    assert ranks["rank_pattern"].get(name, ranks["r"]) == min(side, total)


@pytest.mark.parametrize("names", ["all-linear", "down_proj", "gate_proj"])
def test_layers_that_peft_would_leave_out_are_refused(tmp_path, lora_folder, names):
    """deepseek_v3 has a dense MLP and shared experts, named as experts once were."""
    wanted = config.LoRAConfig(rank=2, target_modules=[names])
    adapter(tmp_path, wanted, 0, "deepseek_v3")
    with user_error(r"PEFT would not load .*mora-ds export"):
        export_peft(tmp_path / "adapter", lora_folder)
    assert not lora_folder.exists()


@pytest.mark.parametrize("operator", ["rotate", "decouple"])
def test_a_rank_keeps_the_leading_directions(
    tmp_path, lora_folder, base_folder, operator
):
    rank = 5
    _, updates = adapter(tmp_path, MoRAConfig(rank=2, operator=operator), cycles=1)
    lines = export_peft(tmp_path / "adapter", lora_folder, rank)
    best = AutoModelForCausalLM.from_pretrained(base_folder)
    shares = {}
    for name, terms in updates.items():
        delta = summed(
            torch.zeros(terms[0][0].d_out, terms[0][0].d_in),
            terms,
            False,
            torch.float32,
        )
        left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
        leading = (left[:, :rank] * values[:rank]) @ right[:rank]
        best.get_submodule(name).weight.data += leading.float()
        shares[name] = (values[rank:].square().sum() / values.square().sum()).item()
    close(logits_of(loaded(base_folder, lora_folder)), logits_of(best))
    assert min(shares.values()) > 0.01
    for name, share in shares.items():
        assert f"  {name}: {share:.2%}" in lines
    assert f"{sum(shares.values()) / len(shares):.2%} on average" in "\n".join(lines)


TRAINED = """
llama | [model.embed_tokens.weight, model.norm.weight, lm_head.weight] | 3
llama | [model.layers.1.input_layernorm.weight] | 1
# the head is tied; ln_f has a bias
gpt2 | [transformer.wte.weight, transformer.ln_f.weight] | 3
"""
"""A family | what is trained | modules to save."""


@each_row("family, trained, saved", TRAINED)
def test_other_trained_tensors_are_modules_to_save(
    tmp_path, lora_folder, family, trained, saved
):
    """In addition to matrices of every rank; at the rank of a layer's shorter side nothing
    is lost."""
    run = fake_run(tmp_path, family, trained=parsed(trained))
    lines = export_peft(run.output, lora_folder, 10_000)
    assert any("modules_to_save" in line for line in lines)
    modules = read_json(lora_folder / CONFIG_FILE)["modules_to_save"]
    assert len(modules) == int(saved)
    close(logits_of(loaded(run.base, lora_folder)), logits_of(run.live))


def test_the_domain_that_is_named_is_written(tmp_path, base_folder):
    """Each has the shared matrices once more, so that its update is twice theirs."""
    maker = Maker(tiny_model("llama", num_hidden_layers=1), base_folder)
    maker.write(
        tmp_path / "adapter",
        MoRAConfig(rank=1, operator="share"),
        domains=("law", "code"),
    )
    updates = {}
    for domain in ("shared", "code"):
        export_peft(tmp_path / "adapter", tmp_path / domain, domain=domain)
        model = loaded(base_folder, tmp_path / domain).merge_and_unload()
        name = "model.layers.0.mlp.up_proj.weight"
        updates[domain] = model.get_parameter(name).data - maker.weights[name]
    assert updates["shared"].abs().max() > 1e-3
    torch.testing.assert_close(
        updates["code"], 2 * updates["shared"], rtol=0, atol=1e-6
    )
    assert read_json(tmp_path / "code" / CONFIG_FILE)["base_model_name_or_path"] == str(
        base_folder
    )
