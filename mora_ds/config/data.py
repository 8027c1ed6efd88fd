"""Settings of the model, its tokenizer and the text."""

import glob
from collections.abc import Iterator
from dataclasses import dataclass, field

from mora_ds.common.errors import validation_errors_of
from mora_ds.common.files import JsonObject, named_path
from mora_ds.common.rope import rope_settings
from mora_ds.config.flags import documented


@dataclass(frozen=True)
@documented
class ModelArguments:
    """Which model, and which tokenizer."""

    model_name_or_path: str | None = None
    """Folder or Hub name of the model to continue training. Without it and without data
    the demo runs."""
    model_config: str | None = None
    """A config.json (see configs/models/) to start from random weights instead of
    --model_name_or_path.
    """
    tokenizer_name: str | None = None
    """Folder or Hub name of the tokenizer. Default: the model's own."""
    train_tokenizer_vocab: int = 0
    """Train a SentencePiece tokenizer (BPE) with a vocabulary of this size on the
    training files; 0 for none."""
    trust_remote_code: bool = False
    """Run code that comes with a model, and that of task files (--eval_tasks)."""
    rope_scaling: str | None = None
    """Rotary embeddings in place of the config.json's, as JSON with transformers' own
    keys: '{"rope_type": "yarn", "factor": 4.0}' for 4 times the positions. rope_type:
    yarn, linear, dynamic, llama3, or default, which changes rope_theta alone."""
    attn_implementation: str = "auto"
    """auto: attention document by document, without a mask of seq_len x seq_len,
    wherever the model can, else transformers' own. A name of transformers (sdpa, eager,
    flash_attention_2 and so on): that one."""

    @property
    def implementation(self) -> str | None:
        """The value of transformers' attn_implementation; None lets transformers
        choose."""
        return None if self.attn_implementation == "auto" else self.attn_implementation

    @property
    def rope(self) -> JsonObject | None:
        """The keys of --rope_scaling. Raises `UserError` where they are wrong."""
        return None if self.rope_scaling is None else rope_settings(self.rope_scaling)

    @property
    def is_named(self) -> bool:
        """Whether there is a model to train, trained or from random weights."""
        return bool(self.model_name_or_path or self.model_config)

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings alone, one message each."""
        yield from validation_errors_of(lambda: self.rope)


@dataclass(frozen=True)
@documented
class DataArguments:
    """The text that is read, and how it becomes batches."""

    train_files: list[str] = field(default_factory=list)
    """Files or patterns to train on: text, JSON lines, Parquet, token files. Quote
    patterns: 'corpus/*.jsonl'. Each as PATH, or each as NAME=PATH:WEIGHT, a source of a
    mixture with that weight."""
    mixture: str | None = None
    """A YAML file that names several sources with their weights, epochs and phases,
    instead of --train_files."""
    replay: list[str] = field(default_factory=list)
    """Text of the old domain, as NAME=PATH:SHARE: this share of every batch."""
    held_out_share: float = 0.0
    """Fraction of the documents, chosen by a hash of each, that is never trained on and
    evaluated under the name held_out."""
    streaming: bool = False
    """Read and tokenize the training text while training instead of caching it first. Needs
    --max_steps.
    """
    shuffle_buffer: int = 10000
    """With --streaming: number of documents that are shuffled together; 0 keeps the
    order of the files."""
    eval_files: list[str] = field(default_factory=list)
    """Files whose perplexity is reported, each set as PATH (named by its file, without
    endings) or NAME=PATH_OR_PATTERN."""
    dataset_name: str | None = None
    """Name or folder of a `datasets` dataset to train on, instead of --train_files."""
    text_column: str = "text"
    """Column or JSON key that holds the text."""
    document_start: str = "auto"
    """What stands before every document: auto (BOS where the tokenizer puts it before a
    text), none, or a token of the vocabulary, such as '<|endoftext|>'."""
    seq_len: int = 512
    """Tokens of one packed training sequence."""
    document_mask: bool = True
    """Restart positions at every document and keep attention inside it;
    --no_document_mask lets it cross."""
    preprocessing_workers: int = 1
    """Number of processes that read and tokenize on each node."""
    cache_dir: str | None = None
    """Folder of the token cache. Default: one in the user's cache folder. All ranks must
    see it if --output_dir is a URL."""

    @property
    def names_text(self) -> bool:
        """Whether any training text is named."""
        return bool(self.train_files or self.dataset_name or self.mixture)

    def named_eval_files(self) -> list[tuple[str, str]]:
        """(name, path or pattern) of each evaluation set."""
        return [named_path(entry) for entry in self.eval_files]

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings alone, one message each. `mixture_config`
        checks the sources."""
        names = [name for name, _ in self.named_eval_files()]
        for name in names:
            if glob.has_magic(name) or names.count(name) > 1:
                yield f"--eval_files: {name} would name several sets, or files; write NAME=PATH"
