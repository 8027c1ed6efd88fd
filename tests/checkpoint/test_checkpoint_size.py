"""What a checkpoint weighs: 16 bytes a trained parameter (master, two moments, the adapter
file) and little else.
"""

from pathlib import Path

import torch.distributed as dist
from transformers import AutoModelForCausalLM

import mora_ds
from mora_ds.checkpoint.manager import complete_checkpoints
from mora_ds.common.files import verify_manifest
from tests.helpers.damage import checkpoint_at, manager_of
from tests.helpers.engines import ds_config
from tests.helpers.models import micro_step, tiny_model, tokens
from tests.helpers.pool import run_pooled

CONSTANT = 60 << 10
"""Bytes, for two ranks and 19 tensors: random states, layouts, JSON, the probe's logits."""


def sizes(folder):
    """Stage and dtype -> (bytes of a checkpoint without its ledger, trained parameters)."""
    root = Path(folder)
    if dist.get_rank() == 0:
        tiny_model("llama").save_pretrained(root / "model")
    dist.barrier()
    measured = {}
    for stage in (1, 2, 3):
        for dtype in ("float32", "bf16"):
            model = AutoModelForCausalLM.from_pretrained(root / "model")
            config = mora_ds.MoRAConfig(rank=64, r_hat_multiple=1, train_norms=True)
            report = mora_ds.inject(model, config)
            more = {} if dtype == "float32" else {"bf16": {"enabled": True}}
            if more:
                more["data_types"] = {"grad_accum_dtype": "fp32"}
            engine, *_ = mora_ds.initialize(
                model=model, config=ds_config(stage, 2, 1, **more)
            )
            run = mora_ds.Run(
                engine, base=root / "model", folder=root / f"{stage}-{dtype}"
            )
            micro_step(engine, tokens(2))
            checkpoint = run.save(1)
            ledger = checkpoint / "ledger"
            paths = [
                path
                for path in checkpoint.rglob("*")
                if path.is_file() and ledger not in path.parents
            ]
            measured[f"{stage} {dtype}"] = (
                sum(path.stat().st_size for path in paths),
                report.trainable_params,
            )
    return measured


def test_bytes_a_parameter(tmp_path):
    for combination, (nbytes, parameters) in run_pooled(2, sizes, str(tmp_path))[
        0
    ].items():
        assert parameters > 27_000, "large against the constant"
        assert nbytes <= 16 * parameters + CONSTANT, combination
        assert nbytes >= 15 * parameters, f"{combination}: something is not saved"


# -- what is kept ----------------------------------------------------------------------


def names(root):
    return [
        int(folder.name.removeprefix("step-")) for folder in complete_checkpoints(root)
    ]


def test_only_complete_ones_count_and_are_deleted(tmp_path):
    """Keeping two: those without a manifest, cut short, or of a branch that was left stay
    as they are, uncounted.
    """
    folders = {step: checkpoint_at(tmp_path, step) for step in (1, 2, 3, 4, 5, 6, 9)}
    (folders[2] / "manifest.json").unlink()
    (folders[5] / "file").write_text("")
    manager = manager_of(tmp_path)
    manager.retain(6, 2)
    assert names(tmp_path) == [4, 5, 6, 9]
    manager.retain(6, 1)
    assert names(tmp_path) == [5, 6, 9]
    assert folders[2].is_dir()
    assert verify_manifest(folders[6]) == [], "the last good one stays"
    assert not list(tmp_path.glob(".*"))
