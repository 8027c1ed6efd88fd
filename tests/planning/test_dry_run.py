"""--dry_run: a plan from the flags and the model's config, which says what a run says at
its start.
"""

import json

from mora_ds.common.errors import UserError
from mora_ds.config.arguments import parse
from mora_ds.config.validate import validate
from mora_ds.planning import step
from mora_ds.planning.report import as_json
from mora_ds.train.dry_run import planned
from tests.helpers.errors import user_error
from tests.helpers.models import FAMILIES


def dry_run_of(folder, family="llama"):
    """Flags of a dry run of a model of which there is a config alone."""
    config = folder / "config.json"
    config.write_text(json.dumps({"model_type": family, **FAMILIES[family]}))
    return ["--model_name_or_path", str(config), "--dry_run"]


def test_a_dry_run_reads_a_config_and_nothing_else(tmp_path):
    flags = [*dry_run_of(tmp_path), "--mora_rank", "4"]
    validate(parse(flags))
    plan, _ = planned(parse(flags), world=2)
    assert as_json(plan)["gpus"] == 2
    assert plan.gathered > 0
    assert plan.base_elements > 0
    with user_error("does not divide the 3 ranks"):
        planned(parse([*flags, "--tensor_parallel_size", "2"]), world=3)


def test_a_model_that_cannot_be_planned_names_what_may_help(tmp_path):
    """The meta device has torch's grouped product of experts in bf16 alone."""
    flags = dry_run_of(tmp_path, "mixtral")
    with user_error(
        r"cannot be planned \(--dry_run, mora-ds plan\) in torch.float32, --bf16 may"
    ):
        planned(parse(flags), world=1)
    planned(parse([*flags, "--bf16"]), world=1)
    with user_error(r"cannot be planned .*FlexAttention is only supported on"):
        planned(
            parse([*flags, "--bf16", "--attn_implementation", "flex_attention"]), world=1
        )


def test_a_plan_says_what_the_run_itself_would_refuse(tmp_path, monkeypatch):
    def refuse(*_):
        raise UserError("--base_bits 8: this model casts activations")

    monkeypatch.setattr(step, "token_nll", refuse)
    with user_error(r"^--base_bits 8: this model casts activations$"):
        planned(parse(dry_run_of(tmp_path)), world=1)


def test_a_dry_run_wants_a_model(tmp_path):
    with user_error("--dry_run plans the run of a model: name one"):
        planned(parse(["--dry_run", "--output_dir", str(tmp_path)]), world=1)
