"""Token files as other tools write them, from the descriptions of their formats."""

import struct

import numpy as np

KINDS = ("bin", "ds", "npy")
DTYPE_CODES = {"<i4": 4, "<u2": 8}


def write_tokens(folder, kind, documents, name="a", dtype="<u2"):
    """A file of lists of ids. Returns its path."""
    path = folder / f"{name}.{kind}"
    tokens = np.concatenate([np.array(document, dtype) for document in documents])
    path.write_bytes(tokens.tobytes())
    lengths = np.array(list(map(len, documents)))
    if kind == "bin":
        write_megatron_index(path.with_suffix(".idx"), lengths, dtype)
    elif kind == "ds":
        index = np.cumsum(lengths).astype("<u8").tobytes()
        path.with_name(f"{path.name}.index").write_bytes(index)
    return path


def write_megatron_index(path, lengths, dtype, **changes):
    """`changes`: of the version, the dtype code or the documents."""
    pointers = (np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize
    facts = {
        "version": 1,
        "code": DTYPE_CODES[dtype],
        "documents": np.arange(len(lengths) + 1),
        **changes,
    }
    header = b"MMIDIDX\x00\x00" + struct.pack(
        "<QBQQ",
        facts["version"],
        facts["code"],
        len(lengths),
        len(facts["documents"]),
    )
    path.write_bytes(
        header
        + np.asarray(lengths, "<i4").tobytes()
        + pointers.astype("<i8").tobytes()
        + np.asarray(facts["documents"], "<i8").tobytes()
    )


def tokens_of(tokenizer, texts):
    """The ids of documents, as a token cache has them."""
    ids = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
    return [
        [tokenizer.bos_token_id, *document, tokenizer.eos_token_id] for document in ids
    ]
