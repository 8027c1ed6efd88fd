"""Settings of adapters that do not go together are refused with the flag to change."""

from __future__ import annotations

import pytest

from mora_ds.common.errors import UserError
from mora_ds.config.arguments import parse
from mora_ds.config.validate import validate

SUBSPACE = "--operator subspace "
AUTO = "--targets auto --trainable_budget 1% "
DEGREE_2 = "--tensor_parallel_size 2 "
ALIGNED = "--tp_grouping aligned "

REFUSED = [
    (SUBSPACE + "--grouping strided", "drop --grouping strided"),
    (SUBSPACE + "--grouping plain", "drop --grouping plain"),
    (SUBSPACE + "--compute weight", "drop --compute weight"),
    (SUBSPACE + DEGREE_2, "--operator subspace reads unsplit inputs"),
    (SUBSPACE + ALIGNED, "--tp_grouping aligned belongs to --operator share"),
    ("--operator subspce", "Did you mean 'subspace'"),
    ("--alignment_weight -1", "--alignment_weight must be at least 0"),
    ("--alignment_weight inf", "--alignment_weight must be at least 0"),
    ("--alignment_rank 0", "--alignment_rank must be at least 1"),
    ("--alignment_rank 4", "--alignment_rank is for --alignment_weight"),
    ("--alignment_weight 1 --adapter full", "--alignment_weight is for MoRA matrices"),
    ("--alignment_weight 1 " + DEGREE_2, "--alignment_weight needs unsharded"),
    ("--targets auto", "--targets auto: give --trainable_budget"),
    ("--trainable_budget 1%", "--trainable_budget is for --targets auto"),
    ("--targets f.yaml --trainable_budget 1%", "--trainable_budget is for --targets auto"),
    (AUTO + "--adapter lora", "--targets is for MoRA matrices"),
    ("--targets auto --trainable_budget x", "--trainable_budget must be like"),
    ("--targets f.yaml --target_modules q_proj", "f.yaml names the layers itself"),
    ("--tensor_parallel_size 0", "--tensor_parallel_size must be at least 1"),
    (DEGREE_2 + "--sequence_parallel_size 2", "use one of them"),
    (DEGREE_2 + "--adapter lora", "--adapter lora has none: leave it at 1"),
    (DEGREE_2 + "--adapter full", "--adapter full has none: leave it at 1"),
    (DEGREE_2 + "--adapter none", "--adapter none has none: leave it at 1"),
    (DEGREE_2 + "--mora_dropout 0.1", "set to 0: --mora_dropout = 0.1"),
    (DEGREE_2 + "--optimizer muon", "which no rank has: use adamw"),
    ("--tp_grouping algned", "unknown --tp_grouping 'algned'"),
    (ALIGNED + "--operator rotate", "belongs to --operator share"),
    (ALIGNED + "--tensor_parallel_size 3 --operator share", "does not divide the 8 segments of --tp_grouping aligned"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_settings_that_do_not_go_together(flags: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(parse(["--model_name_or_path", "m", "--train_files", "a.txt", *flags.split()]))
    assert message in str(caught.value)
