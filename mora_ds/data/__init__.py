"""Text on disk -> batches, the wing of the house that knows no model and no DeepSpeed.

file -> document -> tokens -> packed (B, T)

load_corpus        files, globs, folders or a `datasets` name        -> Corpus, read document by document
load_tokenizer     the model's, a SentencePiece .model, one trained  -> a transformers tokenizer
build_cache        Corpus + tokenizer, once, in several processes    -> TokenCache, memory-mapped
PackedDataset      TokenCache + seq_len + seed                       -> batch(step, global_batch_size, rows)
Mixture            several sources, weights, phases                  -> the same, with exact shares
StreamSource       documents, tokenised while training               -> the blocks that a cache would give, in order
prepare_corpus     Corpus + tokenizer + filters, offline              -> a folder that load_corpus takes as it is
extend_tokenizer   a tokenizer + pieces of domain_pieces              -> the same, with new pieces behind the old ones
write_embedded     no file named at all                              -> the default corpora, out of Python itself
"""

from mora_ds.data.cache import TokenCache, build_cache
from mora_ds.data.corpus import Corpus, is_saved_dataset, load_corpus, resolve_files, stream_dataset
from mora_ds.data.dedup import canonical_digest, is_held_out
from mora_ds.data.embedded import EmbeddedCorpus, domain_documents, general_documents, write_embedded
from mora_ds.data.extend_tokenizer import Extension, check_extension, domain_pieces, extend_tokenizer
from mora_ds.data.held_out import DocumentFilter, document_hash, hashes_of
from mora_ds.data.mixture import CachedSource, Mixture, Source, TrainData
from mora_ds.data.packing import IGNORED, PackedDataset, TokenBlocks
from mora_ds.data.preparation import Filters, PreparationReport, prepare_corpus
from mora_ds.data.readers import Document
from mora_ds.data.sentencepiece import train_sentencepiece
from mora_ds.data.stream import DocumentStream, StreamSettings
from mora_ds.data.stream_source import Share, StreamMixture, StreamSource
from mora_ds.data.tokenizer import (
    Encoder,
    check_reload,
    check_vocabulary,
    largest_id,
    load_tokenizer,
    tokenizer_fingerprint,
    wants_bos,
)

__all__ = [
    "IGNORED",
    "CachedSource",
    "Corpus",
    "Document",
    "DocumentFilter",
    "DocumentStream",
    "EmbeddedCorpus",
    "Encoder",
    "Extension",
    "Filters",
    "Mixture",
    "PackedDataset",
    "PreparationReport",
    "Share",
    "Source",
    "StreamMixture",
    "StreamSettings",
    "StreamSource",
    "TokenBlocks",
    "TokenCache",
    "TrainData",
    "build_cache",
    "canonical_digest",
    "check_extension",
    "check_reload",
    "check_vocabulary",
    "document_hash",
    "domain_documents",
    "domain_pieces",
    "extend_tokenizer",
    "general_documents",
    "hashes_of",
    "is_held_out",
    "is_saved_dataset",
    "largest_id",
    "load_corpus",
    "load_tokenizer",
    "prepare_corpus",
    "resolve_files",
    "stream_dataset",
    "tokenizer_fingerprint",
    "train_sentencepiece",
    "wants_bos",
    "write_embedded",
]
