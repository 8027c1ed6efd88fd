"""Documents -> their tokens, with what stands before and behind each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from mora_ds.data.readers import Document
from mora_ds.data.tokenizer import end_of_text_id, largest_id, wants_bos


@dataclass(frozen=True)
class Encoder:
    """A batch of documents -> (its tokens, where in them documents end). Pickled to the worker processes."""

    tokenizer: PreTrainedTokenizerBase
    bos_id: int | None
    eos_id: int
    dtype: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, add_bos: bool | None = None) -> Encoder:
        """`add_bos` None: as the tokenizer does by itself. Raises `UserError` for one without end-of-text token."""
        eos_id = end_of_text_id(tokenizer)
        bos = wants_bos(tokenizer) if add_bos is None else add_bos
        dtype = "<u2" if largest_id(tokenizer)[1] < 1 << 16 else "<u4"
        return cls(tokenizer, tokenizer.bos_token_id if bos else None, eos_id, dtype)

    def __call__(self, batch: list[Document]) -> tuple[np.ndarray, np.ndarray]:
        rows = self.rows(batch)
        ends = np.cumsum([len(row) for row in rows], dtype="<i8")[[document.ends for document in batch]]
        return np.concatenate(rows), ends

    def rows(self, batch: list[Document]) -> list[np.ndarray]:
        """The tokens of each document (or piece of one)."""
        texts = [document.text for document in batch]
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        bos = [] if self.bos_id is None else [self.bos_id]
        return [
            np.array((bos if document.begins else []) + ids + ([self.eos_id] if document.ends else []), self.dtype)
            for document, ids in zip(batch, encoded, strict=True)
        ]
