"""Settings of adapters that do not go together are refused with the flag to change."""

from __future__ import annotations

import pytest

from mora_ds.common.errors import UserError
from mora_ds.config.arguments import parse
from mora_ds.config.validate import validate

DEGREE_2 = "--tensor_parallel_size 2 "
ALIGNED = "--tp_grouping aligned "

REFUSED = [
    ("--operator subspace", "--operator subspace was removed"),
    ("--operator decuple", "Did you mean 'decouple'"),
    ("--tensor_parallel_size 0", "--tensor_parallel_size must be at least 1"),
    (DEGREE_2 + "--sequence_parallel_size 2", "use one of them"),
    (DEGREE_2 + "--adapter lora", "--adapter lora has none: leave it at 1"),
    (DEGREE_2 + "--adapter full", "--adapter full has none: leave it at 1"),
    (DEGREE_2 + "--adapter none", "--adapter none has none: leave it at 1"),
    (DEGREE_2 + "--mora_dropout 0.1", "set to 0: --mora_dropout = 0.1"),
    (DEGREE_2 + "--optimizer muon", "which no rank has: use adamw"),
    ("--sequence_parallel_size 2 --seq_len 33", "--sequence_parallel_size 2 does not divide --seq_len 33"),
    ("--sequence_parallel_size 2 --attn_implementation sdpa", "sdpa reads masks, which are not split over ranks"),
    ("--tp_grouping algned", "unknown --tp_grouping 'algned'"),
    (ALIGNED + "--operator rotate", "belongs to --operator share"),
    (ALIGNED + "--tensor_parallel_size 3 --operator share", "does not divide the 8 segments of --tp_grouping aligned"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_settings_that_do_not_go_together(flags: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(parse(["--model_name_or_path", "m", "--train_files", "a.txt", *flags.split()]))
    assert message in str(caught.value)
