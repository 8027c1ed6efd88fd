"""From text on disk to batches of tokens. Imports neither models nor DeepSpeed.

readers            one file -> documents; long ones in chunks
members, corpus    files, patterns, folders or a `datasets` name -> `Corpus`
held_out           splits documents into training and held-out ones
sentencepiece, tokenizer, extend_tokenizer    train, load, check and extend tokenizers
token_files, token_index    files of tokens as other tools write them, read in place
content_index, cache  `Corpus` + tokenizer -> `TokenCache` of each file, memory-mapped; built once, by `workers`
order              the shuffled order of an epoch, computed, never stored; the order of a mixture's sources
packing, documents `TokenCache` + sequence length + seed -> `PackedDataset`: sequences, shuffled in each epoch
mixture            sources, weights, phases -> `Mixture`: batches by step, with exact proportions, read ahead
stream, stream_source    documents tokenized during training, by shards of files -> `StreamSource`: no cache
demo_corpus        the text of the demo, from the Python standard library
"""

from mora_ds.data.cache import JoinedCache, TokenCache, build_cache
from mora_ds.data.corpus import Corpus, load_corpus, resolve_files
from mora_ds.data.demo_corpus import domain_documents, write_demo_corpus
from mora_ds.data.extend_tokenizer import (
    Extension,
    bpe_backend,
    check_extension,
    extend_tokenizer,
)
from mora_ds.data.held_out import DocumentFilter, document_hash
from mora_ds.data.mixture import Mixture, Source
from mora_ds.data.packing import IGNORED, PackedDataset
from mora_ds.data.readers import Document
from mora_ds.data.sentencepiece import candidate_tokens, train_sentencepiece
from mora_ds.data.stream import DocumentStream
from mora_ds.data.stream_source import StreamSource
from mora_ds.data.tokenizer import (
    AUTO,
    NOTHING,
    Encoder,
    adds_bos,
    block_start,
    check_reload,
    check_vocabulary,
    has_tokenizer,
    largest_id,
    load_tokenizer,
    start_id,
    tokenizer_fingerprint,
)
