"""`--onto`: a run's update on another model of its base's shapes, against the same sum
formed by hand in fp64.
"""

import copy
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject, set_cycle
from mora_ds.common import files
from mora_ds.common.files import read_json
from mora_ds.common.tensor_files import COMPUTE_DTYPES
from mora_ds.data import load_corpus
from mora_ds.deploy import onto
from mora_ds.deploy.export import export_merged
from mora_ds.eval.perplexity import Windows, evaluate, load_target
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.rope import rope_changes, with_changes
from mora_ds.remora.merge import layer_entries
from tests.helpers.adapters import Maker
from tests.helpers.errors import user_error
from tests.helpers.models import tiny_model, tokens
from tests.helpers.snapshot import untouched
from tests.helpers.tables import each_row, parsed
from tests.helpers.tools import call

NORMS = ("model.norm.weight", "model.layers.0.input_layernorm.weight")
ALL = ("all-linear", "experts")
MORE_TOKENS = 8


@pytest.fixture
def target_folder(tmp_path):
    """The model onto which an update is exported."""
    return tmp_path / "target"


class Update:
    """A run's update of a tiny model: two merged cycles, live matrices, and trained
    tensors.
    """

    def __init__(self, folder, family, product, rope=None, **changes):
        """`product`: embeddings and head have a trained product of low rank, instead of
        trained embeddings. `rope`: what the run has changed in the base's config."""
        self.folder = folder
        self.base = folder / "base"
        self.checkpoint = folder / "adapter"
        model = tiny_model(family, **changes)
        self.weights = {
            name: tensor.detach().double() for name, tensor in model.named_parameters()
        }
        targets = ALL if "moe" in family else ALL[:1]
        config = MoRAConfig(rank=3, target_modules=targets)
        injected = copy.deepcopy(model)
        inject(injected, config)

        def layers_of(cycle):
            set_cycle(injected, config, cycle)
            return layer_entries(injected)

        generator = torch.Generator().manual_seed(4)
        tables = [
            name
            for name in ("model.embed_tokens", "lm_head")
            if f"{name}.weight" in self.weights
        ]
        self.trained = {name: (self.weights[name] + 0.125).float() for name in NORMS}
        for table in tables if product else tables[:1]:
            shape = self.weights[f"{table}.weight"].shape
            name, rows = (
                (f"{table}.low_rank", (sum(shape), 3))
                if product
                else (f"{table}.weight", tuple(shape))
            )
            self.trained[name] = 0.1 * torch.randn(rows, generator=generator)
        maker = Maker(model, self.base)
        self.keys = maker.keys
        self.updates = maker.write(
            self.checkpoint,
            config,
            2,
            trained=self.trained,
            layers_of=layers_of,
            config_changes=rope or {},
        )

    def merge_onto_target(self, **settings):
        """The export onto the model in "target", a folder next to it."""
        merged = self.folder / "merged"
        export_merged(self.checkpoint, merged, onto=self.folder / "target", **settings)
        return merged

    def change(self, name):
        """merged - base of a parameter of the base, in fp64."""
        module = name.removesuffix(".weight")
        if module in self.updates:
            delta = sum(
                spec.delta_weight(adapter_weight.double())
                for spec, adapter_weight in self.updates[module]
            )
            return delta if isinstance(delta, Tensor) else 0
        if (low_rank := self.trained.get(f"{module}.low_rank")) is not None:
            tall, wide = low_rank.double().split(self.weights[name].shape)
            return tall @ wide.T
        return (
            self.trained[name].double() - self.weights[name]
            if name in self.trained
            else 0
        )


def expected(update, target, scale=1.0):
    """Every parameter of the target with the update, by hand in fp64: rows of new tokens
    stay.
    """
    total = {}
    for name, tensor in target.named_parameters(remove_duplicate=False):
        total[name] = tensor.detach().double().clone()
        key = update.keys.get(name)
        change = (
            0
            if key is None
            else update.change(next(n for n in update.weights if update.keys[n] == key))
        )
        if isinstance(change, Tensor):
            total[name][: len(change)] += scale * change
    return total


def check(model, exact, dtype):
    """Each number is that of fp64, up to errors of sums in fp32, rounded to `dtype` once:
    at most half a step off.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert set(parameters) == set(exact)
    for name, tensor in parameters.items():
        assert tensor.dtype == dtype, name
        half_step = (
            torch.exp2(exact[name].abs().log2().floor()) * torch.finfo(dtype).eps / 2
        )
        assert (
            (tensor.double() - exact[name]).abs() <= half_step * 1.001 + 3e-7
        ).all(), name


def loaded(folder):
    answer = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = answer
    assert not any(
        info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    return model


CASES = """
llama       | true  | {} | {attention_bias: true} | bfloat16
qwen3       | false | {tie_word_embeddings: true} | {tie_word_embeddings: true} | float32
# untied there
qwen3       | false | {tie_word_embeddings: true} | {} | bfloat16
gemma3_text | true  | {} | {} | float32
qwen3_moe   | true  | {} | {} | bfloat16
"""
"""A family | whether embeddings have a trained product | changes of the base's config | of
the target's | the target's dtype."""


@each_row("family, product, of_base, of_target, stored", CASES)
def test_export_onto_adds_the_difference_to_the_target(
    tmp_path, target_folder, family, product, of_base, of_target, stored, monkeypatch
):
    """On a target with new tokens, in its own dtype, in files and in memory."""
    dtype = COMPUTE_DTYPES[stored]
    update = Update(tmp_path, family, parsed(product), **parsed(of_base))
    size = 128 + MORE_TOKENS
    target = tiny_model(family, 7, dtype, vocab_size=size, **parsed(of_target))
    target.save_pretrained(target_folder)
    monkeypatch.setattr("mora_ds.models.save.SHARD_BYTES", 20_000)
    merged = loaded(update.merge_onto_target())
    check(merged, expected(update, target), dtype)
    assert len(BaseCheckpoint.open(tmp_path / "merged").files()) > 1
    (target_folder / "tokenizer.json").symlink_to(
        tokenizer(tmp_path / "words", "ab") / "tokenizer.json"
    )
    in_memory = load_target(update.checkpoint, onto=target_folder).model
    for name, tensor in merged.named_parameters():
        assert torch.equal(in_memory.get_parameter(name), tensor), name
    changed = [
        name for name in update.weights if isinstance(update.change(name), Tensor)
    ]
    assert len(changed) == len(update.updates) + len(update.trained)


@pytest.mark.parametrize("scale", [0.0, 0.3, -1.0])
def test_the_update_is_scaled(tmp_path, target_folder, scale):
    update = Update(tmp_path, "llama", True)
    target = tiny_model("llama", seed=7)
    target.save_pretrained(target_folder)
    merged = loaded(update.merge_onto_target(delta_scale=scale))
    check(merged, expected(update, target, scale), torch.float32)
    card = (tmp_path / "merged/README.md").read_text()
    fingerprints = [
        BaseCheckpoint.open(folder).fingerprint()
        for folder in (update.base, target_folder)
    ]
    for words in (
        *fingerprints,
        str(update.base.resolve()),
        str(target_folder),
        f"| scale | {scale} |",
    ):
        assert words in card


def test_the_target_gets_the_longer_window_of_the_run(tmp_path, target_folder):
    """`--rope_scaling`: the model that is written computes with the run's positions, as
    does the one in memory.
    """
    target = tiny_model("llama", seed=7)
    changes = rope_changes(target.config, {"rope_type": "yarn", "factor": 4.0})
    update = Update(tmp_path, "llama", False, changes)
    target.save_pretrained(target_folder)
    tokenizer(target_folder, "ab")
    tokenizer(update.base, "ab")
    merged = loaded(update.merge_onto_target()).eval()
    by_hand = AutoModelForCausalLM.from_config(
        with_changes(copy.deepcopy(target.config), changes)
    )
    by_hand.load_state_dict(
        {name: tensor.float() for name, tensor in expected(update, target).items()}
    )
    ids = tokens(1, 300)
    with torch.no_grad():
        logits = merged(ids).logits
        torch.testing.assert_close(
            logits, by_hand.eval()(ids).logits, rtol=0, atol=1e-5
        )
        assert torch.equal(
            load_target(update.checkpoint, onto=target_folder).model(ids).logits,
            logits,
        )
        target.load_state_dict(merged.state_dict())
        assert (target.eval()(ids).logits - logits).abs().max() > 1e-3
    assert (
        merged.config.max_position_embeddings
        == 4 * target.config.max_position_embeddings
    )


# -- what stays the target's -----------------------------------------------------------


def tokenizer(folder, letters, **settings):
    """A tokenizer of words with a token for each letter, in their order; returns the
    folder.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        "<unk>": 0,
        **{letter: index for index, letter in enumerate(letters, start=1)},
    }
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", **settings
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def pair(tmp_path, target_folder):
    """A base with a tokenizer, its update, and in the folder "target" an instruct model
    with more tokens.
    """
    update = Update(tmp_path, "llama", False)
    tokenizer(update.checkpoint / "tokenizer", "abc")
    files.write_manifest(update.checkpoint)
    tokenizer(update.base, "cba")  # not what the run had
    instruct = tiny_model("llama", seed=7, vocab_size=128 + MORE_TOKENS)
    instruct.generation_config.temperature = 0.25
    instruct.generation_config.do_sample = True
    instruct.save_pretrained(target_folder)
    tokenizer(target_folder, "abcd", chat_template="{{ messages[0].content }}")
    return update


def test_tokenizer_template_and_settings_are_the_target_s(pair):
    merged = pair.merge_onto_target()
    known = AutoTokenizer.from_pretrained(merged)
    assert known.get_vocab() == {"<unk>": 0, "a": 1, "b": 2, "c": 3, "d": 4}
    assert (
        known.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        == "hi"
    )
    assert read_json(merged / "generation_config.json")["temperature"] == 0.25
    of_target = read_json(pair.folder / "target/config.json")
    assert read_json(merged / "config.json") == of_target
    card = (merged / "README.md").read_text()
    assert "perplexity" not in card.lower(), "the run's figures are another model's"


def test_the_command_measures_what_it_would_write(pair, tmp_path, out):
    target = pair.folder / "target"
    onto = ("--onto", target, "--delta_scale", 0.5)
    call("export", "--checkpoint", pair.checkpoint, "--output", out, *onto)
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a"}\n')
    scores = tmp_path / "scores.json"
    flags = f"--sets a={text} --document_start b --window 8 --json {scores}".split()
    with untouched(target):
        call("evaluate", pair.checkpoint, *onto, *flags)
    merged = load_target(out)
    score = evaluate(merged, load_corpus([str(text)]), Windows(8, 4, "b"))
    assert read_json(scores)["sets"]["a"]["nats"] == score.nats
    with user_error("--onto is for checkpoints"):
        call("evaluate", target, "--onto", target, *flags)


# -- errors ----------------------------------------------------------------------------


def assert_refused(update, words, target=None, **settings):
    target = target or update.folder / "target"
    with untouched(update.folder), user_error(words):
        export_merged(
            update.checkpoint, update.folder / "merged", onto=target, **settings
        )


def test_tokens_with_other_ids_are_named(pair):
    for letters, words in (
        ("acbd", r"2 token\(s\) .* 'b' \(2, here 3\), 'c' \(3, here 2\)"),
        ("ab", r"1 .*'c' \(3, here None"),
    ):
        tokenizer(pair.folder / "target", letters)
        assert_refused(pair, words)
    (pair.folder / "target/tokenizer.json").unlink()
    (pair.folder / "target/tokenizer_config.json").unlink()
    assert_refused(pair, "`onto`: the folder .* holds no tokenizer")


def test_what_does_not_fit_is_named(pair, tmp_path):
    def model(name, family="llama", **changes):
        tiny_model(family, seed=7, **changes).save_pretrained(tmp_path / name)
        return tmp_path / name

    layer = r"model\.layers\.1\."
    fewer = model("fewer", num_hidden_layers=1)
    assert_refused(
        pair,
        rf"lacks 9 tensor\(s\) of .*/base: {layer}\S+, {layer}\S+, {layer}[^,]+$",
        fewer,
    )
    wider = model("wider", intermediate_size=64)
    assert_refused(
        pair,
        r"6 tensor\(s\) of another shape than .*mlp.down_proj.weight \(32, 64\), not \(32, 56\); ",
        wider,
    )
    assert_refused(
        pair,
        r"2 tensor\(s\) .*lm_head.weight \(120, 32\), not \(128, 32\)",
        model("short", vocab_size=120),
    )
    relabeled = model("relabeled", vocab_size=136)
    config = read_json(relabeled / "config.json")
    files.write_json_atomic(relabeled / "config.json", {**config, "vocab_size": 128})
    assert_refused(pair, r"2 tensor\(s\) .*lm_head.weight \(136, 32\), not", relabeled)
    files.write_json_atomic(
        pair.folder / "target/config.json", {**config, "quantization_config": {}}
    )
    assert_refused(pair, "`onto`: .*has quantized weights")


def test_the_base_itself_and_a_check_of_logits_are_refused(pair, tmp_path):
    copied = Path(shutil.copytree(pair.base, tmp_path / "copy"))
    tokenizer(copied, "abc")
    assert_refused(pair, r"`onto` .*copy holds the weights of the base itself", copied)
    assert_refused(pair, "nor of another model", verify=True)
    with user_error("or is `onto`"):
        export_merged(
            pair.checkpoint,
            pair.folder / "target",
            onto=pair.folder / "target",
            overwrite=True,
        )


def test_a_scalar_has_the_same_shape_everywhere(tmp_path):
    """Apertus keeps those of its activation."""
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    config = AutoConfig.for_model("apertus", **shape, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    base = BaseCheckpoint.open(tmp_path)
    assert () in {base.shape_dtype(key)[0] for key in base.keys()}  # noqa: SIM118
    assert not list(onto.different_shapes(base, base, mock.Mock(keys={}), False))
