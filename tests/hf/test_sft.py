"""trl's SFTTrainer with MoRA: 20 steps with two merges on two ranks, exported and
verified.
"""

from pathlib import Path

import pytest
import torch.distributed as dist
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import mora_ds
from mora_ds.deploy.export import export_merged
from mora_ds.hf import MoRACallback, MoRATrainer
from tests.helpers import hf
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import playground

pytestmark = pytest.mark.heavy


def fine_tuned(root):
    from trl import SFTConfig, SFTTrainer

    class Trainer(MoRATrainer, SFTTrainer):
        """The code that a user writes."""

    if dist.get_rank() == 0:
        playground(Path(root))
    dist.barrier()
    text = Dataset.from_json(
        f"{root}/train.jsonl", cache_dir=f"{root}/cache-{dist.get_rank()}"
    )
    args = SFTConfig(
        output_dir=f"{root}/out",
        deepspeed=hf.ds_config(),
        per_device_train_batch_size=2,
        max_steps=20,
        max_length=64,
        learning_rate=1e-2,
        packing=True,
        save_steps=10,
        eval_strategy="steps",
        eval_steps=10,
        logging_steps=5,
        report_to=[],
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=True,
    )
    trainer = Trainer(
        f"{root}/model",
        args,
        train_dataset=text,
        eval_dataset=text.select(range(8)),
        processing_class=AutoTokenizer.from_pretrained(f"{root}/model"),
        mora=mora_ds.MoRAConfig(rank=4),
        callbacks=[MoRACallback(merge_every=8, restart_warmup_steps=2)],
    )
    trainer.train()
    trainer.save_model(f"{root}/saved")
    history = trainer.state.log_history
    return {
        "merges": trainer.run.state.merges,
        "losses": [row["loss"] for row in history if "loss" in row],
        "evaluated": [row["eval_loss"] for row in history if "eval_loss" in row],
    }


def test_supervised_fine_tuning_with_two_merges(tmp_path):
    for rank in run_ranks(2, fine_tuned, str(tmp_path)):
        assert rank["merges"] == [8, 16]
        assert len(rank["losses"]) == 4
        assert rank["losses"][-1] < rank["losses"][0]
        assert rank["evaluated"][1] < rank["evaluated"][0]
    checkpoint = tmp_path / "out/checkpoint-20"
    assert export_merged(checkpoint, tmp_path / "exported", verify=True).cycles == 2
    saved, exported = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name)
        for name in ("saved", "exported")
    )
    hf.assert_same_parameters(saved, exported)
    AutoTokenizer.from_pretrained(tmp_path / "saved")
