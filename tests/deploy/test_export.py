"""Export: fabricated checkpoints against models changed by hand, damage, kills, memory."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import OperatorKind
from mora_ds.checkpoint.adapter_files import BaseReference, write_adapter
from mora_ds.checkpoint.state import TrainerState
from mora_ds.common import files
from mora_ds.common.files import read_json
from mora_ds.common.tensor_files import COMPUTE_DTYPES
from mora_ds.deploy.export import export_merged
from mora_ds.models.base import BaseCheckpoint
from mora_ds.remora.ledger import LayerEntry, Ledger
from tests.helpers.adapters import Maker, summed
from tests.helpers.damage import cut, gone
from tests.helpers.errors import user_error
from tests.helpers.exports import fake_run
from tests.helpers.models import tiny_model
from tests.helpers.tables import each_row, parsed
from tests.helpers.tools import called

TOOL = Path(__file__).resolve().parents[2] / "tools/export_hf.py"


def check(run, output, dtype):
    """The export, loaded by plain transformers, has every expected value bit for bit, in
    `dtype`.
    """
    loaded = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert set(parameters) == set(run.expected)
    for name, tensor in parameters.items():
        assert tensor.dtype == dtype, name
        assert torch.equal(tensor, run.expected[name].to(dtype)), name
    changed = [
        name
        for name in run.expected
        if not torch.equal(run.expected[name], run.live.get_parameter(name))
    ]
    # The current MoRA matrices are in the export and not in the model's weights
    assert len(changed) == len(run.adapter.layers)


def assert_refused(run, output, words):
    """Words: a regular expression. Nothing is written."""
    with user_error(words):
        export_merged(run.checkpoint, output)
    assert not output.exists()


# -- what it writes --------------------------------------------------------------------

HEADS = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


SETTINGS = """
float32  | {family: llama}
bfloat16 | {family: llama, tie_word_embeddings: true, trained: [model.embed_tokens.weight, model.norm.weight]}
float16  | {family: llama, trained: [model.embed_tokens.weight, model.norm.weight, lm_head.weight]}
float32  | {family: llama, stored: bfloat16, shard: 20KB}
bfloat16 | {family: gpt2, trained: [transformer.wte.weight, transformer.ln_f.bias]}
float32  | {family: gpt_neox, trained: [lm_head.weight]}
float16  | {family: phi3, cycles: 0}
bfloat16 | {family: gemma3_text, stored: bfloat16}
float16  | {family: olmo2}
"""
"""The dtype of the run | the rest of `fake_run`."""


@each_row("dtype, settings", SETTINGS)
def test_export_is_the_model_changed_by_hand(tmp_path, merged, dtype, settings):
    run = fake_run(tmp_path, dtype=dtype, **parsed(settings))
    report = export_merged(run.checkpoint, merged, verify=True)
    check(run, merged, COMPUTE_DTYPES[dtype])
    assert report.files == ("model.safetensors",)
    written = load_file(merged / "model.safetensors")
    assert report.nbytes == sum(tensor.nbytes for tensor in written.values())
    assert report.comparison is not None
    assert report.comparison.error <= report.comparison.tolerance
    assert (report.merged, report.replaced) == (
        len(run.adapter.layers),
        len(run.adapter.trainables),
    )


def test_dtype_can_be_chosen(tmp_path, merged):
    """From a bfloat16 run to float32: the update is not rounded at all."""
    run = fake_run(tmp_path, stored="bfloat16", dtype="bfloat16")
    export_merged(run.checkpoint, merged, dtype="float32", verify=True)
    assert read_json(merged / "config.json")["dtype"] == "float32"
    ledger = Ledger.open(run.checkpoint / "ledger")
    base = BaseCheckpoint.open(run.base)
    exported = load_file(merged / "model.safetensors")
    for name, entry in run.adapter.layers.items():
        updates = [
            *ledger.mora_matrices_of(name),
            (entry.operator, run.mora_matrices[name]),
        ]
        assert torch.equal(
            exported[entry.weight],
            summed(base.read(entry.weight), updates, False, torch.float32),
        )


KEPT = """
bfloat16 | {family: deepseek_v3}
float16 | {family: gpt_oss}
"""
"""Routers at any dtype; norms where the model would be rounded from bfloat16."""


@each_row("dtype, settings", KEPT)
def test_what_transformers_keeps_in_fp32_stays_so(tmp_path, merged, dtype, settings):
    run = fake_run(tmp_path, dtype=dtype, **parsed(settings))
    export_merged(run.checkpoint, merged, verify=True)
    exported = load_file(merged / "model.safetensors")
    of_run, of_export = (
        {name: tensor for name, tensor in tensors if tensor.dtype == torch.float32}
        for tensors in (run.live.state_dict().items(), exported.items())
    )
    assert of_run
    torch.testing.assert_close(of_export, of_run, rtol=0, atol=0)


def test_stale_copy_of_a_tied_head_is_left_out(tmp_path, merged):
    """Files that hold lm_head.weight though it is tied: kept, it would come apart from the
    trained embedding.
    """
    run = fake_run(tmp_path, trained=HEADS[:1], tie_word_embeddings=True, twice=True)
    assert "lm_head.weight" in load_file(run.base / "model.safetensors")
    export_merged(run.checkpoint, merged, verify=True)
    assert "lm_head.weight" not in load_file(merged / "model.safetensors")
    check(run, merged, torch.float32)


def test_export_copies_tokenizer_and_config_files(tmp_path, merged):
    run = fake_run(tmp_path, dtype="bfloat16", trained=HEADS[1:2])
    export_merged(run.output, merged)
    written = read_json(merged / "config.json")
    assert written["dtype"] == "bfloat16"
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert (merged / "generation_config.json").exists()
    assert read_json(merged / "tokenizer_config.json") == {"from": "base"}
    card = (merged / "README.md").read_text()
    fingerprint = BaseCheckpoint.open(run.base).fingerprint()
    for words in (fingerprint, "| merges | 2 |", "| steps | 7 |", "rotate", "a \\| b"):
        assert words in card


def test_the_card_has_the_perplexities_of_a_run_that_ended_there(tmp_path, merged):
    run = fake_run(tmp_path, probe=False)
    state = TrainerState(
        perplexity_before={"code": 9.5},
        perplexity_last={"code": 8.25},
        finished=True,
    )
    files.write_json_atomic(run.checkpoint / "trainer_state.json", vars(state))
    adapter = replace(run.adapter, facts={"note": "two\nlines", "pair": [1, 2]})
    write_adapter(run.checkpoint, adapter, run.mora_matrices, {})
    files.write_manifest(run.checkpoint)
    export_merged(run.output, merged)
    card = (merged / "README.md").read_text()
    assert "| perplexity on code | 9.500 -> 8.250 |" in card
    assert "| note | two lines |" in card
    assert "| pair | [1, 2] |" in card
    not_the_end = {"finished": False}
    not_finite = {"perplexity_before": {"code": float("nan")}}
    for changes in (not_the_end, not_finite):
        content = {**vars(state), **changes}
        files.write_json_atomic(run.checkpoint / "trainer_state.json", content)
        files.write_manifest(run.checkpoint)
        export_merged(run.output, merged, overwrite=True)
        assert "perplexity" not in (merged / "README.md").read_text()


def test_export_finds_a_moved_base(tmp_path, merged):
    run = fake_run(tmp_path)
    moved = tmp_path / "elsewhere/base"
    moved.parent.mkdir()
    run.base.rename(moved)
    assert_refused(run, merged, r"`base_folder`: no such folder: .*/base")
    export_merged(run.checkpoint, merged, base_folder=moved)
    check(run, merged, torch.float32)
    tiny_model(seed=5).save_pretrained(tmp_path / "other")
    with user_error(r"`base_folder`: .*other is not the base of"):
        export_merged(
            run.checkpoint, tmp_path / "merged-2", base_folder=tmp_path / "other"
        )
    assert not (tmp_path / "merged-2").exists()


# -- damage and errors -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name, damage, words",
    [
        ("adapter.safetensors", cut, "adapter.safetensors"),
        ("adapter.json", gone, "missing|neither"),
        ("ledger/ledger.json", cut, "ledger.json"),
        ("base.json", gone, "missing"),
    ],
)
def test_damage_shows_without_a_manifest_too(tmp_path, merged, name, damage, words):
    """tests/checkpoint/test_damage.py tests damage with a manifest."""
    run = fake_run(tmp_path, probe=False)
    damage(run.checkpoint / name)
    (run.checkpoint / "manifest.json").unlink()
    assert_refused(run, merged, words)


def test_mora_matrix_on_one_of_two_tied_weights_is_refused(tmp_path, merged):
    run = fake_run(tmp_path, tie_word_embeddings=True, probe=False)
    spec = OperatorSpec(OperatorKind.SHARE, 32, 128, 4)
    layers = {**run.adapter.layers, "lm_head": LayerEntry("lm_head", False, spec)}
    mora_matrices = {**run.mora_matrices, "lm_head": torch.ones(4, 4)}
    write_adapter(
        run.checkpoint, replace(run.adapter, layers=layers), mora_matrices, {}
    )
    files.write_manifest(run.checkpoint)
    assert_refused(
        run,
        merged,
        r"lm_head\.weight is tied to model\.embed_tokens\.weight",
    )


def test_a_trained_tensor_of_another_shape_is_refused(tmp_path, merged):
    run = fake_run(tmp_path, trained=HEADS[1:2], probe=False)
    write_adapter(
        run.checkpoint, run.adapter, run.mora_matrices, {HEADS[1]: torch.ones(31)}
    )
    files.write_manifest(run.checkpoint)
    assert_refused(
        run,
        merged,
        r"norm\.weight has shape \(31,\) in the checkpoint, \(32,\) in the base",
    )
    keys = {**BaseReference.read(run.checkpoint).keys, HEADS[1]: "gone"}
    replace(BaseReference.read(run.checkpoint), keys=keys).write(run.checkpoint)
    files.write_manifest(run.checkpoint)
    assert_refused(
        run,
        merged,
        r"base\.json names no tensor of .* for model\.norm\.weight",
    )


def test_overwrite_needs_the_flag_and_never_deletes_inputs(tmp_path, merged):
    run = fake_run(tmp_path, probe=False)
    merged.mkdir()
    export_merged(run.checkpoint, merged)  # an empty folder is no loss
    (merged / "mine").write_text("")
    with user_error(r"`output` .* exists already"):
        export_merged(run.checkpoint, merged)
    with user_error(r"`output` .* holds mine besides a model; move that away"):
        export_merged(run.checkpoint, merged, overwrite=True)
    (merged / "mine").unlink()
    (merged / "model-00009.safetensors").write_text("")
    export_merged(run.checkpoint, merged, overwrite=True)
    assert not (merged / "model-00009.safetensors").exists()
    assert not list(tmp_path.glob(".merged*"))
    for inside in ("merged", "ledger/merged"):
        with user_error("lies in the checkpoint"):
            export_merged(run.checkpoint, run.checkpoint / inside)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_text("")
    for path, words in (
        (run.base, "holds the base"),
        (run.output, "holds the base or"),
        (tmp_path, "holds the base"),
    ):
        with user_error(words):
            export_merged(run.checkpoint, path, overwrite=True)
    with user_error("something other than a model"):
        export_merged(run.checkpoint, tmp_path / "photos", overwrite=True)
    (tmp_path / "link").symlink_to("merged")
    with user_error("link exists and is not a folder"):
        export_merged(run.checkpoint, tmp_path / "link", overwrite=True)


# -- the program -----------------------------------------------------------------------


@pytest.mark.heavy
def test_the_program_of_a_checkout_exports_from_anywhere(tmp_path, merged):
    """How it ends where it cannot: tests/runtime/test_cli.py,
    tests/config/test_bad_tool_calls.py.
    """
    run = fake_run(tmp_path)
    flags = f"--checkpoint {run.output}/checkpoints/latest --output {tmp_path}/merged --verify"
    environment = {**os.environ}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, TOOL, *flags.split()]
    done = called(command, cwd="/", env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "merged 14 layers from 2 ledger cycle(s)" in done.stdout
    assert "tolerance" in done.stdout
    check(run, merged, torch.float32)


# -- memory ----------------------------------------------------------------------------

MEASURE = """
import sys, threading, time
from pathlib import Path
from mora_ds.deploy.export import export_merged

def anonymous_mib():  # what the process itself holds; mapped files are the page cache's
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def watch():
    while not done.is_set():
        peaks.append(anonymous_mib())
        time.sleep(0.002)

import torch
torch.ones(256, 256) @ torch.ones(256, 256)
done, peaks, before = threading.Event(), [], anonymous_mib()
thread = threading.Thread(target=watch)
thread.start()
export_merged(Path(sys.argv[1]), Path(sys.argv[2]))
done.set()
thread.join()
print(max(peaks) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_that_of_a_few_tensors(tmp_path, base_folder, merged):
    """112 MiB in 28 tensors of 4 MiB, in one file: the export may hold some of them, never
    the model.
    """
    wide = {"hidden_size": 1024, "intermediate_size": 1024, "num_key_value_heads": 4}
    maker = Maker(tiny_model(num_hidden_layers=4, **wide), base_folder)
    maker.write(tmp_path / "step", MoRAConfig(rank=8, operator="rotate"), cycles=1)
    command = [sys.executable, "-c", MEASURE, tmp_path / "step", merged]
    done = called(command, cwd=TOOL.parent.parent, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 90, done.stdout  # about 37
    assert set(load_file(merged / "model.safetensors")) == set(maker.weights)
