"""--dry_run: a plan from the flags and the model's config, which says what a run says at
its start.
"""

import json

from mora_ds.common.errors import UserError
from mora_ds.config.arguments import parse
from mora_ds.config.validate import validate
from mora_ds.planning import step
from mora_ds.planning.report import as_json
from mora_ds.train.dry_run import dry_run, planned
from tests.helpers.errors import user_error
from tests.helpers.models import FAMILIES


def planned_with(flags, world=1):
    return planned(parse(flags.split()), world)[0]


def dry_run_of(folder, family="llama"):
    """Flags of a dry run of a model of which there is a config alone."""
    config = folder / "config.json"
    config.write_text(json.dumps({"model_type": family, **FAMILIES[family]}))
    return f"--dry_run --model_name_or_path {config}"


def test_a_dry_run_reads_a_config_and_nothing_else(tmp_path):
    flags = f"{dry_run_of(tmp_path)} --mora_rank 4"
    validate(parse(flags.split()))
    plan = planned_with(flags, world=2)
    assert as_json(plan)["gpus"] == 2
    assert plan.gathered > 0
    assert plan.base_elements > 0
    with user_error("does not divide the 3 ranks"):
        planned_with(f"{flags} --tensor_parallel_size 2", world=3)


def test_a_model_that_cannot_be_planned_names_what_may_help(tmp_path, monkeypatch):
    """Which kernels torch's meta device has differs with torch's version: 2.13 has the
    grouped product of experts in bf16 alone, 2.15 in float32 too."""
    flags = dry_run_of(tmp_path, "mixtral")
    planned_with(f"{flags} --bf16")
    with user_error(r"cannot be planned .*FlexAttention is only supported on"):
        planned_with(f"{flags} --bf16 --attn_implementation flex_attention")

    def without_kernel(*_):
        raise RuntimeError("Expected mat_a to be BFloat16")

    monkeypatch.setattr(step, "token_nll", without_kernel)
    with user_error(
        r"cannot be planned \(--dry_run, mora-ds plan\) in torch.float32, --bf16 may "
        "help: Expected mat_a to be BFloat16"
    ):
        planned_with(flags)


def test_a_plan_says_what_the_run_itself_would_refuse(tmp_path, monkeypatch):
    def raise_validation_errors(*_):
        raise UserError("--base_bits 8: this model casts activations")

    monkeypatch.setattr(step, "token_nll", raise_validation_errors)
    with user_error(r"^--base_bits 8: this model casts activations$"):
        planned_with(dry_run_of(tmp_path))


def test_a_config_that_does_not_exist_is_answered_with_those_that_do():
    with user_error("no such file; mora_ds comes with .*configs/models/llama3_8b.json"):
        planned_with("--dry_run --model_name_or_path configs/models/llama_7b.json")


def test_a_dry_run_wants_a_model(tmp_path):
    with user_error("--dry_run plans the run of a model: name one"):
        planned_with(f"--dry_run --output_dir {tmp_path}")


def test_a_dry_run_checks_the_name_of_the_repository(tmp_path):
    with user_error("--push_to_hub a/b/c"):
        dry_run(parse(f"{dry_run_of(tmp_path)} --push_to_hub a/b/c".split()))
