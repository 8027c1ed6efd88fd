"""What of --targets and --trainable_budget is wrong whatever the model is."""

from __future__ import annotations

from collections.abc import Iterator

from mora_ds.adapters.config import ALL_LINEAR
from mora_ds.adapters.target_plan import AUTO, parse_budget
from mora_ds.config.adapter import AdapterArguments, AdapterKind
from mora_ds.errors import UserError


def target_checks(adapter: AdapterArguments) -> Iterator[tuple[bool, str]]:
    """Pairs (whether it is wrong, what to say then), for `validation`."""
    targets, budget = adapter.targets, adapter.trainable_budget
    yield (
        targets is not None and adapter.adapter != AdapterKind.MORA.value,
        f"--targets plans squares, and --adapter {adapter.adapter} has none: --target_modules chooses its layers",
    )
    yield targets == AUTO and budget is None, "--targets auto: give --trainable_budget, such as 0.5%"
    yield budget is not None and targets != AUTO, "--trainable_budget is for --targets auto; a plan's file has sides"
    from_file = targets not in (None, AUTO)
    yield (
        from_file and adapter.target_modules != [ALL_LINEAR],
        f"--targets {targets} names the layers itself: drop --target_modules",
    )
    yield (
        from_file and adapter.full_rank_steps > 0,
        f"--targets {targets} is for a model that --full_rank_steps change first: use --targets auto",
    )
    if budget is not None:
        try:
            parse_budget(budget)
        except UserError as error:
            yield True, str(error)
