"""Settings of the model and of its text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mora_ds.config.flags import documented


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

    @property
    def attention(self) -> str | None:
        """What transformers is asked for: None leaves the choice to it."""
        return None if self.attn_implementation == "auto" else self.attn_implementation


@dataclass(frozen=True)
@documented
class DataArguments:
    """What is read, and how it becomes batches."""

    train_files: list[str] = field(default_factory=list)
    """Files or patterns to train on: text, JSON lines, Parquet, Arrow. Quote patterns: 'corpus/*.jsonl'. Each as PATH,
    or each as NAME=PATH:WEIGHT, a source of a mixture with that weight."""
    mixture: str | None = None
    """A YAML file that names several sources with their weights, epochs and phases, instead of --train_files."""
    replay: list[str] = field(default_factory=list)
    """Text of the old domain, as NAME=PATH:SHARE: so much of every batch. Or NAME:SHARE of a source that is there."""
    held_out_share: float = 0.0
    """Share of the documents, by a hash of each, that is never trained on and evaluated under the name held_out."""
    exclude_eval_documents: bool = False
    """Leave documents of --eval_files, known by a hash, out of training."""
    streaming: bool = False
    """Read and tokenise the training text while training instead of caching it first. Needs --max_steps."""
    shuffle_buffer: int = 10000
    """With --streaming: documents that are shuffled together; 0 keeps the order of the files."""
    stream_retry_s: float = 120.0
    """With --streaming: seconds for which a source that cannot be read is tried again before the run ends."""
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

    @property
    def names_text(self) -> bool:
        """Whether any training text is named."""
        return bool(self.train_files or self.dataset_name or self.mixture)

    def named_eval_files(self) -> list[tuple[str, str]]:
        """(name, path or pattern) of each evaluation set."""
        pairs = [entry.partition("=") for entry in self.eval_files]
        named = [(name, path) if mark and "/" not in name else (None, name + mark + path) for name, mark, path in pairs]
        return [(name or Path(path).stem, path) for name, path in named]
