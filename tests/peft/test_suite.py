"""PEFT's own generic matrix: MoRA passes what LoRA passes, but for the rows of a table."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.helpers import peft_suite
from tests.helpers.tables import rows

ROOT = Path(__file__).resolve().parents[2]

GAPS = """
test_adding_multiple_adapters_with_bias_raises: skipped | bias | MoRA trains no biases
test_save_load_roundtrip_fsdp_wrapped_learnable_bias: skipped | bias | MoRA trains no biases
test_mixed_adapter_batches: skipped | adapter_names | all rows of a batch have the same adapters
test_generate_with_mixed_adapter_batches: skipped | adapter_names | all rows of a batch have the same adapters
test_merge_layers: skipped | Conv1D | PEFT lists the methods that it tries on GPT-2; test_peft.py merges there
test_merge_layers_nan: skipped | Conv1D | the same
test_merge_layers_fp16: skipped | Conv1D | the same
test_generate_half_prec: skipped | Conv1D | the same
test_training_decoders_layer_indexing: skipped | Conv1D | the same
test_peft_model_device_map: skipped | Conv1D | the same
test_weighted_combination_of_adapters: skipped | add_weighted_adapter | it tries combinations of factors
"""
"""A test of PEFT that LoRA passes, and what MoRA does | what the guide calls it | why"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    try:
        return peft_suite.run(tmp_path_factory.mktemp("suite"))
    except subprocess.CalledProcessError:
        pytest.skip("PEFT's source distribution cannot be downloaded")


@pytest.mark.heavy
def test_mora_passes_what_lora_passes(outcomes):
    passed = sum(mora == "passed" for mora, _ in outcomes.values())
    assert passed > 500
    tests = [test for test, _, _ in rows(GAPS)]
    assert sorted(peft_suite.gaps(outcomes)) == sorted(tests), (
        "a new gap, or a stale row"
    )


def test_the_guide_names_the_gaps_and_nothing_else():
    guide = (ROOT / "docs/guides/peft.md").read_text()
    sentence = guide.partition("except those of")[2].partition("skip it.")[0]
    gaps = {setting for _, setting, _ in rows(GAPS)}
    assert set(re.findall("`(.+?)`", sentence)) == gaps
