"""The adapter bank: every row of a mixed batch is what its adapter, merged alone, makes of it; what a bank holds in
memory; and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mora_ds.adapters.config import AdapterConfig, LoRAConfig, MoRAConfig
from mora_ds.checkpoint.layout import ADAPTER_JSON, ADAPTER_TENSORS
from mora_ds.deploy import bank_layer
from mora_ds.deploy.bank import AdapterBank
from mora_ds.deploy.bank_layer import BankLinear
from mora_ds.errors import UserError
from tests.helpers.adapters import Maker, Updates, merge, originals
from tests.helpers.exports import fake_run
from tests.helpers.models import tiny_model, tokens
from tests.helpers.readme import code_with

CYCLES = {"none": 0, "one": 1, "three": 3}


@dataclass
class Bench:
    """A base with adapters, and plain transformers to hold them against."""

    folder: Path
    maker: Maker
    updates: dict[str, Updates]

    def open(self, **settings: Any) -> AdapterBank:
        return AdapterBank.open(self.folder / "base", self.folder / "bank", **settings)

    def add(self, name: str, config: AdapterConfig, cycles: int = 0, **more: Any) -> None:
        self.updates[name] = self.maker.write(self.folder / "bank" / name, config, cycles, **more)

    def merged(self, name: str | None) -> Any:
        """A plain model with all squares of an adapter merged; the same one every time."""
        model = self.maker.model.eval()
        weights = self.maker.weights
        for weight, original in weights.items():
            model.get_parameter(weight).data.copy_(original)
        merge(model, weights, {} if name is None else self.updates[name])
        return model


def bench(folder: Path, family: str = "llama", **changes: Any) -> Bench:
    return Bench(folder, Maker(tiny_model(family, **changes), folder / "base"), {})


@pytest.fixture(scope="module")
def rotating(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Adapters of 0, 1 and 3 merged cycles."""
    made = bench(tmp_path_factory.mktemp("rotating"))
    for seed, (name, cycles) in enumerate(CYCLES.items()):
        made.add(name, MoRAConfig(rank=3, seed=seed), cycles, scale=0.05)
    return made


@torch.no_grad()
def logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    return model(input_ids=ids, use_cache=False, **more).logits


def check_rows(made: Bench, bank: AdapterBank, names: list[str | None], ids: Tensor) -> None:
    """Each row is its adapter's, and no two adapters' are alike."""
    with bank.use(names):
        found = logits(bank.model, ids)
    expected = {name: logits(made.merged(name), ids) for name in dict.fromkeys(names)}
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], expected[name][row], rtol=0, atol=1e-5)
        for other in set(expected) - {name}:
            assert (found[row] - expected[other][row]).abs().max() > 1e-3


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


# -- what does not belong ----------------------------------------------------------------------------------------------


def test_a_damaged_adapter_harms_nobody_until_it_is_used(rotating: Bench, tmp_path: Path) -> None:
    shutil.copytree(rotating.folder, tmp_path, dirs_exist_ok=True)
    made = Bench(tmp_path, rotating.maker, rotating.updates)
    for name in ("short", "flipped", "nothing", "nan", "json", "gone"):
        shutil.copytree(tmp_path / "bank" / "one", tmp_path / "bank" / name)
    bank_folder = tmp_path / "bank"
    tensors = (bank_folder / "short" / ADAPTER_TENSORS).read_bytes()
    (bank_folder / "short" / ADAPTER_TENSORS).write_bytes(tensors[:-5])
    flipped = bank_folder / "flipped" / "ledger" / "cycle-00000.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x77")
    (bank_folder / "nothing" / ADAPTER_TENSORS).unlink()
    (bank_folder / "json" / ADAPTER_JSON).write_text('{"format": 1, "layers')
    (bank_folder / "gone" / ADAPTER_JSON).unlink()
    shutil.rmtree(bank_folder / "nan")
    made.updates["nan"] = made.maker.write(bank_folder / "nan", MoRAConfig(rank=3), scale=float("nan"))
    bank = made.open()
    assert set(bank.damaged) == {"json", "gone"}
    check_rows(made, bank, ["one", "three"], tokens(2))
    for name, message in (
        ("short", ADAPTER_TENSORS), ("flipped", "cycle-00000.safetensors"), ("nothing", "is missing"),
        ("nan", "q_proj is not finite"), ("json", "adapter.json is damaged"), ("gone", "adapter.json is missing"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"adapter '{name}' cannot be used: .*{message}"), bank.use(["one", name]):
            pass
    check_rows(made, bank, ["none", "one"], tokens(2))


def test_without_a_manifest_the_ledger_s_own_hashes_count(rotating: Bench, tmp_path: Path) -> None:
    shutil.copytree(rotating.folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "bank" / "one" / "manifest.json").unlink()
    path = tmp_path / "bank" / "one" / "ledger" / "cycle-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x77")
    bank = AdapterBank.open(tmp_path / "base", tmp_path / "bank")
    with pytest.raises(UserError, match="adapter 'one' cannot be used: the ledger is damaged at cycle 0"):
        bank.cache.get("one")


def test_an_adapter_of_another_base_or_operator_is_refused(tmp_path: Path) -> None:
    made = bench(tmp_path)
    made.add("a", MoRAConfig(rank=3), cycles=1)

    def refused(message: str, config: AdapterConfig, **more: Any) -> None:
        made.add("team/odd", config, **more)
        with pytest.raises(UserError, match=message):
            made.open()
        shutil.rmtree(tmp_path / "bank" / "team")

    refused("adapter 'odd' .* is of another base: fingerprint abc", MoRAConfig(rank=3), fingerprint="abc")
    operator = (
        "adapter 'odd': model.layers.0.self_attn.q_proj has share of r_hat 13 .* but rotate of r_hat 12 .* in 'a'"
    )
    refused(operator, MoRAConfig(rank=3, operator="share"))
    refused("has rotate of r_hat 16 on 32 x 32, but rotate of r_hat 12", MoRAConfig(rank=4))
    refused("q_proj has lora; a bank takes the operators truncate, share, decouple, rotate", LoRAConfig(rank=3))
    norm = {"model.norm.weight": torch.ones(32)}
    refused("'odd' .* also trained model.norm.weight", MoRAConfig(rank=3), trained=norm)

    refused("'odd' .* has MoRA matrices of the domains law, code", MoRAConfig(rank=3), domains=("law", "code"))
    for kind in ("subspace", "spiral"):  # the second is known to nobody
        made.add(kind, MoRAConfig(rank=3))
        path = tmp_path / "bank" / kind / ADAPTER_JSON
        path.write_text(path.read_text().replace('"rotate"', f'"{kind}"'))
        with pytest.raises(UserError, match=rf"adapter '{kind}': .*q_proj has {kind}; a bank takes the operators"):
            made.open()
        shutil.rmtree(path.parent)

    content = json.loads((tmp_path / "bank" / "a" / ADAPTER_JSON).read_text())
    content["layers"]["model.layers.7.up"] = next(iter(content["layers"].values()))
    (tmp_path / "bank" / "a" / ADAPTER_JSON).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"'a': the base has no linear layer model.layers.7.up of 32 x 32"):
        made.open()


def test_a_merged_cycle_of_another_operator_is_named_when_it_is_read(tmp_path: Path) -> None:
    """Only adapter.json is read before."""
    made = bench(tmp_path)
    made.add("a", MoRAConfig(rank=3))
    made.add("b", MoRAConfig(rank=4), cycles=1)
    source = tmp_path / "bank" / "a"
    for name in (ADAPTER_JSON, ADAPTER_TENSORS):
        shutil.copyfile(source / name, tmp_path / "bank" / "b" / name)
    (tmp_path / "bank" / "b" / "manifest.json").unlink()
    content = json.loads((source / ADAPTER_JSON).read_text())
    (tmp_path / "bank" / "b" / ADAPTER_JSON).write_text(json.dumps({**content, "cycle": 1}))
    bank = made.open()
    with pytest.raises(UserError, match=r"adapter 'b': a merged cycle of .*q_proj has rotate of r_hat 16"):
        bank.cache.get("b")


def test_names_folders_and_rows_that_do_not_fit_are_named(rotating: Bench, tmp_path: Path) -> None:
    bank = rotating.open()
    with pytest.raises(UserError, match=r"no adapter 'thre'. Did you mean 'three'\?"), bank.use(["one", "thre"]):
        pass
    with pytest.raises(UserError, match="no adapter is named"), bank.use([]):
        pass
    with bank.use(["one", "three"]):
        for rows in (1, 3, 4):
            with pytest.raises(UserError, match=rf"named for 2 row\(s\), but the batch has {rows}"):
                logits(bank.model, tokens(rows))
        logits(bank.model, tokens(2))
        layer = bank.model.model.layers[0].mlp.up_proj
        layer(torch.zeros(2 * 16, 32))  # rows and tokens flattened, as some models do
        with pytest.raises(
            UserError, match=r"up_proj gets \(31, 32\) of a batch of \(2, 16\): its rows cannot be separated"
        ):
            layer(torch.zeros(31, 32))
    for settings, message in (({"cache_adapters": 0}, "cache_adapters"), ({"cache_bytes": -1}, "cache_bytes")):
        with pytest.raises(UserError, match=f"{message} must be at least 1"):
            rotating.open(**settings)
    shutil.copytree(rotating.folder / "bank", tmp_path / "bank")
    shutil.copytree(rotating.folder / "bank" / "one", tmp_path / "bank" / "team" / "one")
    with pytest.raises(UserError, match=r"two adapters are called 'one': .*/bank/one and .*/bank/team/one"):
        AdapterBank.open(rotating.folder / "base", tmp_path / "bank")
    (tmp_path / "empty" / "x").mkdir(parents=True)
    for folder, message in (("empty", "no folder in .*empty holds an adapter"), ("nowhere", "no such folder")):
        with pytest.raises(UserError, match=message):
            AdapterBank.open(rotating.folder / "base", tmp_path / folder)
    with pytest.raises(UserError, match="MODEL: no such folder"):
        AdapterBank.open(tmp_path / "base", rotating.folder / "bank")


def test_runs_and_checkpoints_are_adapters_too(tmp_path: Path) -> None:
    """A layer each of another operator, which is no matter: one a layer it is. Their engine's shards are not hashed."""
    made = fake_run(tmp_path / "run", cycles=2)
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "whole").symlink_to(made.output)
    shutil.copytree(made.checkpoint, tmp_path / "bank" / "step")
    bank, ids = AdapterBank.open(made.base, tmp_path / "bank"), tokens(2)
    expected = logits(made.live, ids)
    for names in ("whole", ["step", "whole"]):
        with bank.use(names):
            torch.testing.assert_close(logits(bank.model, ids), expected, rtol=0, atol=1e-5)
