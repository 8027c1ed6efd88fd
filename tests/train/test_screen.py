"""What a run prints after its last step, by what it was asked for; a launched run's lines are in test_pretrain.py."""

from mora_ds.config.arguments import parse
from mora_ds.train import screen
from mora_ds.train.screen import closing

SUMMARY = {"steps": 1200, "tokens": 2_400_000}


def test_the_last_lines_say_what_was_done():
    lines = closing(parse(["--output_dir", "runs/law"]), SUMMARY, 3723.4)
    assert lines == [
        "done        1,200 steps, 2,400,000 tokens in 1:02:03",
        "checkpoint  runs/law/checkpoints/latest",
    ]
    assert closing(parse(["--adapter", "none"]), SUMMARY, 1) == ["done        evaluated in 0:00:01"]


def test_everything_that_is_trained_is_named():
    adapter = parse(["--mora_rank", "4", "--train_new_embeddings", "--train_norms"]).adapter
    assert screen._trained(adapter) == "MoRA of rank 4, new rows of the embeddings, norms"
