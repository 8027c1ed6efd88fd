"""A frozen layer with many adapters at once: every row of a batch gets the update of its adapter, in one product.

    y_g = W0 x_g + b + sum over the terms e of g's adapter: decompress_e(M_e compress_e(x_g))

A *term* is a MoRA matrix with its operator: one for each merged cycle of an adapter and one for the current cycle. All
terms of a layer have one *form* (kind, d_in, d_out, r_hat), so that their matrices can be stacked. Permutations,
groupings and seeds differ between terms; they are in tables of indices.

Shape legend:  G = groups of rows, each with one adapter, T = tokens of a group, D = d_in, O = d_out, R = r_hat,
               E = terms of all groups, U = distinct ones among them, N = input blocks (share: members of a group)

    x (G, T, D) -> gather -> (E, T, N, R) -> share: sum over N; rotate: turn -> bmm by (E, R, R) -> gather -> (E, T, O)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mora_ds.adapters.layer import linear_shape
from mora_ds.adapters.ops.gather import prefers_scatter, regroup_blocks
from mora_ds.adapters.ops.index_tables import make_tables, rope_table
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from mora_ds.common.errors import UserError

_CPU = torch.device("cpu")

_EXACT = (torch.float32, torch.float64)
"""Dtypes in which W0 + delta may be formed: in low precision the sum would round small updates away."""

_LARGE = 64
"""From this r_hat on a CPU multiplies by one matrix after the other, in place: that is as fast as one stacked product,
for which they would be copied, and keeps them in memory once."""

_IN_CACHE = 1 << 18
"""Elements of one tensor of an update that fit into a CPU's cache together with the others."""

_SHORT = 64
"""Smallest number of tokens that a group is split into."""

_LONG = 2
"""Tokens for each input feature from which it is cheaper to form every group's merged weight."""


def form_of(spec: OperatorSpec) -> OperatorSpec:
    """What specs must have in common to be multiplied together: everything except grouping, seed and segments."""
    return replace(spec, grouping=Grouping.PLAIN, seed=0, in_segments=1, out_segments=1)


def paired(spec: OperatorSpec, x: Tensor) -> Tensor:
    """x (..., R) with the last dimension in the order that terms use: RoPE pairs of rotate next to each other, so that
    they are complex numbers, whose rotation takes a CPU a quarter of the time of two halves."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) if spec.kind is OperatorKind.ROTATE else x


def term_tables(spec: OperatorSpec) -> tuple[Tensor, Tensor]:
    """Two int64 tables on the CPU: (N * R,) the input feature at each position of the folded input, D for none, and
    (O,) the position of M's output that each output feature reads, the number of positions for none."""
    tables = make_tables(spec, _CPU)
    sources = tables.sources.index.clone()
    if tables.sources.missing is not None:
        sources[tables.sources.missing] = spec.d_in
    sources = paired(spec, sources.view(-1, spec.r_hat)).flatten()
    return sources, tables.slots % _positions_out(spec) if spec.blockwise else tables.slots


def index_dtype(forms: Iterable[OperatorSpec]) -> torch.dtype:
    """The smallest integer dtype that holds every entry of `term_tables` of these forms."""
    largest = max(max(form.d_in, _positions_out(form)) for form in forms)
    return torch.uint16 if largest < 2**16 else torch.int32


def _positions_out(spec: OperatorSpec) -> int:
    """Positions that outputs read from. Where there are fewer input blocks than output blocks, these wrap around."""
    return min(spec.blocks_in, spec.blocks_out) * spec.r_hat if spec.blockwise else spec.r_hat


@dataclass
class Rows:
    """How the rows of a batch form groups, and the shape of the batch in the forward pass."""

    groups: int
    asked: int | None
    """Rows that adapters were named for; None: one adapter for any number of rows."""
    expands: bool = False
    """Whether each row may have become several consecutive ones (beams)."""
    batch: tuple[int, int] | None = None
    """(rows, tokens) of the model's input."""

    def set_batch(self, rows: int, tokens: int) -> None:
        """Notes the shape of the next batch. Raises `UserError` unless it has as many rows as adapters are named."""
        if self.asked is not None and rows != self.asked and not (self.expands and rows % self.asked == 0):
            raise UserError(f"adapters are named for {self.asked} row(s), but the batch has {rows}")
        self.batch = (rows, tokens)

    def divides(self, x: Tensor) -> bool:
        """Whether a layer's input (..., D) has the batch's rows first, so that it can be split into groups."""
        if self.groups == 1:
            return True
        if self.batch is None:
            return False
        rows, tokens = self.batch
        return x.shape[0] == (rows if x.dim() > 2 else rows * tokens)


@dataclass(frozen=True)
class Terms:
    """What the adapters of a batch add to one layer."""

    form: OperatorSpec
    rows: Rows
    squares: Tensor | tuple[Tensor, ...]
    """(U, R, R); or, of large ones, the matrix of each term, a view of its adapter's `Resident`."""
    which: Tensor | None
    """(E,) index into `squares` for each term; None where they are in the order of the terms."""
    sources: Tensor
    """(E, N * R) first table of each term."""
    gaps: bool
    """Whether any position of the folded input reads no feature."""
    slots: Tensor
    """(E, O) second table of each term."""
    groups: Tensor | None
    """(E,) the group of each term; None where every group has one term, in the order of the groups."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that exist for this batch only."""
        squares = self.squares if isinstance(self.squares, Tensor) else None
        tensors = (squares, self.which, self.sources, self.slots, self.groups)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def stack_terms(
    form: OperatorSpec, rows: Rows, adapters: Sequence[tuple[Tensor, Tensor] | None], of: Sequence[int]
) -> Terms | None:
    """The `Terms` of a batch whose group g has adapter `of[g]` (-1: none); None where no adapter has a term.

    `adapters`: matrices (terms, R, R) and tables (terms, N * R + O) of each, None where it does not adapt the layer.
    """
    counts = [0 if each is None else len(each[0]) for each in adapters]
    starts = [sum(counts[:index]) for index in range(len(counts))]
    which = [starts[each] + term for each in of if each >= 0 for term in range(counts[each])]
    groups = [group for group, each in enumerate(of) if each >= 0 for _ in range(counts[each])]
    if not which:
        return None
    stacks, all_tables = zip(*(each for each in adapters if each is not None), strict=True)
    tables, device = join_tables(form, all_tables), stacks[0].device
    index = None if which == list(range(len(tables))) else torch.tensor(which, device=device)
    if index is not None:
        tables = tables.index_select(0, index)
    squares: Tensor | tuple[Tensor, ...]
    if device.type == "cpu" and form.r_hat >= _LARGE:
        views = [square for stack in stacks for square in stack]
        squares, index = tuple(views[term] for term in which), None
    else:
        squares = torch.cat(stacks)
    sources, slots = tables.split((tables.shape[1] - form.d_out, form.d_out), dim=1)
    return Terms(
        form, rows, squares, index, sources, bool((sources == form.d_in).any()), slots,
        None if groups == list(range(rows.groups)) else torch.tensor(groups, device=device),
    )  # fmt: skip


def join_tables(form: OperatorSpec, tables: Sequence[Tensor]) -> Tensor:
    """(terms, N * R + O) int64 out of several, whose N may differ: groups of one grouping may have more members than
    those of another. Missing positions read no feature."""
    widest = max(each.shape[1] for each in tables)
    if all(each.shape[1] == widest for each in tables):
        return torch.cat(list(tables)).to(torch.int64)
    padded = []
    for each in tables:
        sources, slots = each.to(torch.int64).split((each.shape[1] - form.d_out, form.d_out), dim=1)
        padded.append(torch.cat((F.pad(sources, (0, widest - each.shape[1]), value=form.d_in), slots), dim=1))
    return torch.cat(padded)


def add_updates_(y: Tensor, terms: Terms, x: Tensor) -> None:
    """y (G, T, O) += the update of each group's adapter for x (G, T, D), in place. A CPU computes a few terms at once,
    so that what they gather is still in its cache when they multiply it."""
    count, length = len(terms.sources), x.shape[1]
    if prefers_scatter(x):
        fit = max(_IN_CACHE // max(terms.sources.shape[1], terms.form.d_out), 1)
        count, length = max(fit // length, 1), min(max(fit, _SHORT), length)
    for begin in range(0, x.shape[1], length):
        some = slice(begin, begin + length)  # not `split`, whose views may not be written to under autograd
        for start in range(0, len(terms.sources), count):
            _add(y[:, some], x[:, some], terms, slice(start, start + count))


def _add(y: Tensor, x: Tensor, terms: Terms, part: slice) -> None:
    form = terms.form
    if terms.groups is None:
        y, read = y[part], x[part]
    elif len(x) == 1:
        read = x.expand(len(terms.groups[part]), -1, -1)
    else:
        read = x.index_select(0, terms.groups[part])
    z = _gather(F.pad(read, (0, 1)) if terms.gaps else read, terms.sources[part])
    z = z.unflatten(-1, (-1, form.r_hat))  # (E, T, N, R)
    if form.kind is OperatorKind.SHARE:
        z = z.sum(dim=-2, keepdim=True)
    elif form.kind is OperatorKind.ROTATE:
        z = _rotated(form, z)
    z = _multiply(z.flatten(1, 2), terms, part).view(z.shape)
    if form.blockwise and form.blocks_in > form.blocks_out:
        z = regroup_blocks(z, form.blocks_out)
    z = z.flatten(-2)
    update = _gather(F.pad(z, (0, 1)) if form.kind is OperatorKind.TRUNCATE else z, terms.slots[part])
    if terms.groups is None:
        y.add_(update)
    else:
        y.index_add_(0, terms.groups[part], update)


def _multiply(z: Tensor, terms: Terms, part: slice) -> Tensor:
    """z (E, T * N, R) times the matrices of some terms, transposed."""
    if not isinstance(terms.squares, Tensor):
        pairs = zip(z, terms.squares[part], strict=True)
        return torch.stack([F.linear(each, square.to(z.dtype)) for each, square in pairs])
    squares = terms.squares[part] if terms.which is None else terms.squares.index_select(0, terms.which[part])
    return torch.bmm(z, squares.to(z.dtype).transpose(1, 2))


def _through_weights(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> Tensor:
    """(G, T, D) -> (G, T, O) by a merged weight for each group: W0 plus its adapter's update of the unit vectors."""
    merged = weight.T.expand(len(x), -1, -1).clone(memory_format=torch.contiguous_format)  # (G, D, O)
    add_updates_(merged, terms, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1))
    return torch.bmm(x, merged) if bias is None else torch.baddbmm(bias, x, merged)


def _rotated(form: OperatorSpec, z: Tensor) -> Tensor:
    """RoPE rotation of paired blocks (..., N, R), in fp32 at least, as complex numbers need; in place if z is that."""
    wide = z if z.dtype is torch.float64 else z.float()
    cos, sin = rope_table(form.blocks_in, form.r_hat, wide.dtype, z.device)
    torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(torch.complex(cos, sin))
    return wide.to(z.dtype)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """(E, T, W), (E, P) -> (E, T, P)."""
    return x.gather(2, index.unsqueeze(1).expand(-1, x.shape[1], -1))


class BankLinear(nn.Module):
    """y = W0 x + b plus the `terms` of the current batch. Replaces an `nn.Linear` or `Conv1D` and keeps its parameters
    under their names."""

    bias: nn.Parameter | None

    def __init__(self, base: Any, name: str) -> None:
        super().__init__()
        self.name = name
        self.transposed = isinstance(base, Conv1D)
        self.in_features, self.out_features = linear_shape(base)
        self.weight: nn.Parameter = base.weight
        self.register_parameter("bias", base.bias)
        self.terms: Terms | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.T if self.transposed else self.weight
        if self.terms is None:
            return F.linear(x, weight, self.bias)
        rows = self.terms.rows
        if not rows.divides(x):
            raise UserError(
                f"{self.name} gets {tuple(x.shape)} of a batch of {rows.batch}: its rows cannot be separated, so"
                " adapters cannot be mixed here; give all rows one adapter"
            )
        groups = x.reshape(rows.groups, -1, self.in_features)
        if x.dtype in _EXACT and groups.shape[1] >= _LONG * self.in_features:
            y = _through_weights(groups, weight, self.bias, self.terms)
        else:
            y = F.linear(groups, weight, self.bias)
            add_updates_(y, self.terms, groups)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
