"""Interrupted runs, and what must be the same after they have been resumed."""

import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from mora_ds.train.trainer import Trainer
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import assert_close_losses, curve, job, losses, run

MERGING = "--max_steps 9 --merge_every 3 --restart_warmup_steps 1 --save_steps 2 --eval_steps 4"
"""Merges after steps 3 and 6; checkpoints at 2, 4, 6 (right after a merge), 8 and 9."""


MERGING_BF16 = "--max_steps 9 --merge_every 3 --restart_warmup_steps 1 --save_steps 2 --bf16 --learning_rate 3e-2"


def interrupted_job(argv, step):
    """A run that stops dead after optimizer step `step`, and whatever follows it (a merge,
    a checkpoint).
    """
    after_step = Trainer.after_step

    def stop(trainer):
        after_step(trainer)
        if trainer.state.step == step:
            raise KeyboardInterrupt

    Trainer.after_step = stop  # in this forked rank alone
    try:
        job(argv)
    except KeyboardInterrupt:
        return
    raise AssertionError("the run was to be interrupted")


def disturb(step, act):
    """From now on this forked rank calls `act` once optimizer step `step` is done, before
    whatever follows it.
    """
    after_step = Trainer.after_step

    def patched(trainer):
        if trainer.state.step == step:
            act(trainer)
        after_step(trainer)

    Trainer.after_step = patched  # in this forked rank alone


def stop_and_resume(ranks, argv, *steps):
    """A run that stops dead after each of `steps` and is resumed by auto each time; the
    summary of the last part.
    """
    argv = [*argv, "--resume_from_checkpoint", "auto"]
    for step in steps:
        run_ranks(ranks, interrupted_job, argv, step)
    return run(ranks, argv)


def assert_one_run(flags, folder, wide_job=job):
    """A run of one rank, in folder/reference, is the same to the bit where it is stopped twice
    and resumed, in folder/out, and has the same losses on two ranks with micro-batches of
    one row, in folder/wide.

    `flags`: makes a command line of an output folder and more flags.
    """
    reference = folder / "reference"
    wide = folder / "wide"
    run(1, flags(reference, "--per_device_train_batch_size", 4))
    stop_and_resume(1, flags(folder / "out", "--per_device_train_batch_size", 4), 3, 5)
    assert_same_run(folder / "out", reference)
    rows = "--per_device_train_batch_size 1 --gradient_accumulation_steps 2"
    run_ranks(2, wide_job, flags(wide, rows))
    assert_close_losses(wide, reference)


def checkpoint_tensors(out):
    """MoRA matrices, other trained tensors and every cycle of the ledger in the last
    checkpoint.
    """
    latest = out / "checkpoints/latest"
    tensors = load_file(latest / "adapter.safetensors")
    tensors |= {
        f"probe.{name}": tensor
        for name, tensor in load_file(latest / "probe.safetensors").items()
    }
    for cycle in sorted((latest / "ledger").glob("cycle-*")):
        tensors |= {
            f"{cycle.stem}.{name}": tensor for name, tensor in load_file(cycle).items()
        }
    return tensors


def assert_same_tensors(one, another, where=""):
    assert one.keys() == another.keys(), where
    for name in one:
        assert torch.equal(one[name], another[name]), (name, where)


def assert_same_result(out, reference):
    """The same losses and the same last checkpoint, whatever else was logged."""
    assert torch.equal(losses(out), losses(reference))
    assert_same_tensors(checkpoint_tensors(out), checkpoint_tensors(reference))


def assert_same_run(out, reference):
    assert curve(out) == curve(reference)
    assert_same_tensors(checkpoint_tensors(out), checkpoint_tensors(reference))


def assert_close_runs(out, reference, atol=1e-4):
    """The same losses and the same last checkpoint, up to the order in which ranks sum."""
    assert_close_losses(out, reference)
    tensors = checkpoint_tensors(out)
    for name, tensor in checkpoint_tensors(reference).items():
        assert_close(tensors[name], tensor, rtol=1e-3, atol=atol, msg=name)
