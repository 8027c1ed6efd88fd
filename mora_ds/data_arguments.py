"""Settings of the model and of its text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mora_ds.flags import documented


@dataclass(frozen=True)
@documented
class ModelArguments:
    """Which model, and which tokenizer."""

    model_name_or_path: str | None = None
    """Folder or hub name of the model to go on training. Without it and without data: the embedded default."""
    model_config: str | None = None
    """A config.json (see configs/models/) to start from random weights instead of --model_name_or_path."""
    tokenizer_name: str | None = None
    """Folder, hub name or SentencePiece .model file of the tokenizer. Default: the model's own."""
    train_tokenizer_vocab: int = 0
    """Train a SentencePiece tokenizer of this many pieces on the training files; 0 for none."""
    train_tokenizer_type: str = "bpe"
    """SentencePiece's algorithm for --train_tokenizer_vocab: bpe or unigram."""
    trust_remote_code: bool = False
    """Run code that comes with a hub model."""
    attn_implementation: str = "auto"
    """auto (sdpa where the model has it), sdpa, eager, flash_attention_2 and so on, as in transformers."""


@dataclass(frozen=True)
@documented
class DataArguments:
    """What is read, and how it becomes batches."""

    train_files: list[str] = field(default_factory=list)
    """Files or patterns to train on: text, JSON lines, Parquet, Arrow. Quote patterns: 'corpus/*.jsonl'."""
    eval_files: list[str] = field(default_factory=list)
    """Files or patterns whose perplexity is reported, each as PATH (named by its stem) or NAME=PATH."""
    dataset_name: str | None = None
    """Name or folder of a `datasets` data set to train on, instead of --train_files."""
    text_column: str = "text"
    """Column or JSON key that holds the text."""
    seq_len: int = 512
    """Tokens of one packed training sequence."""
    document_mask: bool = True
    """Restart positions at every document and keep attention inside it; --no_document_mask lets it cross."""
    preprocessing_workers: int = 1
    """Processes that tokenise, on each node."""
    cache_dir: str | None = None
    """Folder of the token cache. Default: one in the user's cache folder."""

    def named_eval_files(self) -> list[tuple[str, str]]:
        """(name, path or pattern) of each evaluation set."""
        pairs = [entry.partition("=") for entry in self.eval_files]
        named = [(name, path) if mark and "/" not in name else (None, name + mark + path) for name, mark, path in pairs]
        return [(name or Path(path).stem, path) for name, path in named]
