"""The adapter bank: every row of a mixed batch is what its adapter, merged alone, makes of it; what a bank holds in
memory; and what it refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import OperatorKind
from mora_ds.common.errors import UserError
from mora_ds.deploy import bank_layer
from mora_ds.deploy.bank_layer import BankLinear
from tests.helpers.adapters import Maker, originals
from tests.helpers.banks import CYCLES, Bench, bench, check_rows, logits
from tests.helpers.models import tiny_model, tokens
from tests.helpers.readme import code_with


@pytest.mark.parametrize(
    ("family", "operator", "rank"),
    [
        *(("llama", operator, 3) for operator in ("truncate", "share", "decouple", "rotate")),
        *(("gpt2", operator, 3) for operator in ("truncate", "share", "decouple", "rotate")),
        ("qwen2", "rotate", 2),
        *(("llama", operator, 40) for operator in ("truncate", "share", "rotate")),  # squares wider than some layers
    ],
)
def test_every_row_of_a_mixed_batch_is_its_merged_model(tmp_path: Path, family: str, operator: str, rank: int) -> None:
    """With 0, 1 and 3 merged cycles in one batch, Conv1D, biases, narrow keys and values, and the bare base."""
    made = bench(tmp_path, family)
    for name, module in made.maker.model.named_modules():
        if getattr(module, "bias", None) is not None and "norm" not in name:
            nn.init.normal_(module.bias)
    shutil.rmtree(tmp_path / "base")
    made.maker = Maker(made.maker.model, tmp_path / "base")
    for seed, (name, cycles) in enumerate(CYCLES.items()):
        made.add(name, MoRAConfig(rank=rank, operator=operator, seed=seed), cycles, scale=0.05)
    bank = made.open()
    check_rows(made, bank, ["three", "none", None, "one", "none"], tokens(5))
    check_rows(made, bank, ["one", "three"], tokens(2, length=1))
    check_rows(made, bank, ["none", None, "three"], tokens(3, length=128))  # long enough for weights of their own
    check_rows(made, bank, ["three"], tokens(1, length=128))
    assert torch.equal(logits(bank.model, tokens(2)), logits(made.merged(None), tokens(2))), "the base is as it was"


@pytest.mark.parametrize("operator", ["share", "rotate"])
def test_large_squares_are_multiplied_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operator: str
) -> None:
    monkeypatch.setattr(bank_layer, "_LARGE", 12)  # smaller ones, of keys and values, beside them
    monkeypatch.setattr(bank_layer, "_IN_CACHE", 500)  # and a term or two at a time
    made = bench(tmp_path)
    for seed, (name, cycles) in enumerate(CYCLES.items()):
        made.add(name, MoRAConfig(rank=3, operator=operator, seed=seed), cycles, scale=0.05)
    bank = made.open(cache_adapters=1)
    check_rows(made, bank, ["three", "none", None, "one", "three"], tokens(5))
    check_rows(made, bank, ["one", "one", "three", "three"], tokens(4, length=100))
    with bank.use(["one", "three", "one"]):
        terms = bank._layers["model.layers.0.mlp.up_proj"].terms
        assert terms is not None and isinstance(terms.squares, tuple) and len(terms.squares) == 8
        (held,) = {each.untyped_storage().data_ptr() for each in (terms.squares[0], terms.squares[-1])}
        assert held == terms.squares[1].untyped_storage().data_ptr(), "no copies, not for each row either"


def test_groupings_may_differ_in_a_bank(tmp_path: Path) -> None:
    """Also between cycles, and with segments: their groups have other sizes, and cycles without permutations are one
    square."""
    made = bench(tmp_path, intermediate_size=53)
    for name in ("permuted", "plain", "alternate", "contiguous", "strided-contiguous"):
        made.add(name, MoRAConfig(rank=2, operator="share", grouping=name), cycles=3, scale=0.05)
    layer = "model.layers.0.mlp.up_proj"
    spec = MoRAConfig(rank=2, operator="share").operator_for(layer, 32, 53, 0)
    made.add("segments", MoRAConfig(rank=2, operator="share"), specs={layer: replace(spec, out_segments=3)}, scale=0.05)
    made.add("inputs", MoRAConfig(rank=2, operator="share"), specs={layer: replace(spec, in_segments=5)}, scale=0.05)
    bank = made.open()
    check_rows(made, bank, [*bank.names], tokens(len(bank.names)))
    terms = {name: bank.cache.get(name).slices[layer].terms for name in bank.names}
    assert (terms["permuted"], terms["plain"], terms["alternate"], terms["segments"]) == (4, 1, 2, 1)


def test_adapters_may_leave_layers_out(tmp_path: Path) -> None:
    made = bench(tmp_path)
    made.add("queries", MoRAConfig(rank=3, target_modules=("q_proj",)), cycles=1, scale=0.1)
    made.add("down", MoRAConfig(rank=3, target_modules=("down_proj", "o_proj")), scale=0.1)
    bank = made.open()
    assert sum(isinstance(module, BankLinear) for module in bank.model.modules()) == 6
    check_rows(made, bank, ["down", None, "queries"], tokens(3))


def test_neighbours_with_one_adapter_are_one_group(rotating: Bench) -> None:
    bank = rotating.open()
    layer: Any = bank.model.model.layers[0].mlp.up_proj
    for names, groups in (
        (["one"] * 4, 1), (["one", "one", "three", "three"], 2), (["one", "three", "one", "three"], 4),
        (["one", "one", "one", "three", "three", "three"], 2), (["one", "one", None], 3), ([None, None], 1),
    ):  # fmt: skip
        check_rows(rotating, bank, names, tokens(len(names)))
        with bank.use(names):
            assert bank._rows is not None and bank._rows.groups == groups
            stacked = 0 if layer.terms is None else len(layer.terms.squares)
            assert stacked == sum(CYCLES[name] + 1 for name in set(names) if name), "squares are there once"
    with bank.use("three"):  # however many rows there are
        for rows in (1, 3):
            expected = logits(rotating.merged("three"), tokens(rows))
            torch.testing.assert_close(logits(bank.model, tokens(rows)), expected, rtol=0, atol=1e-5)


def test_a_block_leaves_the_model_as_it_was(rotating: Bench) -> None:
    bank, ids = rotating.open(), tokens(2)
    weights = {name: weight.clone() for name, weight in bank.model.named_parameters()}
    assert set(weights) == set(originals(rotating.maker.model)), "parameters keep their names"
    with bank.use(["one", "three"]):
        outer = logits(bank.model, ids)
        with pytest.raises(KeyError), bank.use("none"):
            assert not torch.equal(logits(bank.model, ids), outer)
            raise KeyError
        assert torch.equal(logits(bank.model, ids), outer)
    assert torch.equal(logits(bank.model, ids), logits(rotating.merged(None), ids))
    for name, weight in bank.model.named_parameters():
        assert torch.equal(weight, weights[name]) and not weight.requires_grad


def test_gradients_reach_the_inputs(rotating: Bench) -> None:
    """As for attributions: of every row through its own adapter, with one term a group and with several."""
    bank, embedded = rotating.open(), rotating.maker.model.get_input_embeddings()(tokens(2)).detach()

    def gradient(model: Any) -> Tensor:
        inputs = embedded.clone().requires_grad_()
        (found,) = torch.autograd.grad(model(inputs_embeds=inputs, use_cache=False).logits.square().sum(), inputs)
        return found

    for names in (["one", "three"], ["none", "none"]):
        with bank.use(names):
            found = gradient(bank.model)
        for row, name in enumerate(names):
            expected = gradient(rotating.merged(name))[row]
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


def test_in_bf16_a_row_is_near_its_merged_model(rotating: Bench) -> None:
    bank, ids = rotating.open(dtype="bfloat16"), tokens(3)
    names = ["three", "none", "one"]
    base = logits(rotating.merged(None), ids)
    with bank.use(names):
        found = logits(bank.model, ids).float()
    assert bank.cache.get("one").squares.dtype is torch.bfloat16
    for row, name in enumerate(names):
        expected = logits(rotating.merged(name), ids)[row]
        assert (found[row] - expected).norm() < 0.1 * (base[row] - expected).norm()


def test_the_dtype_is_that_of_the_runs_where_they_have_one(tmp_path: Path) -> None:
    made = bench(tmp_path)
    made.add("a", MoRAConfig(rank=3), dtype="bfloat16")
    assert made.open().model.dtype is torch.bfloat16
    made.add("b", MoRAConfig(rank=3), dtype="float16")
    assert made.open().model.dtype is torch.float32
    assert made.open(dtype="float16").model.dtype is torch.float16


@pytest.mark.parametrize(("side", "dtype"), [(2**16 - 1, torch.uint16), (2**16, torch.int32)])
def test_indices_take_16_bits_where_all_of_them_fit(side: int, dtype: torch.dtype) -> None:
    """`side` itself is one: that of no feature."""
    small = OperatorSpec(OperatorKind.ROTATE, 32, 32, 8)
    wide = OperatorSpec(OperatorKind.ROTATE, side, 32, 8)
    assert bank_layer.index_dtype([small, wide]) is dtype
    for table in bank_layer.term_tables(wide):
        assert torch.equal(table.to(dtype).long(), table)


def test_a_long_batch_in_bf16_loses_no_update_that_is_small_beside_its_weight(rotating: Bench) -> None:
    """Weights of 64 are half a unit apart in bf16, and cancel here: a sum with the update would round it away."""
    bank = rotating.open(dtype="bfloat16")
    name = "model.layers.0.mlp.up_proj"
    layer, x = bank.model.get_submodule(name), torch.ones(1, 128, 32, dtype=torch.bfloat16)
    layer.weight.data.fill_(64.0)
    x[..., 1::2] = -1
    with bank.use("one"):
        found = layer(x).float()
    delta = sum(spec.delta_weight(square) for spec, square in rotating.updates["one"][name])
    expected = x.float() @ torch.as_tensor(delta).T
    assert (found - expected).norm() < 0.03 * expected.norm()


# -- memory ------------------------------------------------------------------------------------------------------------


def test_the_cache_keeps_those_used_last_within_its_bound(rotating: Bench) -> None:
    bank = rotating.open(cache_adapters=2)
    assert bank.cache.names == () and bank.cache.nbytes == 0, "nothing is read before it is used"
    for name, held in (
        ("one", ("one",)),
        ("none", ("one", "none")),
        ("one", ("none", "one")),
        ("three", ("one", "three")),
    ):
        with bank.use(name):
            assert bank.cache.names == held
    assert bank.cache.reads == 3
    check_rows(rotating, bank, ["none", "one", "three"], tokens(3))  # a batch may have more than are kept
    assert bank.cache.names == ("three", "none") and bank.cache.reads == 4

    sizes = {name: rotating.open().cache.get(name).nbytes for name in bank.names}
    bound = sizes["one"] + sizes["none"]
    bank = rotating.open(cache_bytes=bound)
    for name, held in (
        ("none", ("none",)),
        ("one", ("none", "one")),
        ("three", ("none", "one")),
        ("none", ("one", "none")),
    ):
        with bank.use(name):
            assert bank.cache.names == held and bank.cache.nbytes <= bound
    check_rows(rotating, bank, ["three", "one"], tokens(2))
    bank = rotating.open(cache_bytes=sizes["three"])
    for name, held in (("three", ("three",)), ("none", ("none",))):
        with bank.use(name):
            assert bank.cache.names == held, "one that just fits is kept"


def test_an_adapter_weighs_its_squares_and_little_more(tmp_path: Path) -> None:
    """Its tables of indices: (d_in + d_out) x 2 bytes a square of (d_in + d_out) x rank x 4. And a batch no more."""
    made = bench(tmp_path, hidden_size=64, intermediate_size=96)
    made.add("a", MoRAConfig(rank=8, operator="share"), cycles=2)
    bank = made.open()
    own = sum(square.nbytes for cycles in made.updates["a"].values() for _, square in cycles)
    with bank.use("a"):
        held = bank.cache.get("a")
        assert held.squares.nbytes == own and own < bank.cache.nbytes < 1.1 * own
        stacked = sum(layer.terms.squares.nbytes for layer in bank._layers.values() if layer.terms is not None)
        assert stacked == own
    assert all(layer.terms is None for layer in bank._layers.values())
    plain = sum(each.nbytes for each in made.maker.model.parameters())
    assert sum(each.nbytes for each in bank.model.parameters()) == plain, "the base is there once"


def test_squares_of_zero_take_nothing(tmp_path: Path) -> None:
    """As after the last merge of a run."""
    made = bench(tmp_path)
    made.add("merged", MoRAConfig(rank=3), cycles=0, scale=0.0)
    bank = made.open()
    assert torch.equal(bank.cache.get("merged").squares, torch.empty(0))
    with bank.use(["merged", None]):
        assert torch.equal(logits(bank.model, tokens(2)), logits(made.merged(None), tokens(2)))


# -- generation --------------------------------------------------------------------------------------------------------


def test_generation_with_mixed_adapters_is_each_merged_alone(rotating: Bench) -> None:
    """Greedy, and with beams and several sequences a row; left-padded."""
    bank = rotating.open()
    names, ids, lengths = ["three", None, "one", "three"], tokens(4, length=7), (7, 4, 6, 2)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, 7 - length :] = 1
    ids = ids * mask
    for settings in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **settings}
        found = bank.generate(ids, adapters=names, attention_mask=mask, **settings)
        several = len(found) // len(ids)
        for row, (name, length) in enumerate(zip(names, lengths, strict=True)):
            alone = rotating.merged(name).generate(ids[row : row + 1, -length:], **settings)
            assert torch.equal(found[row * several : (row + 1) * several, -8:], alone[:, -8:]), (row, settings)
    one = bank.generate(ids[:2], "one", attention_mask=mask[:2], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert len(one) == 2
    with pytest.raises(UserError, match=r"named for 2 row\(s\), but the batch has 4"):
        bank.generate(ids, adapters=["one", "three"])


def test_the_lines_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Bench(tmp_path, Maker(tiny_model(), tmp_path / "MODEL"), {})
    for seed, name in enumerate(("law", "code")):
        made.add(name, MoRAConfig(rank=3, seed=seed), cycles=1, scale=0.05)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"ids": tokens(3), "mask": torch.ones(3, 16, dtype=torch.long)}
    exec(code_with("AdapterBank", "docs/guides/multi-adapter.md"), names)
    assert names["logits"].shape == (3, 16, 128) and names["bank"].cache.names == ("law", "code")
