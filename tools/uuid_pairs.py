"""The task of `bench_memorization.py`: random pairs of hex digits, and how many of them a model knows by heart."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mora_ds.data import load_tokenizer
from mora_ds.errors import UserError

DIGITS, HEX = 32, "0123456789abcdef"


def pair_rows(base: str | Path, pairs: int, seed: int) -> Tensor:
    """(pairs, 2 * DIGITS + 2) token ids: start, 32 digits, separator, 32 digits. Raises `UserError` for a tokenizer
    that has no token of its own for every digit."""
    tokenizer = load_tokenizer(base, flag="--base")
    digits = [tokenizer(digit, add_special_tokens=False)["input_ids"][-1] for digit in HEX]
    separator = tokenizer("=", add_special_tokens=False)["input_ids"][-1]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if len({*digits, separator, start}) < len(HEX) + 2:
        raise UserError(f"--base {base}: its tokenizer has no token of its own for every hex digit")
    draw = random.Random(f"pairs/{seed}")
    half = [[[draw.choice(digits) for _ in range(DIGITS)] for _ in range(2)] for _ in range(pairs)]
    return torch.tensor([[start, *key, separator, *value] for key, value in half])


@torch.no_grad()
def accuracy(engine: Any, rows: Tensor) -> float:
    """Share of digits that are right when the second halves are generated greedily from the first.

    `engine`: a causal model of transformers, or the engine around it; it is in training mode afterwards.
    """
    engine.eval()
    ids, cache, right = rows[:, :-DIGITS].to(engine.device), None, 0
    for position in range(DIGITS):
        found = engine(input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = found.logits[:, -1:].argmax(dim=-1), found.past_key_values
        right += int((ids[:, 0].cpu() == rows[:, position - DIGITS]).sum())
    engine.train()
    return right / (len(rows) * DIGITS)
