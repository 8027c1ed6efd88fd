"""Attention by documents is dense attention under a mask, in its outputs and gradients, and
holds nothing of T x T.
"""

import weakref
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from mora_ds.data.documents import Documents
from mora_ds.models import attention as module_under_test
from mora_ds.models.attention import (
    Scores,
    by_documents,
    document_attention,
    fits_varlen,
)
from tests.helpers.attention import (
    HEADS,
    LAYOUTS,
    LENGTH,
    SIZE,
    assert_same_attention,
    gradients,
    parts,
    positions_of,
    reference,
)
from tests.helpers.pairwise import pairwise
from tests.helpers.tables import each_row, parsed

KINDS = ["plain", "capped", "sinks"]


def of_kind(kind, sinks):
    """Capped scores, or the sinks, as the model of this kind asks for them."""
    return {
        "softcap": 2.0 if kind == "capped" else None,
        "s_aux": sinks if kind == "sinks" else None,
    }


def attend(query, key, value, mask=None, module=None, **more):
    """(B, T, H, D_v) of a layer of attention."""
    module = module or torch.nn.Module()
    return document_attention(module, query, key, value, mask, **more)[0]


@pairwise(
    {"layout": list(LAYOUTS), "window": [None, 12, 40, LENGTH - 1], "kind": KINDS}
)
def test_document_attention_equals_dense_attention(layout, window, kind, monkeypatch):
    # Blocks that end within documents
    monkeypatch.setattr(module_under_test, "QUERIES", 20)
    positions = positions_of(LAYOUTS[layout])
    for shared, value_size in ((HEADS, SIZE), (2, 8), (1, SIZE)):
        *inputs, sinks = parts(len(positions), LENGTH, shared, value_size)
        scores = of_kind(kind, sinks)
        options = {"scaling": 0.3, "sliding_window": window, "position_ids": positions}
        trained = [*inputs, sinks] if kind == "sinks" else inputs
        for documents in (Documents.of(positions), None):
            out = attend(*inputs, documents=documents, **scores, **options)
            expected = reference(*inputs, positions, 0.3, window, *scores.values())
            assert_same_attention(out, expected, trained)


def test_block_windows_equal_dense_attention():
    """Documents longer than a block of queries under a window."""
    positions = torch.cat([torch.arange(500), torch.arange(140)])[None]
    *inputs, sinks = parts(1, 640, 2)
    for window, used_sinks in product((30, 200), (None, sinks)):
        options = {"sliding_window": window, "s_aux": used_sinks}
        out = attend(*inputs, position_ids=positions, **options)
        expected = reference(*inputs, positions, SIZE**-0.5, window, None, used_sinks)
        assert_same_attention(out, expected, inputs)


def test_documents_are_read_from_the_positions_of_all_rows():
    """Positions of one row are those of every row; positions of several axes, or of other
    tokens, say nothing.
    """
    inputs = parts(2, LENGTH, 2)[:3]
    split = positions_of([[40, 56]])
    full = attend(*inputs)
    by_documents = attend(*inputs, position_ids=split)
    assert torch.equal(by_documents, attend(*inputs, position_ids=split.expand(2, -1)))
    assert not torch.equal(by_documents, full)
    for silent in (split.expand(3, 2, -1), split[:, :-1], split.to("meta")):
        assert torch.equal(attend(*inputs, position_ids=silent), full)
    mora_matrix = parts(4, 4, 2)[:3]  # as many rows as tokens
    axes = attend(*mora_matrix, position_ids=torch.zeros(3, 4, 4))
    assert torch.equal(axes, attend(*mora_matrix))


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_has_the_precision_of_the_query(kind):
    half = [
        tensor.detach().bfloat16().requires_grad_() for tensor in parts(1, LENGTH, 2)
    ]
    *inputs, sinks = half
    out = attend(*inputs, **of_kind(kind, sinks))
    *exact, exact_sinks = (tensor.detach().double() for tensor in half)
    scores = of_kind(kind, exact_sinks)
    positions = positions_of([[LENGTH]])
    wanted = reference(*exact, positions, SIZE**-0.5, None, *scores.values())
    assert out.dtype is torch.bfloat16
    assert out.is_contiguous(), "AFMoE takes a view of it"
    torch.testing.assert_close(out.double(), wanted, rtol=2e-2, atol=2e-2)
    trained = half if kind == "sinks" else inputs
    assert {gradient.dtype for gradient in gradients(out, trained)} == {torch.bfloat16}


def test_what_is_registered_is_not_replaced(monkeypatch):
    """Sequence parallelism wraps itself around it."""
    name = module_under_test.NAME
    known = module_under_test.ALL_ATTENTION_FUNCTIONS
    module_under_test.register()
    wrapped = document_attention if known[name] is not document_attention else sum
    monkeypatch.setitem(known, name, wrapped)
    module_under_test.register()
    assert known[name] is wrapped


def layer_of(shared):
    """An attention layer as transformers' own attention reads it."""
    layer = torch.nn.Module()
    vars(layer)["num_key_value_groups"] = HEADS // shared
    return layer


@pairwise({"window": [None, 12], "kind": KINDS, "masked": [False, True]})
def test_dropout_is_applied(window, kind, masked):
    """Dropout leaves one weight in a thousand, by either path."""
    *inputs, sinks = parts(2, LENGTH, 2)
    mask = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril() if masked else None
    options = {"dropout": 0.999, "sliding_window": window, **of_kind(kind, sinks)}
    torch.manual_seed(0)
    out = attend(*inputs, mask, layer_of(2), **options)
    assert (out == 0).double().mean() > 0.8


FITS = """
{dtype: float16} | true
{} | true
{size: 256, value_size: 256} | true
{dtype: float32} | false
{device: cpu} | false
{size: 257} | false
{value_size: 257} | false
{softcap: 30.0} | false
{dropout: 0.1} | false
{sinks: true} | false
"""


@each_row("case, fits", FITS)
def test_what_the_varlen_kernel_can_compute(case, fits):
    """The meta device stands for a GPU."""
    defaults = {"dtype": "bfloat16", "size": 64, "value_size": 64, "device": "meta"}
    scores = {**defaults, **parsed(case)}
    how = {"dtype": getattr(torch, scores.pop("dtype")), "device": scores.pop("device")}
    query, value = (
        torch.empty(1, 2, 4, scores.pop(name), **how) for name in ("size", "value_size")
    )
    assert fits_varlen(query, value, Scores(1.0, **scores)) == parsed(fits)


@pytest.mark.parametrize(
    "capability, has_flash", [((7, 5), False), ((8, 0), True), ((9, 0), True)]
)
def test_gpus_from_ampere_on_have_the_kernel(monkeypatch, capability, has_flash):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert module_under_test.has_flash.__wrapped__(torch.device("cuda", 0)) is has_flash


def test_transformers_masks_are_made_where_documents_do_not_say_all():
    module_under_test.register()
    make = ALL_MASK_ATTENTION_FUNCTIONS[module_under_test.NAME]
    assert make(4, 4, batch_size=1) is None
    hidden = torch.tensor([[False, True, True, True]])
    options = {
        "use_vmap": True,
        "allow_is_causal_skip": False,
        "mask_function": lambda batch, head, query, key: key > 0,
    }
    for mask in (
        make(4, 4, batch_size=1, attention_mask=hidden),
        make(4, 4, batch_size=1, **options),
    ):
        assert not mask[..., 0].any()
    cached = make(2, 4, batch_size=1, q_offset=2)
    assert cached.tolist() == [[[[True, True, True, False], [True] * 4]]]


def test_short_documents_are_padded_by_a_quarter_at_most(monkeypatch):
    """And long ones not at all."""
    attend = F.scaled_dot_product_attention
    shapes = []

    def noted(query, *more, **output):
        shapes.append((query.shape[0], query.shape[2]))
        return attend(query, *more, **output)

    def shapes_of(*lengths):
        shapes.clear()
        tokens = torch.zeros(sum(lengths), 1, 4)
        by_documents(tokens, tokens, tokens, lengths, None, Scores(1.0))
        return sorted(shapes)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    lengths = (5, 17, 1, 1, 17, 30, 2, 700, 701, 24)
    padded = shapes_of(*lengths)
    assert sum(count * size for count, size in padded) < 1.25 * sum(lengths)
    assert len(padded) < len(lengths)
    assert shapes_of(600, 3000, 600, 16, 1) == [(1, 3000), (2, 16), (2, 600)]
    for length in (40, 100, 300, 500):  # half of a length is another group
        for shorter in (length // 2, 3 * length // 4 - 1):
            assert len(shapes_of(length, shorter)) == 2


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that is made while it is entered, backward included."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        storages = [
            tensor.untyped_storage()
            for tensor in tree_leaves(out)
            if isinstance(tensor, Tensor)
        ]
        sizes = [storage.nbytes() // 4 for storage in storages]
        self.numbers = max([self.numbers, *sizes])
        return out


LONG = 4096


LENGTHS = {"one": [LONG], "some": [1000, 2500, 596], "many": [64] * 64}


@pairwise(
    {
        "lengths": list(LENGTHS),
        "kind": ["plain", "window", "capped", "sinks"],
        "device": ["cpu", "meta"],
    }
)
def test_no_tensor_has_t_times_t_numbers(lengths, kind, device):
    """On the meta device bf16 takes the branch of a GPU."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    documents = Documents.of(positions_of([LENGTHS[lengths]])).to(device)
    shapes = ((1, 2, LONG, 8), (1, 1, LONG, 8), (1, 1, LONG, 8), (2,))
    query, key, value, sinks = (
        torch.zeros(s, dtype=dtype, device=device, requires_grad=True) for s in shapes
    )
    window = 128 if kind == "window" else None
    options = {"documents": documents, "sliding_window": window, **of_kind(kind, sinks)}
    with Largest() as largest:
        attend(query, key, value, **options).sum().backward()
    assert query.grad.shape == query.shape
    assert LONG * 8 <= largest.numbers < LONG * LONG / 2


def test_capped_scores_keep_no_scores_and_no_mask_for_backward(monkeypatch):
    saved = []
    masks = []

    def noted(*arguments):
        mask = seen(*arguments)
        masks.append(weakref.ref(mask))
        return mask

    seen = module_under_test.causal_mask
    monkeypatch.setattr(module_under_test, "causal_mask", noted)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel() * t.is_floating_point()) or t, id
    ):
        attend(*parts(1, 1024, 2)[:3], softcap=2.0)
    assert 0 < sum(saved) < 1024 * 1024
    masks.clear()
    out = attend(*parts(1, LENGTH, 2)[:3], softcap=5.0)
    assert {mask() for mask in masks} == {None}
    count = len(masks)
    out.sum().backward()
    assert len(masks) == 2 * count, "made again"
