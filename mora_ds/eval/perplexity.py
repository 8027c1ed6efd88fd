"""Perplexity and bits per byte of a model on named texts, with sliding windows.

    HF folder                            -> the model
    checkpoint, run folder, adapter      -> base + merge ledger + current MoRA matrices, in memory (`load_adapter`)
    the same, with --onto another model  -> that model + the same update, in memory (`load_onto`)

    document -> [start] t0 t1 ... tn     start: --document_start, by default that of the run, as in training
             -> windows of `window` tokens at a distance of `stride`, which start like packed sequences
                (`block_start`); each token is scored in the first window that contains it
             -> nats of all tokens -> / tokens, exp: perplexity       / bytes of the text, / ln 2: bits per byte

Exactly the tokens of the documents are scored; without a start token all but the first,
which nothing predicts. So bits per byte can be compared between models with different
tokenizers. Perplexity cannot.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from mora_ds.checkpoint.adapter_files import (
    AdapterFile,
    BaseReference,
    chosen_domain,
    read_adapter,
)
from mora_ds.checkpoint.layout import adapter_folder, refuse_full_training, tokenizer_of
from mora_ds.common.errors import UserError
from mora_ds.common.fetched import local
from mora_ds.common.files import named_path
from mora_ds.common.tensor_files import compute_dtype
from mora_ds.data import (
    AUTO,
    IGNORED,
    Corpus,
    block_start,
    load_tokenizer,
    start_id,
)
from mora_ds.data.documents import Documents
from mora_ds.deploy.adapter_io import load_adapter
from mora_ds.deploy.export import load_onto
from mora_ds.models.attention import model_inputs, prefer_document_attention
from mora_ds.models.load import load_model
from mora_ds.models.loss import perplexity
from mora_ds.models.rope import max_positions

DEFAULT_WINDOW = 1024

_SORTED_BATCHES = 64
"""Number of batches that are sorted by window length together, to reduce padding."""

_Window = tuple[Sequence[int], int]
"""(token ids, number of scored tokens at the end)."""


@dataclass(frozen=True)
class Target:
    """A model to evaluate, with its tokenizer."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    document_start: str = AUTO
    """The setting of the run that has trained the model; auto for other models."""


@dataclass
class Score:
    """The result of a model on one set of texts."""

    documents: int = 0
    tokens: int = 0
    """Scored tokens: all tokens of the texts, without start tokens."""
    text_bytes: int = 0
    """UTF-8 bytes of the scored text."""
    nats: float = 0.0
    """Summed negative log-likelihood."""

    @property
    def perplexity(self) -> float:
        return perplexity(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.text_bytes

    def to_dict(self) -> dict[str, float]:
        return {
            **asdict(self),
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


@dataclass(frozen=True)
class Windows:
    """Sliding windows over a document."""

    window: int
    """Tokens per window."""
    stride: int
    """Tokens between the starts of two windows."""
    document_start: str = AUTO
    """As in `data.start_id`."""
    model_type: str = ""
    """Determines the first token of each window (`data.block_start`)."""

    @classmethod
    def of(
        cls,
        model: Any,
        window: int | None,
        stride: int | None,
        document_start: str = AUTO,
    ) -> Windows:
        """Default window: the model's number of positions, at most `DEFAULT_WINDOW`.
        Default stride: half of the window. Raises `UserError` for a window beyond the
        model's positions, and for a stride that gives a scored token no context."""
        longest = max_positions(model.config)
        if window is None:
            window = min(longest or DEFAULT_WINDOW, DEFAULT_WINDOW)
        stride = max(window // 2, 1) if stride is None else stride
        if window < 3 or (longest is not None and window > longest):
            most = "on" if longest is None else f"to the model's {longest} positions"
            raise UserError(f"--window must be from 3 {most}, got {window}")
        if not 1 <= stride < window - 1:
            raise UserError(
                f"--stride must be from 1 to --window minus 2 ({window - 2}), got {stride}"
            )
        return cls(window, stride, document_start, model.config.model_type)

    def cut(
        self, ids: Sequence[int], known: int, start: int | None
    ) -> Iterator[_Window]:
        """Windows over `ids` that score every token once, except the first `known`. If
        `start` is given, it replaces the first token of each window, which is not
        scored there."""
        begin = 0
        done = known
        while done < len(ids):
            end = min(begin + self.window, len(ids))
            first = ids[begin] if start is None else start
            yield [first, *ids[begin + 1 : end]], end - done
            begin = begin + self.stride
            done = end


def load_target(
    path: Path,
    base: Path | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    domain: str | None = None,
    onto: Path | None = None,
) -> Target:
    """Load the model at `path`: a Hugging Face folder, or a checkpoint (or run folder,
    or adapter) applied to its base.

    `base`: the base's folder, if it was moved. `domain`: for a run with domains, the
    domain whose matrices are used; "shared" for the shared matrices alone. `dtype`
    "auto": the folder's dtype, or the run's compute dtype. `onto`: a model to which the
    update is added instead of the base; its tokenizer and dtype are used. Raises
    `UserError` for any other path.
    """
    folder = adapter_folder(path)
    if folder is not None and onto is not None:
        model = load_onto(folder, onto, base, dtype, domain, trust_remote_code)
        tokenizer = load_tokenizer(
            onto, trust_remote_code=trust_remote_code, flag="--onto"
        )
        return Target(prefer_document_attention(model.to(device)), tokenizer)
    if folder is not None:
        return _adapted(folder, base, dtype, device, trust_remote_code, domain)
    if not (path / "config.json").is_file():
        refuse_full_training(path)
        what = "no such folder"
        if path.exists():
            what = "neither a Hugging Face model nor a run or checkpoint"
        raise UserError(f"MODEL {path}: {what}")
    for flag, value in {"--domain": domain, "--onto": onto, "--base": base}.items():
        if value is not None:
            raise UserError(
                f"{flag} is for checkpoints, and {path} is a complete model"
            )
    wanted = "auto" if dtype == "auto" else compute_dtype(dtype)
    model = load_model(path, wanted, trust_remote_code=trust_remote_code, flag="MODEL")
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code, flag="MODEL")
    return Target(prefer_document_attention(model.to(device).eval()), tokenizer)


def _adapted(
    checkpoint: Path,
    base: Path | None,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    domain: str | None,
) -> Target:
    adapter = read_adapter(checkpoint)
    domain = chosen_domain(adapter.domains, domain, "--domain")
    reference = BaseReference.read(checkpoint)
    folder = base if base is not None else local(reference.place(checkpoint))
    tokenizer_folder = tokenizer_of(checkpoint) or folder
    flag = "--base" if tokenizer_folder == base else "MODEL"
    tokenizer = load_tokenizer(
        tokenizer_folder, trust_remote_code=trust_remote_code, flag=flag
    )
    model: Any = load_adapter(folder, checkpoint, None, domain, trust_remote_code)
    if dtype != "auto":
        model = model.to(compute_dtype(dtype))
    model = prefer_document_attention(model.to(device))
    return Target(model, tokenizer, document_start_of(adapter))


def document_start_of(adapter: AdapterFile) -> str:
    """--document_start of the run that has trained an adapter."""
    return str(adapter.facts.get("document_start", AUTO))


def evaluate(
    target: Target,
    corpus: Corpus,
    windows: Windows,
    batch_size: int = 4,
    max_documents: int | None = None,
) -> Score:
    """Score every document of `corpus`, or its first `max_documents`. Raises
    `UserError` for texts without a token."""
    score = Score()
    cut = cut_windows(corpus, target.tokenizer, windows, max_documents, score)
    for batch in sorted_batches(cut, batch_size):
        score.nats += _nats(target.model, batch)
    if not score.tokens:
        raise UserError(f"{corpus.flag}: it has no tokens to score")
    return score


def cut_windows(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    windows: Windows,
    max_documents: int | None,
    score: Score,
) -> Iterator[_Window]:
    """The windows of all documents. Counts documents, tokens and bytes in `score`. The
    context of a document's chunk are the last tokens of its previous chunk."""
    first = block_start(tokenizer, windows.document_start, windows.model_type)
    start = start_id(tokenizer, windows.document_start)
    context: list[int] = []
    for document in corpus:
        if document.begins:
            if score.documents == max_documents:
                return
            context = [] if start is None else [start]
            score.documents += 1
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        # Nothing predicts the first token of a document without a start token.
        unscored = [] if context else ids[:1]
        score.tokens += len(ids) - len(unscored)
        score.text_bytes += len(document.text.encode())
        score.text_bytes -= len(str(tokenizer.decode(unscored)).encode())
        sequence = [*context, *ids]
        yield from windows.cut(sequence, len(context) + len(unscored), first)
        context = sequence[-max(windows.window - windows.stride, 1) :]


def sorted_batches(
    windows: Iterator[_Window], batch_size: int
) -> Iterator[list[_Window]]:
    while group := list(islice(windows, _SORTED_BATCHES * batch_size)):
        group.sort(key=lambda window: len(window[0]))
        yield from (group[i : i + batch_size] for i in range(0, len(group), batch_size))


@torch.inference_mode()
def _nats(model: Any, batch: Sequence[_Window]) -> float:
    """Summed negative log-likelihood of all scored tokens of a batch."""
    # Padding is at the right, where causal attention ignores it.
    windows = [torch.tensor(window) for window, _ in batch]
    ids = pad_sequence(windows, batch_first=True)
    labels = torch.full_like(ids, IGNORED)
    for row, (window, scored) in enumerate(batch):
        end = len(window)
        labels[row, end - scored - 1 : end - 1] = ids[row, end - scored : end]
    documents = Documents.one_per_sequence(len(batch), ids.shape[1], model.device)
    inputs = {"input_ids": ids.to(model.device), "documents": documents}
    logits = model(**model_inputs(model, inputs)).logits
    nats = torch.zeros((), dtype=torch.float64, device=logits.device)
    for row_logits, row_labels in zip(logits, labels.to(logits.device), strict=True):
        nats += F.cross_entropy(
            row_logits.float(), row_labels, ignore_index=IGNORED, reduction="sum"
        )
    return nats.item()


def named_sets(entries: Iterable[str]) -> dict[str, str]:
    """Parse entries NAME=PATH or PATH to {name: path}. Raises `UserError` for a
    duplicate name."""
    sets: dict[str, str] = {}
    for entry in entries:
        name, path = named_path(entry)
        if name in sets:
            raise UserError(f"--sets: two sets have the name {name}; write NAME=PATH")
        sets[name] = path
    return sets
