"""--compute auto in whole runs: a resume with other sizes says so. That no measured time decides: test_cpu_bits."""

from pathlib import Path

from mora_ds.checkpoint.state import TrainerState
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, printed


def test_a_resume_with_micro_batches_of_another_size_says_that_paths_change(user: Playground, tmp_path: Path):
    """Two rows of 8 tokens take the weight where one takes the activations."""
    short = ("--seq_len", 8, "--max_steps", 2, "--save_steps", 1)
    (told,) = run_ranks(1, printed, user.flags(tmp_path, *short, "--log_level", "debug"))
    assert "computed over (--compute): weight for 14 layers, with 16 tokens in a micro-batch" in told
    assert TrainerState.read(tmp_path / "checkpoints" / "latest").micro_batch_tokens == 16
    again = (*short, "--max_steps", 3, "--resume_from_checkpoint", "auto", "--per_device_train_batch_size", 1)
    (told,) = run_ranks(1, printed, user.flags(tmp_path, *again, "--gradient_accumulation_steps", 2))
    assert "--compute: up to the checkpoint it was weight for 14 layers, with 16 tokens in a micro-batch" in told
