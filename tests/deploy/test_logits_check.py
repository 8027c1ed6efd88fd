"""The logits of an export against those that the live model left in the checkpoint."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mora_ds.adapters.ops.updates import merged_weight
from mora_ds.common import files
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.tensor_files import COMPUTE_DTYPES, write_safetensors_atomic
from mora_ds.deploy.export import export_merged
from mora_ds.deploy.logits_check import compare, compare_logits
from mora_ds.remora import stored_weights
from tests.helpers.errors import run_error, user_error
from tests.helpers.exports import fake_run
from tests.helpers.models import with_own_code
from tests.helpers.tables import each_row


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fault", ["matrix forgotten", "cycle forgotten"])
def test_verify_finds_a_wrong_export(tmp_path, merged, dtype, fault, monkeypatch):
    run = fake_run(tmp_path, dtype=dtype)

    def wrong(original, updates, *rest):
        updates = list(updates)
        return merged_weight(
            original,
            updates[:-1] if fault == "matrix forgotten" else updates[1:],
            *rest,
        )

    monkeypatch.setattr(stored_weights, "merged_weight", wrong)
    with run_error(r"does not match: logits .* error"):
        export_merged(run.checkpoint, merged, verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_code_of_the_model_is_run_where_that_is_allowed(tmp_path, merged, monkeypatch):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    run = fake_run(tmp_path, dtype="bfloat16")
    with_own_code(run.base, run.base)
    export_merged(run.checkpoint, tmp_path / "plain")
    assert (tmp_path / "plain/modeling_own.py").is_file()
    with user_error(
        r"base.*it needs its remote code: allow it with --trust_remote_code"
    ):
        export_merged(run.checkpoint, tmp_path / "refused", verify=True)
    export_merged(run.checkpoint, merged, verify=True, trust_remote_code=True)
    assert not (tmp_path / "refused").exists()
    assert (merged / "modeling_own.py").is_file()


def test_verify_needs_a_probe_and_says_so_first(tmp_path, merged):
    run = fake_run(tmp_path, probe=False)
    with user_error(r"`verify` needs probe\.safetensors"):
        export_merged(run.checkpoint, merged, verify=True)
    assert export_merged(run.checkpoint, merged).comparison is None


TOLERANCES = """
float32  | 8 | 0.5 | 1e-5
float32  | 8 | 4.0 | 4e-5
# 2 eps sqrt(layers + 1)
bfloat16 | 3 | 4.0 | 0.03125
float16  | 8 | 4.0 | 0.005859375
"""
"""A dtype | layers | the largest logit | the tolerance."""


@each_row("name, layers, largest, tolerance", TOLERANCES)
def test_tolerance(name, layers, largest, tolerance):
    """The tolerance is absolute in fp32, otherwise relative to the norm of all
    logits."""
    dtype = COMPUTE_DTYPES[name]
    live = torch.tensor([float(largest), -0.1, 0.2])
    exported = live + torch.tensor([0.0, 3e-3, -4e-3])
    comparison = compare(live, exported, dtype, int(layers))
    assert comparison.tolerance == pytest.approx(float(tolerance), rel=1e-6)
    relative = 5e-3 / live.norm().item()
    assert comparison.error == pytest.approx(
        4e-3 if dtype is torch.float32 else relative, rel=1e-3
    )


def test_the_coarser_dtype_of_run_and_export_counts(tmp_path, merged):
    run = fake_run(tmp_path, dtype="bfloat16")
    report = export_merged(run.checkpoint, merged, dtype="float32", verify=True)
    assert report.comparison.tolerance == pytest.approx(2 * 2**-7 * 3**0.5)


def test_incomparable_exports_are_named(tmp_path, merged):
    run = fake_run(tmp_path)
    export_merged(run.checkpoint, merged)
    full = load_file(run.checkpoint / "probe.safetensors")
    one_row = {
        "input_ids": full["input_ids"].flatten(),
        "logits": full["logits"].flatten(0, 1),
    }
    wider = {"logits": torch.nn.functional.pad(full["logits"], (0, 1))}
    for change, error, words in (
        (one_row, UserError, "tokens of shape"),
        ({"input_ids": full["input_ids"].float()}, UserError, "holds tokens of shape"),
        (wider, RunError, "the export gives logits of shape"),
    ):
        write_safetensors_atomic(
            tmp_path / "probe.safetensors", {**full, **change}, {"dtype": "float32"}
        )
        with pytest.raises(error, match=words):
            compare_logits(merged, tmp_path / "probe.safetensors", torch.float32)
    tensors = load_file(merged / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})
    with run_error(r"the export lacks weights: .*lm_head\.weight"):
        compare_logits(merged, run.checkpoint / "probe.safetensors", torch.float32)


def test_nan_logits_do_not_pass(tmp_path, merged):
    run = fake_run(tmp_path)
    probe = load_file(run.checkpoint / "probe.safetensors")
    probe["logits"] = probe["logits"].clone()
    probe["logits"][0, 0, 0] = float("nan")
    write_safetensors_atomic(
        run.checkpoint / "probe.safetensors", probe, {"dtype": "float32"}
    )
    files.write_manifest(run.checkpoint)
    with run_error("does not match"):
        export_merged(run.checkpoint, merged, verify=True)
