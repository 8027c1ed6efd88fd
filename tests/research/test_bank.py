"""Adapters side by side: every row of a mixed batch is what its adapter, merged alone,
makes of it; what is refused.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from mora_ds.adapters.config import LoRAConfig, MoRAConfig
from mora_ds.checkpoint.layout import ADAPTER_TENSORS
from mora_ds.common.files import read_json, write_manifest
from mora_ds.data import load_corpus, load_tokenizer, train_sentencepiece
from mora_ds.eval.perplexity import Target, Windows, evaluate
from mora_ds.research.bank import AdapterBank
from tests.helpers.adapters import Maker, Updates, merge, originals
from tests.helpers.errors import user_error
from tests.helpers.exports import fake_run
from tests.helpers.mistakes import command
from tests.helpers.models import tiny_model, tokens
from tests.helpers.pages import code_with
from tests.helpers.tables import rows

CYCLES = {"none": 0, "one": 1, "three": 3}
"""Adapter -> merged cycles."""


@dataclass
class Bench:
    """A base with adapters, and plain transformers to hold them against."""

    folder: Path
    maker: Maker
    updates: dict[str, Updates]

    def open(self):
        return AdapterBank.open(self.folder / "base", self.folder / "bank")

    def add(self, name, config, cycles=0, **more):
        self.updates[name] = self.maker.write(
            self.folder / "bank" / name, config, cycles, **more
        )

    def merged(self, name):
        """A plain model with all cycles of an adapter merged; the same one every time."""
        model = self.maker.model.eval()
        weights = self.maker.weights
        for weight, original in weights.items():
            model.get_parameter(weight).data.copy_(original)
        merge(model, weights, {} if name is None else self.updates[name])
        return model


def bench_of(folder, **changes):
    return Bench(folder, Maker(tiny_model("llama", **changes), folder / "base"), {})


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def check_rows(bench, bank, names, ids):
    """Each row is its adapter's, and no two adapters' are alike."""
    with bank.use(names):
        mixed = logits(bank.model, ids)
    expected = {name: logits(bench.merged(name), ids) for name in dict.fromkeys(names)}
    for row, name in enumerate(names):
        assert_close(mixed[row], expected[name][row], rtol=0, atol=1e-5)
        for another in set(expected) - {name}:
            assert (mixed[row] - expected[another][row]).abs().max() > 1e-3


@pytest.fixture(scope="module")
def rotating(tmp_path_factory):
    """Adapters of 0, 1 and 3 merged cycles."""
    bench = bench_of(tmp_path_factory.mktemp("rotating"))
    for seed, (name, cycles) in enumerate(CYCLES.items()):
        bench.add(name, MoRAConfig(rank=3, seed=seed), cycles, scale=0.05)
    return bench


MIXED = """
llama | truncate | 3
llama | share | 40
gpt2 | decouple | 3
qwen2 | rotate | 2
"""
"""A family | an operator | a rank."""


@pytest.mark.parametrize("family, operator, rank", rows(MIXED))
def test_every_row_of_a_mixed_batch_is_its_merged_model(
    tmp_path, base_folder, family, operator, rank
):
    """One batch with 0, 1 and 3 merged cycles, Conv1D, biases, narrow keys and values,
    and the bare base."""
    model = tiny_model(family)
    for name, module in model.named_modules():
        if getattr(module, "bias", None) is not None and "norm" not in name:
            nn.init.normal_(module.bias)
    bench = Bench(tmp_path, Maker(model, base_folder), {})
    for seed, (name, cycles) in enumerate(CYCLES.items()):
        config = MoRAConfig(rank=int(rank), operator=operator, seed=seed)
        bench.add(name, config, cycles, scale=0.05)
    bank = bench.open()
    check_rows(bench, bank, ["three", "none", None, "one", "none"], tokens(5))
    check_rows(bench, bank, ["one", "three"], tokens(2, length=1))
    assert torch.equal(
        logits(bank.model, tokens(2)), logits(bench.merged(None), tokens(2))
    ), "the base is as it was"


def test_operators_sizes_layers_and_groupings_may_differ(tmp_path):
    """Cycles without permutations are one matrix; two adapters may have the same
    operator.
    """
    bench = bench_of(tmp_path, intermediate_size=53)
    share = MoRAConfig(rank=2, operator="share")
    for name in ("permuted", "plain", "alternate", "strided-contiguous"):
        bench.add(name, replace(share, grouping=name), cycles=3, scale=0.05)
    bench.add("twin", replace(share, grouping="plain"), cycles=1, scale=0.1)
    bench.add("other", MoRAConfig(rank=5, operator="decouple"), cycles=1, scale=0.05)
    queries = MoRAConfig(rank=3, target_modules=("q_proj",))
    bench.add("queries", queries, cycles=1, scale=0.1)
    bank = bench.open()
    names = list(bank.adapters)
    check_rows(bench, bank, names, tokens(len(names)))
    layer = "model.layers.0.mlp.up_proj"
    counts = {
        name: len(bank.mora_matrices_of(name).get(layer, {})) for name in bank.adapters
    }
    assert counts == {
        "permuted": 4,
        "plain": 1,
        "twin": 1,
        "alternate": 2,
        "strided-contiguous": 1,
        "other": 2,
        "queries": 0,
    }


def test_a_block_leaves_the_model_as_it_was(rotating):
    bank = rotating.open()
    ids = tokens(2)
    weights = {name: weight.clone() for name, weight in bank.model.named_parameters()}
    assert set(weights) == set(originals(rotating.maker.model)), (
        "parameters keep their names"
    )
    with bank.use(["one", "three"]):
        outer = logits(bank.model, ids)
        with pytest.raises(KeyError), bank.use("none"):
            assert not torch.equal(logits(bank.model, ids), outer)
            raise KeyError
        assert torch.equal(logits(bank.model, ids), outer)
    assert torch.equal(logits(bank.model, ids), logits(rotating.merged(None), ids))
    for name, weight in bank.model.named_parameters():
        assert torch.equal(weight, weights[name])
        assert not weight.requires_grad


def test_generation_with_mixed_adapters_is_each_merged_alone(rotating):
    """Greedy, left-padded; several sequences a row are refused."""
    bank = rotating.open()
    names = ["three", None, "one", "three"]
    lengths = (7, 4, 6, 2)
    mask = torch.stack([torch.arange(7) >= 7 - length for length in lengths]).long()
    ids = tokens(4, length=7) * mask
    settings = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    generated = bank.generate(ids, adapters=names, attention_mask=mask, **settings)
    for row, (name, length) in enumerate(zip(names, lengths, strict=True)):
        alone = rotating.merged(name).generate(ids[row : row + 1, -length:], **settings)
        assert torch.equal(generated[row, -8:], alone[0, -8:]), row
    with user_error(r"named for 2 sequence\(s\), but the batch has 4"):
        bank.generate(ids, adapters=["one", "three"])
    with user_error(r"named for 4 sequence\(s\), but the input of .* is \(12, 7, 32\)"):
        bank.generate(ids, adapters=names, attention_mask=mask, num_beams=3, **settings)
    with user_error(r"named for 12 sequence\(s\), but the batch has 4"):
        bank.generate(
            ids, adapters=3 * names, attention_mask=mask, num_beams=3, **settings
        )


def test_the_lines_of_the_guide_run(rotating, tmp_path, monkeypatch):
    (tmp_path / "MODEL").symlink_to(rotating.folder / "base")
    (tmp_path / "bank").mkdir()
    for name, adapter in {"law": "one", "code": "three"}.items():
        (tmp_path / "bank" / name).symlink_to(rotating.folder / "bank" / adapter)
    monkeypatch.chdir(tmp_path)
    names = {"ids": tokens(3), "mask": torch.ones(3, 16, dtype=torch.long)}
    exec(code_with("AdapterBank", "docs/research/bank.md"), names)
    assert names["logits"].shape == (3, 16, 128)
    assert names["bank"].mora_matrices_of.cache_info().currsize == 2


def test_runs_and_checkpoints_are_adapters_too(tmp_path):
    """A layer each of another operator, which is no matter: one a layer it is. Their
    engine's shards are not hashed.
    """
    trained = fake_run(tmp_path / "run", cycles=2)
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank/complete").symlink_to(trained.output)
    shutil.copytree(trained.checkpoint, tmp_path / "bank/step")
    bank = AdapterBank.open(trained.base, tmp_path / "bank", cache=1)
    ids = tokens(2)
    expected = logits(trained.live, ids)
    for names in ("complete", ["step", "complete"]):
        with bank.use(names):
            assert_close(logits(bank.model, ids), expected, rtol=0, atol=1e-5)
        assert bank.mora_matrices_of.cache_info().currsize == 1


# -- what is refused -------------------------------------------------------------------


@pytest.mark.parametrize("file", ["ledger/cycle-00000.safetensors", ADAPTER_TENSORS])
def test_a_damaged_adapter_is_named(rotating, tmp_path, file):
    shutil.copytree(rotating.folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "bank/one" / file
    path.write_bytes(path.read_bytes()[:-1] + b"\x77")
    with user_error(f"adapter 'one' cannot be used: .*{file}"):
        Bench(tmp_path, rotating.maker, {}).open()


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    """An adapter of another base, of another update, with other trained tensors, or
    with several matrices per layer."""
    bench = bench_of(tmp_path)
    bench.add("a", MoRAConfig(rank=3), cycles=1)
    norm = {"model.norm.weight": torch.ones(32)}

    def refuse_odd(message, config, **more):
        bench.add("odd", config, **more)
        with user_error(f"adapter 'odd' cannot be used: .*{message}"):
            bench.open()
        shutil.rmtree(tmp_path / "bank/odd")

    mora = MoRAConfig(rank=3)
    refuse_odd("is not the base of .*odd", mora, fingerprint="abc")
    refuse_odd("it has other trained tensors than MoRA matrices", mora, trained=norm)
    refuse_odd("it has MoRA matrices of domains", mora, domains=("law", "code"))
    operators = "truncate, share, decouple, rotate"
    none_of_them = f"q_proj has lora, which is none of the operators {operators}"
    refuse_odd(none_of_them, LoRAConfig(rank=3))


def test_names_folders_and_rows_that_do_not_fit_are_named(
    rotating, tmp_path, base_folder
):
    bank = rotating.open()
    with (
        user_error(r"unknown adapter 'thre'; .*Did you mean 'three'"),
        bank.use(["one", "thre"]),
    ):
        pass
    with bank.use(["one", "three"]):
        with user_error(
            r"named for 2 sequence\(s\), but the input of .*q_proj is \(4, 16, 32\)"
        ):
            logits(bank.model, tokens(4))
        layer = bank.model.model.layers[0].mlp.up_proj
        with user_error(
            r"up_proj is \(2, 32\); for a layer whose input is not a batch of full"
        ):
            layer(torch.zeros(2, 32))
    with bank.use("one"):
        layer(torch.zeros(2, 32))
    (tmp_path / "empty/x").mkdir(parents=True)
    with user_error("no folder in .*empty has an adapter"):
        AdapterBank.open(rotating.folder / "base", tmp_path / "empty")
    with user_error("no such folder"):
        AdapterBank.open(rotating.folder / "base", tmp_path / "nowhere")
    with user_error("MODEL: no such folder"):
        AdapterBank.open(base_folder, rotating.folder / "bank")


def test_the_command_scores_every_adapter_as_its_merged_model(tmp_path, user, capsys):
    maker = Maker(AutoModelForCausalLM.from_pretrained(user.model), user.model)
    bank = tmp_path / "bank"
    config = MoRAConfig(rank=2, seed=1)
    of_a_run = {"document_start": "</s>"}
    updates = {
        "a": maker.write(bank / "a", MoRAConfig(rank=2), scale=0.1, facts=of_a_run),
        "b": maker.write(bank / "b", config, cycles=1, scale=0.1),
    }
    # A run with --tokenizer_name has fewer tokens
    own_tokenizer = tmp_path / "bank/b/tokenizer"
    trained = train_sentencepiece(user.texts(), 360, tmp_path)
    load_tokenizer(trained).save_pretrained(own_tokenizer)
    write_manifest(tmp_path / "bank/b")
    flags = (
        f"{user.model} {tmp_path}/bank --sets held={user.held} --window 64 --stride 32 "
        f"--max_documents 4 --json {tmp_path}/scores.json"
    )
    assert command("evaluate-adapters", flags.split()) == (0, "")
    scores = read_json(tmp_path / "scores.json")["adapters"]
    printed = capsys.readouterr().out
    assert "bits/byte" in printed
    assert "2 adapter(s); windows of 64" in printed
    corpus = load_corpus([str(user.held)])
    nats = {name: adapter["held"]["nats"] for name, adapter in scores.items()}
    for name, folder, start in (
        ("(base)", user.model, "auto"),
        ("a", user.model, "</s>"),
        ("b", own_tokenizer, "auto"),
    ):
        merge(maker.model, maker.weights, updates.get(name, {}))
        merged = Target(maker.model.eval(), load_tokenizer(folder))
        windows = Windows(64, 32, start)
        expected = evaluate(merged, corpus, windows, max_documents=4)
        assert nats[name] == pytest.approx(expected.nats, rel=1e-6)
        assert (abs(nats[name] / nats["(base)"] - 1) > 1e-4) == (name != "(base)")
        maker.model.load_state_dict(maker.weights, strict=False)
