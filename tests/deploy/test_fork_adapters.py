"""MoRA adapters of kongds's fork of PEFT: they compute what its formulas say, live and
merged, or are refused.
"""

import json
import math
import resource
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from mora_ds.common.tensor_files import SafetensorsWriter
from mora_ds.deploy.adapter_io import load_adapter
from mora_ds.deploy.fork_adapters import TYPES, convert_fork
from tests.helpers.damage import cut
from tests.helpers.errors import user_error
from tests.helpers.models import tiny_model, tokens
from tests.helpers.tables import each_row, parsed
from tests.helpers.tools import call

RANK = 3
EQUAL_SIDES = ("q_proj", "o_proj", "gate_proj", "up_proj")
"""Layers of which type 6 drops no input."""
NARROWING = ("k_proj", "v_proj", "down_proj")


def compress(kind, x, side):
    """(..., d_in) -> (..., side), or (..., blocks, side) for type 6: the fork's sums over
    inputs.
    """
    d_in = x.shape[-1]
    if kind in (2, 3):
        return torch.stack(
            [part.sum(-1) for part in x.tensor_split(side, dim=-1)], dim=-1
        )
    blocks = x[..., torch.arange(math.ceil(d_in / side) * side) % d_in].unflatten(
        -1, (-1, side)
    )
    if kind in (1, 4):
        return blocks.sum(-2)
    frequencies = 10000.0 ** (-torch.arange(0, side, 2).double() / side)
    angles = torch.outer(torch.arange(blocks.shape[-2]).double(), frequencies).repeat(
        1, 2
    )
    halves = blocks.tensor_split(2, dim=-1)
    return (
        blocks * angles.cos()
        + torch.cat([-halves[1], halves[0]], dim=-1) * angles.sin()
    ).to(x.dtype)


def decompress(kind, z, d_out):
    """The fork's copies to outputs."""
    if kind in (2, 4):
        copies = [len(part) for part in torch.arange(d_out).tensor_split(z.shape[-1])]
        return z.repeat_interleave(torch.tensor(copies), dim=-1)
    flat = z.flatten(-2) if kind == 6 else z
    return flat[..., torch.arange(d_out) % flat.shape[-1]]


class Fork:
    """An adapter as the fork saves it, and the model that it was trained on."""

    def __init__(self, folder, kind, targets, **settings):
        self.path = folder / "fork"
        self.path.mkdir()
        self.model = tiny_model().eval()
        self.base = folder / "base"
        self.model.save_pretrained(self.base)
        self.config = {"peft_type": "LORA", "fan_in_fan_out": False}
        tensors = {}
        generator = torch.Generator().manual_seed(1)
        for name, layer in self.model.named_modules():
            if name.rpartition(".")[2] not in targets:
                continue
            side = int(math.sqrt((layer.in_features + layer.out_features) * RANK) + 0.5)
            side -= side % 2 if kind == 6 else 0
            matrix = 0.1 * torch.randn(side, side, generator=generator)
            for half in "AB":
                tensors[f"base_model.model.{name}.lora_{half}.weight"] = matrix.clone()
            layer.register_forward_hook(self.hook(kind, matrix, layer.out_features))
        save_file(tensors, self.path / "adapter_model.safetensors", {"format": "pt"})
        self.write(
            base_model_name_or_path=str(self.base),
            r=RANK,
            use_mora=True,
            mora_type=kind,
            **settings,
        )

    @staticmethod
    def hook(kind, matrix, d_out):
        def add(_, inputs, output):
            return output + decompress(
                kind, compress(kind, inputs[0], len(matrix)) @ matrix.T, d_out
            )

        return add

    def write(self, **changes):
        self.config |= changes
        (self.path / "adapter_config.json").write_text(json.dumps(self.config))

    def logits(self):
        with torch.no_grad():
            return self.model(tokens(2)).logits


@pytest.mark.parametrize("kind", TYPES)
def test_outputs_are_those_of_the_fork_live_and_merged(tmp_path, kind):
    fork = Fork(
        tmp_path, kind, EQUAL_SIDES if kind == 6 else (*EQUAL_SIDES, *NARROWING)
    )
    call("convert", "mora", fork.path, "--output", tmp_path / "adapter")
    expected = fork.logits()
    bare = AutoModelForCausalLM.from_pretrained(fork.base).eval()
    fork.base.rename(moved := tmp_path / "moved")
    places = f"--checkpoint {fork.path} --base {moved} --output {tmp_path / 'merged'}"
    call("export", *places.split())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        live = load_adapter(moved, tmp_path / "adapter")(tokens(2)).logits
        assert_close(live, expected, rtol=0, atol=1e-5)
        assert_close(merged(tokens(2)).logits, expected, rtol=0, atol=1e-5)
        assert (bare(tokens(2)).logits - expected).abs().max() > 1e-3


def assert_refused(fork, words):
    output = fork.path.parent / "adapter"
    with user_error(words):
        convert_fork(fork.path, output)
    assert not output.exists()


@pytest.mark.parametrize("target", NARROWING)
def test_inputs_that_the_fork_drops_are_refused(tmp_path, target):
    fork = Fork(tmp_path, 6, (target,))
    assert_refused(
        fork,
        rf"mora_type 6 leaves inputs of .*{target} \(\d+ inputs, \d+ outputs\) without any effect",
    )


SETTINGS = r"""
{mora_type: 5} | unknown mora_type '5'; known: 1, 2, 3, 4, 6
{mora_type: rope} | mora_type
{use_dora: true} | use_dora is not read
{fan_in_fan_out: true} | fan_in_fan_out is not read
{modules_to_save: [lm_head]} | modules_to_save is not read
{base_model_name_or_path: /gone} | no such folder: /gone
{use_mora: false} | is not of MoRA \(use_mora\)
"""


@each_row("changes, words", SETTINGS)
def test_settings_that_are_not_read_are_refused(tmp_path, changes, words):
    fork = Fork(tmp_path, 1, EQUAL_SIDES)
    fork.write(**parsed(changes))
    assert_refused(fork, words)


TENSORS = r"""
# with good ones, and alone
model.layers.0.self_attn.q_proj.lora_B | [14, 14] | true | is no matrix of MoRA
model.layers.0.self_attn.q_proj.lora_A | [3, 32] | true | is no matrix of MoRA
model.layers.0.self_attn.q_proj.lora_C | [14, 14] | true | is no matrix of MoRA
lm_head | [14, 14] | true | is no matrix of MoRA
model.layers.7.mlp.up_proj.lora_A | [14, 14] | false | has no linear layer model\.layers\.7\.mlp\.up_proj
model.norm.lora_A | [14, 14] | false | has no linear layer model\.norm
model.layers.0.self_attn.q_proj.lora_A | [64, 64] | false | a matrix of side 64 is too large for model.layers.0
"""


@each_row("name, shape, with_good, words", TENSORS)
def test_what_is_more_than_matrices_is_refused(tmp_path, name, shape, with_good, words):
    fork = Fork(tmp_path, 1, EQUAL_SIDES)
    path = fork.path / "adapter_model.safetensors"
    good = load_file(path) if parsed(with_good) else {}
    tensor = torch.zeros(parsed(shape))
    save_file({**good, f"base_model.model.{name}.weight": tensor}, path)
    assert_refused(fork, words)


def test_a_sparse_file_is_not_expanded(tmp_path):
    """6.4 GB of holes, which take no disk."""
    fork = Fork(tmp_path, 1, EQUAL_SIDES)
    path = fork.path / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    layout = {name: ((40_000, 40_000), torch.float32)}
    with suppress(ValueError), SafetensorsWriter(path, layout, {}):
        pass
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused(fork, "a matrix of side 40000 is too large for")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300e3, "kB"


def test_an_adapter_without_matrices_and_a_file_that_is_cut_off_are_refused(tmp_path):
    fork = Fork(tmp_path, 1, EQUAL_SIDES)
    path = fork.path / "adapter_model.safetensors"
    save_file({}, path)
    assert_refused(fork, "holds no matrix")
    cut(path)
    assert_refused(fork, "truncated or damaged")


def test_other_commands_say_how_such_an_adapter_is_read(tmp_path):
    fork = Fork(tmp_path, 1, EQUAL_SIDES)
    with user_error("mora-ds convert mora reads"):
        load_adapter(fork.base, fork.path)
