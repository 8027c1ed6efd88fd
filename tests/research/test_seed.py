"""configs/recipes/seed.yaml trains the demo's model: a plan by gradients, matrices between
singular vectors, and the alignment loss at once."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mora_ds.checkpoint.verify import verify
from mora_ds.common.files import read_json
from mora_ds.data import load_tokenizer
from mora_ds.deploy.export import export_merged
from mora_ds.deploy.peft_export import export_peft
from mora_ds.research.targets import read_plan
from mora_ds.train.demo import MODEL_CONFIG
from tests.helpers.jobs import REPOSITORY, losses, run
from tests.helpers.jobs import rows as rows_of
from tests.helpers.mistakes import command
from tests.helpers.resume import assert_same_run, stop_and_resume

RECIPE = REPOSITORY / "configs/recipes/seed.yaml"
SMALL = (
    "--seq_len 64 --max_steps 30 --merge_every 10 --restart_warmup_steps 2 --warmup_steps 3 "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --learning_rate 2e-2 "
    "--save_steps 8 --save_total_limit 9 --eval_steps 15 --logging_steps 1"
)


@pytest.mark.heavy(seconds=240)
def test_all_three_at_once(user, tmp_path, monkeypatch):
    """Two ranks: trained, merged, resumed to the bit, on one rank too, and exported. The
    model has the demo's shape, and starts from random weights."""
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "demo"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL_CONFIG))
    model.save_pretrained(base)
    load_tokenizer(user.model).save_pretrained(base)
    probe = f"--probe {user.train} --probe_batches 4 --window 64"
    plan = f"{base} {probe} --trainable_budget 1% --write targets.yaml"
    assert command("analyze", plan.split()) == (0, "")

    def flags(out, more=SMALL):
        files = f"--train_files {user.train} --eval_files held={user.held}"
        rest = f"--model_name_or_path {base} {files} --output_dir {out} {more}"
        return [str(RECIPE), *rest.split()]

    out = tmp_path / "out"
    summary = run(2, flags(out))
    assert (summary["merges"], summary["base_bytes_gathered"]) == (2, 0)
    before = summary["perplexity_before"]["held"]
    assert summary["perplexity_after"]["held"] < 0.97 * before, "it learns"
    shares = [row["alignment"] for row in rows_of(out) if "alignment" in row]
    assert shares[0] == 0 < shares[-1]
    latest = out / "checkpoints/latest"
    layers = read_json(latest / "adapter.json")["layers"]
    sides = {name: layer["operator"]["r_hat"] for name, layer in layers.items()}
    planned = read_plan(tmp_path / "targets.yaml").layers
    assert sides == {name: side for name, side in planned.items() if side}

    resumed = tmp_path / "resumed"
    stop_and_resume(2, flags(resumed), 10, 17)
    assert_same_run(resumed, out)
    alone = tmp_path / "alone"
    single = SMALL.replace("train_batch_size 2", "train_batch_size 4")
    resume = f"--resume_from_checkpoint {out}/checkpoints/step-000016"
    run(1, flags(alone, f"{single} {resume}"))
    # In bf16, with sums in another order
    torch.testing.assert_close(losses(alone), losses(out)[16:], rtol=2e-3, atol=0)
    assert all(verdict.is_good for verdict in verify(out, base))
    export_merged(out, tmp_path / "merged", verify=True)
    export_peft(out, tmp_path / "lora")
