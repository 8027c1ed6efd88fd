"""The task of `bench/memorization.py`: random pairs of hex digits, and how many of them a
model has memorised.
"""

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mora_ds.common.errors import UserError
from mora_ds.common.files import atomic_folder
from mora_ds.data import load_tokenizer
from tools.bench.trials import warm_base

DIGITS = 32
HEX = "0123456789abcdef"


class Digits:
    """The tokens of a row, of the tokenizer of `base`. Raises `UserError` for one that has
    no token of its own for every digit."""

    def __init__(self, base: str | Path) -> None:
        tokenizer = load_tokenizer(base, flag="--base")
        self.tokens = [
            tokenizer(digit, add_special_tokens=False)["input_ids"][-1] for digit in HEX
        ]
        self.separator = tokenizer("=", add_special_tokens=False)["input_ids"][-1]
        self.start = (
            tokenizer.bos_token_id
            if tokenizer.bos_token_id is not None
            else tokenizer.eos_token_id
        )
        if len({*self.tokens, self.separator, self.start}) < len(HEX) + 2:
            raise UserError(
                f"--base {base}: its tokenizer has no token of its own for every hex digit"
            )

    def rows(self, pairs: int, seed: int | str) -> Tensor:
        """(pairs, 2 * DIGITS + 2) token ids: start, 32 random digits, separator, 32 random
        digits.
        """
        draw = random.Random(f"pairs/{seed}")
        half = [
            [[draw.choice(self.tokens) for _ in range(DIGITS)] for _ in range(2)]
            for _ in range(pairs)
        ]
        return torch.tensor(
            [[self.start, *key, self.separator, *value] for key, value in half]
        )


def labels_of(ids: Tensor) -> Tensor:
    """The second halves; the rest is not asked for."""
    labels = ids.clone()
    labels[:, :-DIGITS] = -100
    return labels


def prepared_base(given: Path | None, work: Path, digit_steps: int) -> Path:
    """The model that adapters are put on: `given`, or a small one made here, after
    `teach_digits`.
    """
    base = given or warm_base(work / "base", 8).warm
    folder = work / f"base-{digit_steps}"
    if digit_steps and not folder.is_dir():
        work.mkdir(parents=True, exist_ok=True)
        print("training on pairs that nobody is asked for", flush=True)
        teach_digits(base, folder, digit_steps)
    return folder if digit_steps else base


def teach_digits(
    base: Path, folder: Path, steps: int, rate: float = 1e-3, pairs: int = 16
) -> None:
    """`base` after training on pairs that never come again, as a plain folder: it knows
    that digits follow, and none of them. A large pretrained model does by itself; a small
    one, frozen, would spend its adapter on it."""
    torch.manual_seed(0)
    digits = Digits(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for step in range(steps):
        ids = digits.rows(pairs, f"never again/{step}")
        model(input_ids=ids, labels=labels_of(ids), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with atomic_folder(folder.absolute()) as partial:
        model.save_pretrained(partial)
        load_tokenizer(base).save_pretrained(partial)


@torch.no_grad()
def accuracy(engine: Any, rows: Tensor) -> float:
    """Share of digits that are right when the second halves are generated greedily from the
    first.

    `engine`: a causal model of transformers, or the engine around it; it is in training
    mode afterwards.
    """
    engine.eval()
    ids = rows[:, :-DIGITS].to(engine.device)
    cache = None
    right = 0
    for position in range(DIGITS):
        output = engine(input_ids=ids, past_key_values=cache, use_cache=True)
        ids = output.logits[:, -1:].argmax(dim=-1)
        cache = output.past_key_values
        right += int((ids[:, 0].cpu() == rows[:, position - DIGITS]).sum())
    engine.train()
    return right / (len(rows) * DIGITS)
