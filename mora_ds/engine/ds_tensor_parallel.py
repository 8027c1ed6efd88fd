"""`"tensor_parallel": {"autotp_size": t}` in a DeepSpeed JSON: read here, and never shown to DeepSpeed.

DeepSpeed's own name for the degree (runtime/tensor_parallel/config.py, `TPTrainingConfig`). DeepSpeed would make AutoTP
of it (`deepspeed/__init__.py`, `initialize`; runtime/engine.py, `_apply_autotp_partitioning`), which cuts the base into
shards; here it says what `--tensor_parallel_size` says, and the base stays whole.
"""

from __future__ import annotations

import json
from typing import Any

from mora_ds.engine.ds_keys import AUTO, QUIETLY_OFF

SECTION, KEY = "tensor_parallel", "autotp_size"
FLAG = "--tensor_parallel_size"


def degree_in(config: dict[str, Any]) -> int | None:
    """The degree that a config names; None where it leaves it open. One that makes no sense is found by
    `take_degree`."""
    section = config.get(SECTION)
    degree = section.get(KEY, AUTO) if isinstance(section, dict) else AUTO
    if not isinstance(degree, int) or isinstance(degree, bool):
        return None
    return max(degree, 1)  # DeepSpeed's 0: off


def take_degree(config: dict[str, Any], wanted: int | None) -> list[str]:
    """Takes the section out of a config; what is wrong with it, or differs from the degree `wanted` (None: any)."""
    section = config.pop(SECTION, None)
    if section in QUIETLY_OFF:
        return []
    if not isinstance(section, dict):
        return [f'"{SECTION}" must be an object with keys of its own, not {section!r}']
    problems = [
        f'"{SECTION}.{key}" cannot be used: it is for AutoTP, which shards the base; "{KEY}" is all that is read'
        for key in section
        if key != KEY
    ]
    found = section.get(KEY, AUTO)
    degree = degree_in({SECTION: section})
    if found != AUTO and (degree is None or found < 0):
        problems.append(f"{SECTION}.{KEY} must be a whole number or {json.dumps(AUTO)}, got {json.dumps(found)}")
    elif degree is not None and wanted is not None and degree != wanted:
        problems.append(f'{SECTION}.{KEY} = {found} but {FLAG} = {wanted}; set it to "auto", or leave the flag out')
    return problems
