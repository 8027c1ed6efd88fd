"""Perplexity and bits per byte of any model on named texts, document by document, with sliding windows.

    HF folder                            -> the model
    checkpoint, run's folder, adapter    -> base + ledger + live squares, in memory (`portable.load_adapter`)

    document -> [start] t0 t1 ... tn     start: BOS where the tokenizer puts it, else the end-of-text token
             -> windows of `window` tokens, each `stride` further; a token is scored once, in the first window it is in
             -> nats of all tokens -> / tokens, exp: perplexity       / bytes of the text, / ln 2: bits per byte

As every token of a document is scored and nothing else is, the bytes scored are the bytes of the text: bits per byte
can be compared between models with different tokenizers, perplexity cannot.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from mora_ds.checkpoint.adapter_files import BaseReference, chosen_domain, read_adapter
from mora_ds.checkpoint.layout import adapter_folder, tokenizer_of
from mora_ds.data import IGNORED, Corpus, load_tokenizer, wants_bos
from mora_ds.deploy.adapter_io import load_adapter
from mora_ds.deploy.bank import AdapterBank
from mora_ds.errors import UserError
from mora_ds.models.tensor_files import compute_dtype

BASE = "(base)"
"""Under which the base itself stands among the adapters."""


def evaluate_bank(
    bank: AdapterBank,
    sets: Mapping[str, Corpus],
    windows: Windows,
    names: Sequence[str],
    batch_size: int = 4,
    max_documents: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Score]]:
    """Adapter -> set -> score, the base first. A checkpoint's own tokenizer goes before the base's, as in its run.

    Raises `UserError` for an unknown name, and one whose headers are damaged, before anything is evaluated; for one
    whose squares are, when its turn comes.
    """
    bank.check_names(names)
    for name in names:
        if name in bank.damaged:
            raise UserError(f"adapter {name!r} cannot be used: {bank.damaged[name]}")
    tokenizer = load_tokenizer(bank.base, trust_remote_code=trust_remote_code, flag="MODEL")
    scores = {BASE: _scores(Target(bank.model, tokenizer, BASE), sets, windows, batch_size, max_documents)}
    for name in names:
        folder = adapter_folder(bank.folders[name])
        own = tokenizer_of(folder)
        each = tokenizer if own is None else load_tokenizer(own, flag=str(own))
        with bank.use(name):
            scores[name] = _scores(Target(bank.model, each, name), sets, windows, batch_size, max_documents)
    return scores


def _scores(
    target: Target, sets: Mapping[str, Corpus], windows: Windows, batch_size: int, max_documents: int | None
) -> dict[str, Score]:
    return {name: evaluate(target, corpus, windows, batch_size, max_documents) for name, corpus in sets.items()}


def bank_rows(scores: Mapping[str, Mapping[str, Score]]) -> list[list[str]]:
    """Titles, and a line an adapter: perplexity and bits per byte of every set."""
    sets = list(next(iter(scores.values())))
    titles = [f"{name}: {figure}" for name in sets for figure in ("perplexity", "bits/byte")]
    rows = [
        [adapter, *(f"{figure:.4f}" for name in sets for figure in (found[name].perplexity, found[name].bits_per_byte))]
        for adapter, found in scores.items()
    ]
    return [["adapter", *titles], *rows]


DEFAULT_WINDOW = 1024

_SORTED_AT_ONCE = 64
"""Batches whose windows are sorted by length, so that little is padded."""


@dataclass(frozen=True)
class Target:
    """A model to evaluate, with its tokenizer."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    source: str
    """What it is, for humans."""


@dataclass(frozen=True)
class Score:
    """What a model makes of one set of texts."""

    documents: int
    tokens: int
    """Scored: all of the texts', without the start."""
    text_bytes: int
    """UTF-8, of exactly the text that these tokens are."""
    nats: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.text_bytes

    @property
    def tokens_per_byte(self) -> float:
        return self.tokens / self.text_bytes

    def to_dict(self) -> dict[str, float]:
        derived = {name: getattr(self, name) for name in ("perplexity", "bits_per_byte", "tokens_per_byte")}
        return {**asdict(self), **derived}


@dataclass(frozen=True)
class Windows:
    """How far the model sees, and how many tokens a window goes on."""

    window: int
    stride: int

    @classmethod
    def of(cls, model: Any, window: int | None, stride: int | None) -> Windows:
        """Default: the model's positions, at most `DEFAULT_WINDOW`, and half of that. Raises `UserError` for a window
        that the model does not reach, and for a stride that leaves a window's first token without any before it."""
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if window is None:
            window = min(longest or DEFAULT_WINDOW, DEFAULT_WINDOW)
        stride = max(window // 2, 1) if stride is None else stride
        if window < 2 or (longest is not None and window > longest):
            raise UserError(f"--window must be from 2 to the model's {longest} positions, got {window}")
        if not 1 <= stride < window:
            raise UserError(f"--stride must be from 1 to --window less 1 ({window - 1}), got {stride}")
        return cls(window, stride)

    def cut(self, ids: Sequence[int], known: int) -> Iterator[tuple[Sequence[int], int]]:
        """(tokens of a window, how many at its end are scored), until all of `ids` but the first `known` are."""
        begin, done = 0, known
        while done < len(ids):
            end = min(begin + self.window, len(ids))
            yield ids[begin:end], end - done
            begin, done = begin + self.stride, end


def load_target(
    path: Path,
    base: Path | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    domain: str | None = None,
) -> Target:
    """The model at `path`: a Hugging Face folder, or a checkpoint (a run's folder, an adapter) put onto its base.

    `base`: where that lies now, if it was moved. `domain`: of a run with domains, "shared" for none.
    `dtype` "auto": a folder's own, a run's compute dtype. Raises `UserError` for what is neither.
    """
    if (folder := adapter_folder(path)) is not None:
        return _adapted(folder, base, dtype, device, domain)
    if not (path / "config.json").is_file():
        raise UserError(f"MODEL: {path} is neither a Hugging Face folder nor a checkpoint, nor has it one")
    if domain is not None:
        raise UserError(f"--domain belongs to a checkpoint of a run with domains, {path} is a whole model")
    if base is not None:
        raise UserError(f"--base belongs to a checkpoint, {path} is a whole model")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto" if dtype == "auto" else compute_dtype(dtype), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise UserError(f"MODEL: {path} cannot be loaded as a causal language model: {error}") from error
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code, flag="MODEL")
    return Target(model.to(device).eval(), tokenizer, str(path))


def _adapted(checkpoint: Path, base: Path | None, dtype: str, device: str, domain: str | None) -> Target:
    domain = chosen_domain(read_adapter(checkpoint).own, domain, "--domain")
    reference = BaseReference.read(checkpoint)
    folder = base if base is not None else checkpoint / reference.folder
    tokenizer = load_tokenizer(tokenizer_of(checkpoint) or folder, flag="MODEL")
    model: Any = load_adapter(folder, checkpoint, domain=domain)
    if dtype != "auto":
        model = model.to(compute_dtype(dtype))
    return Target(model.to(device), tokenizer, f"{checkpoint} on {folder}")


def evaluate(
    target: Target, corpus: Corpus, windows: Windows, batch_size: int = 4, max_documents: int | None = None
) -> Score:
    """Scores every document of `corpus` (its first `max_documents`). Raises `UserError` for texts without a token."""
    count = _Counter(target.tokenizer, windows, max_documents)
    nats = 0.0
    for batch in _batches(count.windows(corpus), batch_size):
        nats += _nats(target.model, batch)
    if not count.tokens:
        raise UserError(f"{corpus.flag}: there is not a single token to score in it")
    return Score(count.documents, count.tokens, count.text_bytes, nats)


class _Counter:
    """Documents -> windows, counted on the way."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, windows: Windows, max_documents: int | None) -> None:
        self.documents = self.tokens = self.text_bytes = 0
        self._tokenizer, self._windows, self._most = tokenizer, windows, max_documents
        start = tokenizer.bos_token_id if wants_bos(tokenizer) else tokenizer.eos_token_id
        if start is None:
            raise UserError("MODEL: its tokenizer has neither a BOS nor an end-of-text token to begin a document with")
        self._start = int(start)

    def windows(self, corpus: Corpus) -> Iterator[tuple[Sequence[int], int]]:
        """A document that comes in pieces goes on where the last one ended, within sight of its last tokens."""
        seen: list[int] = []
        for document in corpus:
            if document.begins:
                if self.documents == self._most:
                    return
                seen = [self._start]
                self.documents += 1
            ids = self._tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
            self.tokens += len(ids)
            self.text_bytes += len(document.text.encode())
            sequence = [*seen, *ids]
            yield from self._windows.cut(sequence, len(seen))
            seen = sequence[-max(self._windows.window - self._windows.stride, 1) :]


def _batches(
    windows: Iterator[tuple[Sequence[int], int]], batch_size: int
) -> Iterator[list[tuple[Sequence[int], int]]]:
    while group := list(islice(windows, _SORTED_AT_ONCE * batch_size)):
        group.sort(key=lambda window: len(window[0]))
        yield from (group[i : i + batch_size] for i in range(0, len(group), batch_size))


@torch.inference_mode()
def _nats(model: Any, batch: Sequence[tuple[Sequence[int], int]]) -> float:
    """Summed negative log-likelihood of the tokens that each window scores. Padding stands at the right, unseen."""
    longest = max(len(ids) for ids, _ in batch)
    inputs = torch.zeros(len(batch), longest, dtype=torch.long)
    labels = torch.full((len(batch), longest), IGNORED)
    for row, (ids, scored) in enumerate(batch):
        tokens = torch.tensor(ids)
        inputs[row, : len(ids)] = tokens
        labels[row, len(ids) - scored - 1 : len(ids) - 1] = tokens[-scored:]
    logits = model(input_ids=inputs.to(model.device), use_cache=False).logits
    rows = (
        F.cross_entropy(row.float(), label, ignore_index=IGNORED, reduction="sum").double()
        for row, label in zip(logits, labels.to(logits.device), strict=True)
    )
    return float(sum(rows))


def harness(target: Target, tasks: Sequence[str], window: int, batch_size: int) -> dict[str, Any]:
    """Results of the lm-eval harness on the live model: task -> metric -> value. Raises `UserError` where the package
    is missing or does not know a task."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(f"--lm_eval needs the package lm-eval: pip install 'lm-eval[hf]' ({error})") from error
    wrapped = HFLM(
        pretrained=target.model, tokenizer=target.tokenizer, batch_size=batch_size, max_length=window
    )  # a live model, so also one that lies nowhere whole
    try:
        found = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), log_samples=False)
    except (KeyError, ValueError) as error:
        raise UserError(f"--lm_eval {' '.join(tasks)}: {error}") from error
    return dict(found["results"])


def named_sets(entries: Iterable[str]) -> dict[str, str]:
    """NAME=PATH, or PATH (named by its stem) -> {name: path}. Raises `UserError` for a name given twice."""
    sets: dict[str, str] = {}
    for entry in entries:
        name, mark, path = entry.partition("=")
        if not mark or "/" in name:
            name, path = Path(entry).name.split(".")[0], entry
        if name in sets:
            raise UserError(f"--sets: {name} would name two sets; write NAME=PATH")
        sets[name] = path
    return sets
