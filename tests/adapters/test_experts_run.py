"""Runs that adapt the experts of a mixture: ranks, merges, resume, exports, files, and what
is refused.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from mora_ds.adapters.inject import mora_layers
from mora_ds.common.files import read_json
from mora_ds.deploy.adapter_io import export_adapter, load_adapter
from mora_ds.deploy.export import export_merged
from mora_ds.deploy.peft_export import export_peft
from tests.helpers.errors import user_error
from tests.helpers.jobs import VOCABULARY, assert_close_losses, run
from tests.helpers.models import tiny_model, tokens
from tests.helpers.outcome import assert_good
from tests.helpers.resume import (
    assert_close_runs,
    assert_same_run,
    stop_and_resume,
)
from tests.helpers.tables import each_row

MERGING = (
    "--target_modules all-linear experts --mora_rank 4 --operator share --max_steps 6 --eval_steps 100",
    "--merge_every 2 --restart_warmup_steps 1 --save_steps 3",
)


def mixture(user, folder, family):
    """A model folder with the user's tokenizer, its weights in several files."""
    tiny_model(family, vocab_size=VOCABULARY).save_pretrained(
        folder, max_shard_size="100KB"
    )
    for path in user.model.glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def model_folder(user, tmp_path_factory):
    return mixture(user, tmp_path_factory.mktemp("mixture") / "model", "qwen3_moe")


@pytest.fixture(scope="module")
def reference(user, model_folder, tmp_path_factory):
    """Two ranks, two merges, and an unmerged cycle."""
    out = tmp_path_factory.mktemp("reference")
    summary = run(2, user.flags(out, "--model_name_or_path", model_folder, *MERGING))
    assert summary["merges"] == 2
    assert summary["base_bytes_gathered"] == 0
    assert not (out / "base").exists(), (
        "the files hold the experts: nothing is written twice"
    )
    return out


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens(2, vocab=VOCABULARY)).logits


def test_one_rank_has_the_losses_and_matrices_of_two(
    user, model_folder, reference, tmp_path
):
    """Each rank holds half of every stack of matrices."""
    flags = ("--model_name_or_path", model_folder, *MERGING)
    run(
        1,
        user.flags(
            tmp_path, *flags, "--per_device_train_batch_size 4 --gradient_checkpointing"
        ),
    )
    assert_close_runs(tmp_path, reference)
    latest = reference / "checkpoints/latest"
    elements = sum(
        matrix.numel() for matrix in load_file(latest / "adapter.safetensors").values()
    )
    # fp32 master weights and two moments, random states, and a header
    random_state = torch.get_rng_state().numel()
    for shard in (latest / "engine").glob("rank-*.safetensors"):
        assert 0 < shard.stat().st_size - 12 * elements // 2 - random_state < 1000


def test_a_killed_run_is_the_uninterrupted_one_to_the_bit(
    user, model_folder, reference, tmp_path
):
    out = tmp_path / "killed"
    stop_and_resume(
        2, user.flags(out, "--model_name_or_path", model_folder, *MERGING), 4
    )
    assert_same_run(out, reference)


def test_exports_are_the_merged_model_in_the_files_of_the_base(
    model_folder, reference, tmp_path, merged
):
    report = export_merged(reference, merged, verify=True)
    assert report.comparison is not None
    assert_good(reference)
    assert_good(reference / "ledger")
    names = read_json(model_folder / "model.safetensors.index.json")[
        "weight_map"
    ].keys()
    assert load_file(merged / "model.safetensors").keys() == names, (
        "each expert under its own name"
    )
    plain = AutoModelForCausalLM.from_pretrained(merged).eval()
    export_adapter(reference, tmp_path / "adapter")
    loaded = load_adapter(model_folder, tmp_path / "adapter")
    assert_close(logits(plain), logits(loaded), rtol=1e-4, atol=1e-5)
    for name, layer in mora_layers(loaded).items():
        # A stack: live + the unmerged cycle = exported
        if layer.spec.weight_name(name) == name:
            delta = layer.spec.delta_weight(layer.mora_matrix.data)
            assert_close(
                plain.get_parameter(name).data,
                layer.weight + delta,
                rtol=1e-5,
                atol=1e-6,
            )


def test_experts_are_refused_as_an_adapter_of_peft(reference, tmp_path):
    with user_error(r"experts\.gate_up_proj are experts, which PEFT"):
        export_peft(reference, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


OTHERS = """
mixtral | --bf16
mixtral | --target_modules experts.down_proj --base_device host
qwen3_moe | --deepspeed configs/zero1.json --operator decouple
mixtral | --deepspeed configs/zero2.json --operator rotate --base_bits 8
deepseek_v3 | --operator truncate
gpt_oss | --operator decouple --base_bits 8 --gradient_checkpointing
"""


@pytest.mark.heavy
@each_row("family, more", OTHERS)
def test_other_families_and_settings(user, tmp_path, merged, family, more):
    folder = mixture(user, tmp_path / "model", family)
    flags = ("--model_name_or_path", folder, *MERGING, more)
    assert run(2, user.flags(tmp_path / "two", *flags))["base_bytes_gathered"] == 0
    run(1, user.flags(tmp_path / "one", *flags, "--per_device_train_batch_size 4"))
    if "--bf16" in more:
        assert_close_losses(tmp_path / "two", tmp_path / "one", rtol=1e-2)
    else:
        assert_close_runs(tmp_path / "two", tmp_path / "one")
    export_merged(tmp_path / "two", merged, verify=True)
    out = tmp_path / "killed"
    stop_and_resume(2, user.flags(out, *flags), 1, 4)
    assert_same_run(out, tmp_path / "two")


@pytest.mark.heavy
def test_rows_that_ranks_share_give_the_losses_of_complete_rows(user, tmp_path):
    folder = mixture(user, tmp_path / "model", "mixtral")
    settings = ("--model_name_or_path", folder, *MERGING)
    run(2, user.flags(tmp_path / "split", *settings, "--sequence_parallel_size 2"))
    run(1, user.flags(tmp_path / "one", *settings))
    assert_close_losses(tmp_path / "split", tmp_path / "one", rtol=1e-4)
