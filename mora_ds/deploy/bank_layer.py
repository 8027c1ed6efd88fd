"""A frozen layer under many adapters at once: every row of a batch gets its own update, in one batched product.

    y_g = W0 x_g + b + sum over the terms e of g's adapter: decompress_e(M_e compress_e(x_g))

A *term* is a square with its wiring: one for each merged cycle of an adapter and one for its live square. All terms of
a layer are of one form (kind, d_in, d_out, r_hat), so that their squares stack; permutations, groupings and seeds are
each term's own and live in tables of indices.

Shape legend:  G = groups of rows, each with one adapter, T = tokens of a group, D = d_in, O = d_out, R = r_hat,
               E = terms of all groups, U = different ones among them, N = input blocks (share: members of a group)

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
from mora_ds.errors import UserError

_CPU = torch.device("cpu")

_EXACT = (torch.float32, torch.float64)
"""Where W0 + delta is as good as two products: in low precision it would round small updates away."""

_LARGE = 64
"""From this r_hat a CPU multiplies by squares where they lie, one after the other: that is as quick as one product of
all, which they would first have to be copied together for, and they are in memory once."""

_IN_CACHE = 1 << 18
"""Numbers of one of an update's tensors that a CPU's cache holds beside the others."""

_SHORT = 64
"""Tokens that a group is never cut below."""

_LONG = 2
"""Groups of so many tokens for each input are cheaper through weights of their own, which cost as much as one each."""


def form_of(spec: OperatorSpec) -> OperatorSpec:
    """What a spec must share with others to be multiplied together with them: all but its wiring."""
    return replace(spec, grouping=Grouping.PLAIN, seed=0, in_segments=1, out_segments=1)


def paired(spec: OperatorSpec, lanes: Tensor) -> Tensor:
    """(..., R) in the order that terms have: rotate's pairs side by side, so that they are complex numbers, which turn
    in a quarter of the time that two halves take on a CPU."""
    return lanes.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) if spec.kind is OperatorKind.ROTATE else lanes


def term_square(spec: OperatorSpec, square: Tensor) -> Tensor:
    """(R, R) as `Terms` multiply by it."""
    return paired(spec, square)


def term_tables(spec: OperatorSpec) -> tuple[Tensor, Tensor]:
    """(N * R,) the input at each place of the folded input, D for none; (O,) the place that each output reads, the
    number of places for none. Int64, on the CPU."""
    found = make_tables(spec, _CPU)
    sources = found.sources.index.clone()
    if found.sources.missing is not None:
        sources[found.sources.missing] = spec.d_in
    sources = paired(spec, sources.view(-1, spec.r_hat)).flatten()
    return sources, found.slots % _places_out(spec) if spec.blockwise else found.slots


def index_dtype(forms: Iterable[OperatorSpec]) -> torch.dtype:
    """The smallest that holds what `term_tables` of these forms hold."""
    largest = max(max(form.d_in, _places_out(form)) for form in forms)
    return torch.uint16 if largest < 2**16 else torch.int32


def _places_out(spec: OperatorSpec) -> int:
    """Places that outputs read from: those of the output blocks, which begin again where input blocks are fewer."""
    return min(spec.blocks_in, spec.blocks_out) * spec.r_hat if spec.blockwise else spec.r_hat


@dataclass
class Rows:
    """Which rows of a batch the groups are, and of what shape the batch on its way is."""

    groups: int
    asked: int | None
    """Rows that adapters were named for; None: one adapter, for however many there are."""
    expands: bool = False
    """Whether each row may have become several, one behind the other (beams)."""
    batch: tuple[int, int] | None = None
    """(rows, tokens) of the model's input."""

    def come(self, rows: int, tokens: int) -> None:
        """A batch comes in. Raises `UserError` where there are not as many rows as adapters."""
        if self.asked is not None and rows != self.asked and not (self.expands and rows % self.asked == 0):
            raise UserError(f"adapters are named for {self.asked} row(s), but the batch has {rows}")
        self.batch = (rows, tokens)

    def fit(self, x: Tensor) -> bool:
        """Whether a layer's input (..., D) has the batch's rows first, so that it can be cut into groups."""
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
    """(U, R, R); or each term's own, a view of what its adapter holds, where it is large."""
    which: Tensor | None
    """(E,) the square of each term, where they are one tensor; None: one each, in their order."""
    sources: Tensor
    """(E, N * R)."""
    gaps: bool
    """Whether any of them reads nothing."""
    slots: Tensor
    """(E, O)."""
    groups: Tensor | None
    """(E,) the group of each term; None: one term a group, in their order."""

    @property
    def nbytes(self) -> int:
        """Of all tensors that are the batch's own."""
        squares = self.squares if isinstance(self.squares, Tensor) else None
        tensors = (squares, self.which, self.sources, self.slots, self.groups)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def stack_terms(
    form: OperatorSpec, rows: Rows, own: Sequence[tuple[Tensor, Tensor] | None], of: Sequence[int]
) -> Terms | None:
    """The `Terms` of a batch whose group g has adapter `of[g]` (-1: none); None where no adapter has a term.

    `own`: of each adapter, squares (terms, R, R) and tables (terms, N * R + O), or None where it leaves the layer out.
    """
    counts = [0 if each is None else len(each[0]) for each in own]
    starts = [sum(counts[:index]) for index in range(len(counts))]
    which = [starts[each] + term for each in of if each >= 0 for term in range(counts[each])]
    groups = [group for group, each in enumerate(of) if each >= 0 for _ in range(counts[each])]
    if not which:
        return None
    there = [each for each in own if each is not None]
    tables, device = join_tables(form, [each[1] for each in there]), there[0][0].device
    index = None if which == list(range(len(tables))) else torch.tensor(which, device=device)
    if index is not None:
        tables = tables.index_select(0, index)
    squares: Tensor | tuple[Tensor, ...]
    if device.type == "cpu" and form.r_hat >= _LARGE:
        each_square = [square for each in there for square in each[0]]
        squares, index = tuple(each_square[term] for term in which), None
    else:
        squares = torch.cat([each[0] for each in there])
    sources, slots = tables.split((tables.shape[1] - form.d_out, form.d_out), dim=1)
    return Terms(
        form, rows, squares, index, sources, bool((sources == form.d_in).any()), slots,
        None if groups == list(range(rows.groups)) else torch.tensor(groups, device=device),
    )  # fmt: skip


def join_tables(form: OperatorSpec, tables: Sequence[Tensor]) -> Tensor:
    """(terms, N * R + O) int64 out of several, whose N may differ: groups of one grouping may have more members than
    those of another. What is missing reads nothing."""
    widest = max(each.shape[1] for each in tables)
    if all(each.shape[1] == widest for each in tables):
        return torch.cat(list(tables)).to(torch.int64)
    padded = []
    for each in tables:
        sources, slots = each.to(torch.int64).split((each.shape[1] - form.d_out, form.d_out), dim=1)
        padded.append(torch.cat((F.pad(sources, (0, widest - each.shape[1]), value=form.d_in), slots), dim=1))
    return torch.cat(padded)


def add_updates_(y: Tensor, terms: Terms, x: Tensor) -> None:
    """y (G, T, O) += what each group's adapter makes of x (G, T, D), in place. On a CPU a few terms at a time, so that
    what they move is still in its cache when they multiply it."""
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
    else:
        read = _of_terms(x, terms.groups[part])
    z = _gather(F.pad(read, (0, 1)) if terms.gaps else read, terms.sources[part])
    z = z.unflatten(-1, (-1, form.r_hat))  # (E, T, N, R)
    if form.kind is OperatorKind.SHARE:
        z = z.sum(dim=-2, keepdim=True)
    elif form.kind is OperatorKind.ROTATE:
        z = _turn(form, z)
    z = _multiply(z.flatten(1, 2), terms, part).view(z.shape)
    if form.blockwise and form.blocks_in > form.blocks_out:
        z = regroup_blocks(z, form.blocks_out)
    z = z.flatten(-2)
    found = _gather(F.pad(z, (0, 1)) if form.kind is OperatorKind.TRUNCATE else z, terms.slots[part])
    if terms.groups is None:
        y.add_(found)
    else:
        y.index_add_(0, terms.groups[part], found)


def _multiply(z: Tensor, terms: Terms, part: slice) -> Tensor:
    """(E, T * N, R) by the squares of some terms."""
    if not isinstance(terms.squares, Tensor):
        pairs = zip(z, terms.squares[part], strict=True)
        return torch.stack([F.linear(each, square.to(z.dtype)) for each, square in pairs])
    squares = terms.squares[part] if terms.which is None else terms.squares.index_select(0, terms.which[part])
    return torch.bmm(z, squares.to(z.dtype).transpose(1, 2))


def _through_weights(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> Tensor:
    """(G, T, D) -> (G, T, O) by the groups' own weights, W0 plus what their adapters make of the unit vectors."""
    own = weight.T.expand(len(x), -1, -1).clone(memory_format=torch.contiguous_format)  # (G, D, O)
    add_updates_(own, terms, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1))
    return torch.bmm(x, own) if bias is None else torch.baddbmm(bias, x, own)


def _turn(form: OperatorSpec, z: Tensor) -> Tensor:
    """Rotate's turning of paired blocks (..., N, R), in fp32 at least, for complex numbers come no smaller: those are
    turned in place."""
    wide = z if z.dtype is torch.float64 else z.float()
    cos, sin = rope_table(form.blocks_in, form.r_hat, wide.dtype, z.device)
    torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(torch.complex(cos, sin))
    return wide.to(z.dtype)


def _of_terms(x: Tensor, groups: Tensor) -> Tensor:
    return x.expand(len(groups), -1, -1) if len(x) == 1 else x.index_select(0, groups)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """(E, T, W), (E, P) -> (E, T, P)."""
    return x.gather(2, index.unsqueeze(1).expand(-1, x.shape[1], -1))


class BankLinear(nn.Module):
    """y = W0 x + b, and the `terms` of the batch in progress. Takes the place of an `nn.Linear` or `Conv1D`, whose
    parameters it keeps as they are, under their names."""

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
        if not rows.fit(x):
            raise UserError(
                f"{self.name} gets {tuple(x.shape)} of a batch of {rows.batch}: its rows cannot be told apart, so"
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
