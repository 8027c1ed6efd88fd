"""What PEFT, transformers and torch expect of a tuner."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import register_peft_method
from torch.testing import assert_close

from mora_ds.adapters.ops.index_tables import tables_of
from mora_ds.peft import MoraConfig, MoraModel, convert_to_lora
from tests.helpers.errors import user_error
from tests.helpers.models import causal_loss, tiny_model
from tests.helpers.operators import specs_of_tables
from tests.helpers.peft import IDS, fill, layers, logits
from tests.helpers.tables import heavy


@pytest.mark.parametrize(
    "operator, backend",
    [
        ("rotate", "aot_eager"),
        heavy("rotate", "inductor"),
        heavy("share", "inductor"),
    ],
)
def test_a_model_is_one_graph_before_its_first_call(operator, backend):
    torch.compiler.reset()
    model = get_peft_model(tiny_model(), MoraConfig(r=4, operator=operator))
    fill(model)
    values = [p for p in model.parameters() if p.requires_grad]
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    losses = [causal_loss(each, IDS) for each in (compiled, model)]
    assert_close(*losses, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, values) for loss in losses]
    assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_layers_keep_their_tables_however_many_there_are(monkeypatch):
    specs = specs_of_tables(monkeypatch)
    model = get_peft_model(tiny_model(), MoraConfig(r=4))
    for _ in range(2):
        causal_loss(model, IDS).backward()
        tables_of.cache_clear()  # as 64 other layers do
    assert len(specs) == len(layers(model))


def test_a_pattern_gives_modules_their_own_rank(tmp_path):
    config = MoraConfig(r=4, rank_pattern={"down_proj": 16, r".*\.0\..*q_proj": 8})
    model = get_peft_model(tiny_model(), config)
    fill(model)
    for name, layer in layers(model).items():
        rank = 16 if "down_proj" in name else 8 if ".0.self_attn.q_proj" in name else 4
        spec = (
            MoraConfig(r=rank)
            .adapter()
            .operator_for(name, layer.in_features, layer.out_features, 0)
        )
        assert layer.mora_spec["default"] == spec
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    with user_error("rank_pattern: q_proj must be a whole number"):
        MoraConfig(rank_pattern={"q_proj": "8"})
    with user_error("`rank` must be at least 1"):
        MoraConfig(rank_pattern={"q_proj": 0})


def test_a_list_or_an_expression_excludes_modules():
    for exclude in (["q_proj", "down_proj"], r".*(q|down)_proj"):
        model = get_peft_model(tiny_model(), MoraConfig(r=4, exclude_modules=exclude))
        assert layers(model)
        assert not any(
            "q_proj" in name or "down_proj" in name for name in layers(model)
        )


def test_layers_are_chosen_by_number():
    for pattern in (None, "layers", ["blocks", "layers"]):
        config = MoraConfig(
            r=4,
            target_modules=["q_proj"],
            layers_to_transform=[1],
            layers_pattern=pattern,
        )
        model = get_peft_model(tiny_model(), config)
        assert [*layers(model)] == ["model.layers.1.self_attn.q_proj"]


def test_tied_embeddings_stay_tied():
    config = MoraConfig(
        r=4,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )
    model = get_peft_model(tiny_model(tie_word_embeddings=True), config)
    inner = model.base_model.model
    trained = inner.model.embed_tokens.modules_to_save["default"].weight
    assert inner.lm_head.modules_to_save["default"].weight is trained
    config = MoraConfig(r=4, target_modules=["lm_head"], ensure_weight_tying=True)
    with pytest.warns(UserWarning, match="no implementation exists to tie"):
        get_peft_model(tiny_model(tie_word_embeddings=True), config)


def with_two_adapters(first=None, **other):
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    config_a = MoraConfig(**config, **(first or {}))
    model = get_peft_model(tiny_model(), config_a, adapter_name="a")
    model.add_adapter("b", MoraConfig(**{**config, **other}))
    for seed, adapter in enumerate("ab"):
        fill(model, adapter, seed)
    return model


@pytest.mark.parametrize(
    "first", [{"mora_dropout": 0.5}, {"exclude_modules": ["q_proj"]}]
)
def test_a_weighted_adapter_is_the_sum_of_deltas(tmp_path, first):
    model = with_two_adapters(first, target_modules=["q_proj", "up_proj"])
    for layer in layers(model).values():
        for adapter, spec in layer.mora_spec.items():
            # As of a layer that had another name where they were made
            layer.set_operator(adapter, replace(spec, seed=11))
    model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "sum")
    for layer in layers(model).values():
        expected = sum(
            weight * layer.get_delta_weight(adapter)
            for adapter, weight in (("a", 0.5), ("b", -2.0))
            if adapter in layer.mora_matrix
        )
        assert_close(layer.get_delta_weight("sum"), expected, rtol=0, atol=1e-7)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "sum")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"operator": "share"}, {"r": 8}, {"cycle": 1}]
)
def test_adapters_of_other_operators_are_not_summed(other):
    model = with_two_adapters(**other)
    with user_error("a, b have other operators or seeds"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    assert "sum" not in model.peft_config


def test_other_sums_are_refused():
    model = with_two_adapters()
    with user_error("combination_type 'svd' combines factors"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "svd")
    with user_error("`weights`: 1 for 2 adapter"):
        model.add_weighted_adapter(["a", "b"], [1.0], "sum")
    assert "sum" not in model.peft_config
    with user_error("Adapter c does not exist"):
        model.add_weighted_adapter(["a", "c"], [1.0, 1.0], "sum")
    model.add_adapter("head", MoraConfig(r=4, modules_to_save=["lm_head"]))
    with user_error("`modules_to_save` cannot be summed"):
        model.add_weighted_adapter(["a", "head"], [1.0, 1.0], "sum")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("operator", ["share", "truncate", "rotate"])
def test_an_adapter_becomes_lora_with_its_error(family, operator):
    model = get_peft_model(tiny_model(family), MoraConfig(r=4, operator=operator))
    fill(model)
    *_, last = layers(model).values()
    last.mora_matrix["default"].data.zero_()  # whose error is 0
    expected = logits(model)
    loses = operator == "rotate"
    config, state, error = convert_to_lora(model, 8 if loses else 1.0)
    lora = get_peft_model(tiny_model(family), config)
    assert not set_peft_model_state_dict(lora, state).unexpected_keys
    difference = (logits(lora) - expected).abs().max()
    if loses:
        assert 0.01 < error < 1
        assert difference > 1e-4
        return
    assert error < 1e-5
    assert difference < 1e-4
    sides = [layer.mora_spec["default"].r_hat for layer in layers(model).values()]
    assert max(config.rank_pattern.values()) <= max(sides)


def test_lora_of_an_adapter_that_there_is_not():
    model = get_peft_model(tiny_model(), MoraConfig(r=4))
    with user_error("unknown adapter 'defualt'; known: default"):
        convert_to_lora(model, 4, "defualt")


def test_peft_takes_methods_of_its_own_enum_alone():
    """Once it takes others, `mora_ds.peft.register` needs no private name of `enum`."""
    with pytest.raises(ValueError, match="please add an entry to"):
        register_peft_method(
            name="another", config_cls=MoraConfig, model_cls=MoraModel, prefix="other_"
        )


def test_no_rank_helps_a_layer_of_one_number():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    with user_error("whatever the rank"):
        get_peft_model(model, MoraConfig(r=8, target_modules=["0"]))
    config = MoraConfig(r=8, operator="share", target_modules=["0"])
    assert layers(get_peft_model(model, config))["0"].mora_spec["default"].r_hat == 1
