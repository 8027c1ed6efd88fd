"""MoRA as a method of PEFT: the numbers of mora_ds's own layers, through PEFT's own
functions.
"""

import json

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM

import mora_ds
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.ops.spec import OperatorKind
from mora_ds.common.files import read_json
from mora_ds.peft import PEFT_TYPE, MoraConfig
from tests.helpers.errors import user_error
from tests.helpers.gloo import run_ranks
from tests.helpers.models import causal_loss, tiny_model, tokens
from tests.helpers.peft import IDS, fill, layers, logits
from tests.helpers.tables import each_row, parsed


def trained_names(model):
    return {name for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("operator", [kind.value for kind in OperatorKind])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_and_gradients_equal_those_of_mora_layers(family, operator):
    ours = tiny_model(family)
    theirs = tiny_model(family)
    inject(ours, mora_ds.MoRAConfig(rank=4, operator=operator))
    theirs = get_peft_model(theirs, MoraConfig(r=4, operator=operator))
    fill(theirs)
    mora_matrices = {
        name: layer.mora_matrix["default"] for name, layer in layers(theirs).items()
    }
    assert mora_matrices.keys() == mora_layers(ours).keys()
    for name, layer in mora_layers(ours).items():
        layer.mora_matrix.data = mora_matrices[name].detach().clone()
    for model in (ours, theirs):
        causal_loss(model, IDS).backward()
    assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-5)
    for name, layer in mora_layers(ours).items():
        assert_close(
            mora_matrices[name].grad, layer.mora_matrix.grad, rtol=1e-4, atol=1e-6
        )
    names = trained_names(theirs)
    assert len(names) == len(mora_matrices)
    assert all("mora_matrix.default" in name for name in names)


def test_an_adapter_is_saved_and_loaded(tmp_path):
    config = MoraConfig(r=4, target_modules=["q_proj", "down_proj"], seed=7)
    model = get_peft_model(tiny_model(), config)
    fill(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert read_json(tmp_path / "adapter_config.json")["peft_type"] == PEFT_TYPE
    for how in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, **how)
        assert torch.equal(logits(loaded), expected)
        assert len(layers(loaded)) == 4, "two layers of two modules each"
        assert bool(trained_names(loaded)) == ("is_trainable" in how)


@pytest.fixture
def saved(tmp_path):
    """(base, adapter, logits): folders of a model and of an adapter, and what it
    computes with that adapter."""
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = MoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(model, config)
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter", logits(model)


def test_transformers_loads_an_adapter(saved):
    base, adapter, expected = saved
    assert PeftConfig.from_pretrained(adapter).peft_type is PeftType(PEFT_TYPE)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(adapter))
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(adapter)), expected)


def test_an_adapter_keeps_its_permutations_where_modules_have_other_names(saved):
    """`AutoModel` has no prefix `model.`, from which other permutations would be
    drawn."""
    base, adapter, expected = saved
    head = AutoModelForCausalLM.from_pretrained(base).lm_head
    for load in (
        lambda model: PeftModel.from_pretrained(
            model, adapter, key_mapping={r"^model\.": ""}, adapter_name="other"
        ),
        lambda model: model.load_adapter(
            peft_config=PeftConfig.from_pretrained(adapter),
            adapter_state_dict={
                key.removeprefix("base_model.model.model."): tensor
                for key, tensor in load_file(
                    adapter / "adapter_model.safetensors"
                ).items()
            },
        ),
    ):
        model = AutoModel.from_pretrained(base)
        loaded = load(model)
        model = loaded if isinstance(loaded, PeftModel) else model
        with torch.no_grad():
            hidden = model.eval()(input_ids=IDS)[0]
        assert torch.equal(head(hidden), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_keeps_the_model(family, dtype):
    model = get_peft_model(tiny_model(family, dtype=dtype), MoraConfig(r=4))
    fill(model)
    expected = logits(model)
    tolerance = 1e-5 if dtype is torch.float32 else 5e-2
    model.merge_adapter()
    assert_close(logits(model), expected, rtol=0, atol=tolerance)
    model.unmerge_adapter()
    assert_close(logits(model), expected, rtol=0, atol=tolerance)
    merged = model.merge_and_unload(safe_merge=True)
    assert not layers(merged)
    assert type(merged) is type(tiny_model(family))
    assert_close(logits(merged), expected, rtol=0, atol=tolerance)


def test_a_merge_is_summed_in_fp32_and_can_be_refused():
    """Updates below the rounding of bf16 add up, whatever their number; NaN leaves the
    weight as it was.
    """
    base = tiny_model(dtype=torch.bfloat16)
    model = get_peft_model(base, MoraConfig(r=4), adapter_name="a0")
    names = ["a0", "a1", "a2", "a3"]
    for name in names[1:]:
        model.add_adapter(name, MoraConfig(r=4))
    layer = next(iter(layers(model).values()))
    before = layer.base_layer.weight.detach().clone()
    for adapter in names:
        layer.mora_matrix[adapter].data.fill_(2e-5)
    wanted = before.float() + sum(layer.get_delta_weight(adapter) for adapter in names)
    layer.merge(adapter_names=names)
    assert layer.merged_adapters == names
    assert torch.equal(layer.base_layer.weight, wanted.bfloat16())
    assert not torch.equal(layer.base_layer.weight, before)
    layer.unmerge()
    before = layer.base_layer.weight.detach().clone()
    layer.mora_matrix["a1"].data[0, 0] = torch.nan
    with user_error("The adapter a1 seems to be broken"):
        layer.merge(safe_merge=True, adapter_names=["a1"])
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged_adapters
    # Finite in fp32, but beyond fp16
    layer.half()
    layer.mora_matrix["a1"].data.fill_(60_000)
    layer.base_layer.weight.data.fill_(60_000)
    with user_error("The adapter a1 seems to be broken"):
        layer.merge(safe_merge=True, adapter_names=["a1"])
    assert layer.base_layer.weight.isfinite().all()
    assert layer.bfloat16().get_delta_weight("a0").dtype == torch.float32


def test_a_merge_into_fp64_keeps_its_bits():
    model = get_peft_model(tiny_model(dtype=torch.float64), MoraConfig(r=4))
    layer = next(iter(layers(model).values()))
    before = layer.base_layer.weight.detach().clone()
    layer.merge()
    assert torch.equal(layer.base_layer.weight, before)


def test_a_config_means_what_it_does_in_a_run():
    settings = {
        "r_hat_multiple": 2,
        "operator": "share",
        "grouping": "strided",
        "seed": 7,
    }
    ours = mora_ds.MoRAConfig(rank=4, dropout=0.25, **settings)
    assert MoraConfig(r=4, mora_dropout=0.25, **settings).adapter() == ours
    model = get_peft_model(tiny_model(), MoraConfig(r=4, cycle=2, mora_dropout=0.5))
    fill(model)
    (name, layer), *_ = layers(model).items()
    spec = mora_ds.MoRAConfig(rank=4).operator_for(name, 32, 32, 2)
    assert layer.mora_spec["default"] == spec
    x = torch.ones(3, 32)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x)), "dropout"


def test_a_merged_adapter_is_taken_out_where_adapters_are_disabled():
    model = get_peft_model(tiny_model(), MoraConfig(r=4))
    base = logits(tiny_model())
    fill(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert_close(logits(model), base, rtol=0, atol=1e-5)
        assert not any(layer.merged for layer in layers(model).values())


def test_several_adapters_are_chosen_by_name(tmp_path):
    base = logits(tiny_model())
    model = get_peft_model(tiny_model(), MoraConfig(r=4), adapter_name="law")
    model.add_adapter("physics", MoraConfig(r=8, operator="share"))
    for seed, name in enumerate(("law", "physics"), 1):
        fill(model, name, seed)
    model.set_adapter("law")
    law = logits(model)
    model.set_adapter("physics")
    physics = logits(model)
    assert not torch.equal(law, physics)
    assert {name.split(".")[-1] for name in trained_names(model)} == {"physics"}
    with user_error(
        "adapter_names: all sequences of a batch use the same MoRA adapters"
    ):
        model(input_ids=IDS, adapter_names=["law", "physics", "law"])
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.set_adapter("physics")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_model(), tmp_path / "law", adapter_name="law"
    )
    loaded.load_adapter(str(tmp_path / "physics"), "physics")
    assert torch.equal(logits(loaded), law)
    loaded.set_adapter("physics")
    assert torch.equal(logits(loaded), physics)
    loaded.delete_adapter("law")
    assert torch.equal(logits(loaded), physics)
    for layer in layers(loaded).values():
        for of_adapters in (layer.mora_spec, layer.mora_dropout, layer.mora_matrix):
            assert [*of_adapters] == ["physics"]


def test_a_further_adapter_is_trained_once_it_is_chosen():
    """Whether its modules have an adapter already, or not."""

    def trained_modules():
        return {name.split(".")[-3] + name[-2:] for name in trained_names(model)}

    queries = MoraConfig(r=4, target_modules=["q_proj"])
    model = get_peft_model(tiny_model(), queries, adapter_name="x")
    model.add_adapter("y", MoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    assert trained_modules() == {"q_proj.x"}
    model.set_adapter("y")
    assert trained_modules() == {"q_proj.y", "down_proj.y"}
    for layer in layers(model).values():
        for name, mora_matrix in layer.mora_matrix.items():
            mora_matrix.data.fill_({"x": 0.01, "y": 0.02}[name])
    model.base_model.set_adapter(["x", "y"])
    both = logits(model)
    model.merge_adapter()
    assert_close(logits(model), both, rtol=0, atol=1e-5)


TYPES = """
{r: "8"} | r must be a whole number, got '8'
{r: 2.5} | r must be a whole number, got 2.5
{mora_dropout: null} | mora_dropout must be a number, got None
{seed: null} | seed must be a whole number, got None
{cycle: "1"} | cycle must be a whole number, got '1'
{cycle: -1} | cycle must be at least 0
"""


@each_row("settings, message", TYPES)
def test_values_of_another_type_are_named(tmp_path, settings, message):
    """Also settings of adapter_config.json, with which its matrices would be read under
    other permutations, or not at all."""
    get_peft_model(tiny_model(), MoraConfig(r=4)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**read_json(path), **parsed(settings)}))
    with user_error(message):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


def test_every_rank_of_a_pattern_is_checked_once():
    """Without trying patterns on each other: a file may have any number of them."""
    MoraConfig(rank_pattern={f"m{number}": 4 for number in range(10_000)})
    with user_error("`rank` must be at least 1, got 0"):
        MoraConfig(rank_pattern={"^model.*q_proj": 0})


def test_an_adapter_without_seeds_is_refused(saved):
    """One of 0.3: its permutations would depend on the names of modules."""
    _, adapter, _ = saved
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**read_json(path), "mora_format": None}))
    with user_error("mora_ds 0.3 saved this adapter"):
        PeftModel.from_pretrained(tiny_model(), adapter)


def test_wrong_settings_are_named():
    with user_error("`layers_to_transform` has no effect"):
        MoraConfig(layers_to_transform=[0])
    with user_error("`layers_pattern` needs `layers_to_transform`"):
        MoraConfig(target_modules=["q_proj"], layers_pattern="layers")
    with user_error("rank"):
        MoraConfig(r=0)
    with user_error("embed_tokens"):
        get_peft_model(tiny_model(), MoraConfig(target_modules=["embed_tokens"]))
    model = tiny_model()
    in_bytes = model.lm_head.weight.to(torch.int8)
    model.lm_head.weight = torch.nn.Parameter(in_bytes, requires_grad=False)
    with user_error("Conv1D with floating-point weights"):
        get_peft_model(model, MoraConfig(target_modules=["lm_head"]))
    with user_error("MoRA adapts"):
        model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
        get_peft_model(model, MoraConfig(target_modules=["q_proj"]))


def trained(world):
    """Three steps over the same six rows, however many processes share them."""
    model = get_peft_model(tiny_model(), MoraConfig(r=4))
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4
    )
    rank = dist.get_rank() if world > 1 else 0
    for step in range(3):
        rows = tokens(6, seed=step)[rank * (6 // world) :][: 6 // world]
        causal_loss(wrapped, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    mora_matrices = [layer.mora_matrix["default"] for layer in layers(model).values()]
    return [mora_matrix.detach() for mora_matrix in mora_matrices]


def test_two_processes_under_ddp_train_as_one():
    expected = trained(1)
    for mora_matrices in run_ranks(2, trained, 2):
        assert_close(mora_matrices, expected, rtol=0, atol=1e-6)
