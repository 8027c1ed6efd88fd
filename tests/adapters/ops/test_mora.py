"""The operators against the reference's outputs, and against their own contract on every
shape.
"""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

from mora_ds.adapters.kernels.linear import KernelProducts
from mora_ds.adapters.kernels.tables import KernelTables
from mora_ds.adapters.ops import index_tables
from mora_ds.adapters.ops.index_tables import OPERATORS, Operator, mora_matrix_size
from mora_ds.adapters.ops.linear import Compute, LayerProducts, mora_linear
from mora_ds.adapters.ops.mora import (
    OperatorSpec,
    adjoint,
    delta_weight,
    mora_matrix_gradient,
    mora_update,
)
from mora_ds.adapters.ops.spec import (
    Grouping,
    OperatorKind,
    default_kind,
    permutation_seed,
    round_side,
)
from mora_ds.adapters.ops.updates import merge_updates_
from mora_ds.adapters.registry import spec_from_dict
from mora_ds.parallel.windows import Window, tables_of_window
from tests.helpers.errors import user_error
from tests.helpers.operators import (
    KINDS_AND_GROUPINGS,
    blocks_onto_wrapped_outputs,
    by_definition,
    by_path,
    outputs_and_gradients,
    random,
    spec_id,
    specs,
)
from tests.helpers.tables import each_row, parsed

GOLDEN = Path(__file__).parent / "golden_operators.safetensors"
REFERENCE_TYPES = {
    1: (OperatorKind.SHARE, Grouping.STRIDED),
    2: (OperatorKind.SHARE, Grouping.CONTIGUOUS),
    3: (OperatorKind.SHARE, Grouping.CONTIGUOUS_STRIDED),
    4: (OperatorKind.SHARE, Grouping.STRIDED_CONTIGUOUS),
    6: (OperatorKind.ROTATE, Grouping.PLAIN),
}


every_operator = pytest.mark.parametrize("spec", list(specs()), ids=spec_id)
every_grouping = pytest.mark.parametrize("kind, grouping", KINDS_AND_GROUPINGS)


# -- the reference ---------------------------------------------------------------------


def golden_cases():
    with safe_open(GOLDEN, "pt") as file:
        return sorted({key.rsplit(".", 1)[0] for key in file.keys()})  # noqa: SIM118  (no mapping)


@pytest.mark.parametrize("case", golden_cases())
def test_reference_outputs_are_reproduced(case):
    with safe_open(GOLDEN, "pt") as file:
        mora_matrix, x, y, delta = (
            file.get_tensor(f"{case}.{name}") for name in ("M", "x", "y", "delta")
        )
    kind, grouping = REFERENCE_TYPES[int(case[4])]
    spec = OperatorSpec(kind, x.shape[1], y.shape[1], mora_matrix.shape[0], grouping)
    assert mora_matrix.dtype is torch.float64
    for result, right in (
        (mora_update(spec, mora_matrix, x), y),
        (delta_weight(spec, mora_matrix), delta),
    ):
        # The reference's sines and cosines are of angles in fp32, by its CPU's
        # instructions; ours are exact but for one rounding.
        apart = (
            3e-7 * right.abs().max().item() if kind is OperatorKind.ROTATE else 1e-10
        )
        assert_close(result, right, rtol=0, atol=apart)


@pytest.mark.parametrize("blocks, r_hat", [(1, 2), (7, 2), (16, 256), (300, 38)])
def test_sines_and_cosines_are_correctly_rounded(blocks, r_hat):
    half = r_hat // 2
    tables = index_tables.rope_table(blocks, r_hat, torch.float32, torch.device("cpu"))
    for table, function in zip(tables, (math.cos, math.sin), strict=True):
        exact = [
            [function(block * 10000 ** (-pair / half)) for pair in range(half)]
            for block in range(blocks)
        ]
        assert torch.equal(table, torch.tensor(exact, dtype=torch.float32))


# -- the contract ----------------------------------------------------------------------


@every_operator
def test_delta_weight_is_the_update(spec):
    mora_matrix = random(spec.r_hat, spec.r_hat)
    x = random(2, 3, spec.d_in, seed=1)
    delta = delta_weight(spec, mora_matrix)
    assert delta.shape == (spec.d_out, spec.d_in)
    assert_close(mora_update(spec, mora_matrix, x), x @ delta.T, rtol=1e-12, atol=1e-11)
    factors = spec.low_rank(mora_matrix)
    assert (factors is None) == (spec.blocks > 1)
    if factors is not None:
        assert_close(factors[1] @ factors[0], delta, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(
    "spec", [spec for spec in specs() if OPERATORS[spec.kind].in_blocks], ids=spec_id
)
def test_blocks_reach_every_input_and_every_output(spec):
    """The reference drops inputs where d_in > d_out (6,832 of 11,008 in Llama's
    down_proj).
    """
    delta = delta_weight(spec, random(spec.r_hat, spec.r_hat))
    assert (delta.abs().sum(dim=0) > 0).all(), "an input never adapts"
    assert (delta.abs().sum(dim=1) > 0).all(), "an output never adapts"


def test_truncate_and_decouple_by_hand():
    mora_matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    truncate = delta_weight(OperatorSpec(OperatorKind.TRUNCATE, 3, 4, 2), mora_matrix)
    assert truncate.tolist() == [[1, 2, 0], [3, 4, 0], [0, 0, 0], [0, 0, 0]]
    decouple = delta_weight(OperatorSpec(OperatorKind.DECOUPLE, 4, 4, 2), mora_matrix)
    assert decouple.tolist() == [[1, 2, 0, 0], [3, 4, 0, 0], [0, 0, 1, 2], [0, 0, 3, 4]]
    # Two input blocks on one output block
    folded = delta_weight(OperatorSpec(OperatorKind.DECOUPLE, 4, 2, 2), mora_matrix)
    assert folded.tolist() == [[1, 2, 1, 2], [3, 4, 3, 4]]


# -- another operator ------------------------------------------------------------------


def mirrored_groups(spec):
    """Like share, with groups of inputs in reverse order, and of outputs in runs."""
    inputs = torch.arange(spec.d_in)
    outputs = torch.arange(spec.d_out)
    fold = index_tables.lists(spec.r_hat - 1 - inputs % spec.r_hat, inputs, spec.r_hat)
    return fold, index_tables.lists(
        outputs * spec.r_hat // spec.d_out, outputs, spec.r_hat
    )


def blocks_onto_few_outputs(spec):
    """All blocks of the input, from the last number to the first and on from the last
    again, onto the same outputs: these read some inputs in two blocks, and the outputs
    after them read none."""
    fold = torch.arange(spec.blocks_in * spec.r_hat).flip(0).unsqueeze(0) % spec.d_in
    outputs = torch.arange(spec.r_hat).unsqueeze(0)
    return fold, outputs.where(outputs < spec.d_out, -1)


@pytest.mark.parametrize("grouping", [Grouping.PLAIN, Grouping.PERMUTED])
@pytest.mark.parametrize("sizes", [(18, 11, 4), (12, 20, 4), (21, 3, 6)], ids=str)
@pytest.mark.parametrize(
    "operator",
    [
        Operator(mirrored_groups),
        Operator(blocks_onto_few_outputs, in_blocks=True),
        Operator(blocks_onto_few_outputs, in_blocks=True, rotates=True),
        Operator(blocks_onto_wrapped_outputs, in_blocks=True),
        Operator(blocks_onto_wrapped_outputs, in_blocks=True, rotates=True),
    ],
    ids=[
        "groups",
        "blocks",
        "rotated blocks",
        "wrapped blocks",
        "wrapped and rotated blocks",
    ],
)
def test_an_operator_from_two_maps_has_update_and_delta(
    operator, sizes, grouping, monkeypatch
):
    """The new operator takes the name of a packaged one."""
    index_tables.clear_tables()
    monkeypatch.setitem(index_tables.OPERATORS, OperatorKind.TRUNCATE, operator)
    spec = OperatorSpec(OperatorKind.TRUNCATE, *sizes, grouping, seed=4)
    mora_matrix = random(spec.r_hat, spec.r_hat)
    x = random(5, spec.d_in, seed=1)
    delta = delta_weight(spec, mora_matrix)
    assert_close(mora_update(spec, mora_matrix, x), x @ delta.T)
    gradient = random(spec.d_out, spec.d_in, seed=2)
    assert_close(
        (delta * gradient).sum(), (mora_matrix * adjoint(spec, gradient)).sum()
    )
    factors = spec.low_rank(mora_matrix)
    assert (factors is None) == operator.in_blocks
    if factors is not None:
        assert_close(factors[1] @ factors[0], delta)
    expected = outputs_and_gradients(spec, torch.float64, by_definition(spec))
    for path in (Compute.ACTIVATION, Compute.WEIGHT):
        assert_close(
            outputs_and_gradients(spec, torch.float64, by_path(spec, path)), expected
        )
    merged = random(spec.d_out, spec.d_in, seed=3)
    right = merged + delta
    kernels = KernelProducts(KernelTables(spec, torch.device("cpu")))
    assert_close(kernels.effective_weight(merged, mora_matrix), right)
    for path in (Compute.ACTIVATION, Compute.WEIGHT):
        by_kernels = partial(mora_linear, products=kernels, compute=path)
        assert_close(outputs_and_gradients(spec, torch.float64, by_kernels), expected)
    g = random(5, spec.d_out, seed=4)
    half = spec.d_in // 2
    windows = [
        Window(spec, span, (0, spec.d_out)) for span in ((0, half), (half, spec.d_in))
    ]
    zeros = [torch.zeros(spec.d_out, window.d_in).double() for window in windows]
    formed = [
        LayerProducts(window).effective_weight(zero, mora_matrix)
        for window, zero in zip(windows, zeros, strict=True)
    ]
    assert_close(torch.cat(formed, dim=1), delta)
    folded = [
        LayerProducts(window).saved_input(x[:, slice(*window.inputs)])
        for window in windows
    ]
    gradients = [
        mora_matrix_gradient(window, saved, g)
        for window, saved in zip(windows, folded, strict=True)
    ]
    assert_close(sum(gradients), adjoint(spec, g.T @ x))
    merge_updates_(merged, [(spec, mora_matrix)])
    assert torch.equal(merged, right)
    index_tables.clear_tables()
    tables_of_window.cache_clear()


# -- tables ----------------------------------------------------------------------------


@every_grouping
def test_tables_made_in_inference_mode_serve_training(kind, grouping):
    """An evaluation may be the first to use an operator; its cached tables must not be
    inference tensors.
    """
    index_tables.clear_tables()
    spec = OperatorSpec(kind, 10, 7, 4, grouping, seed=11)
    mora_matrix = random(4, 4).requires_grad_()
    x = random(2, 10, seed=1).requires_grad_()
    with torch.inference_mode():
        mora_update(spec, mora_matrix, x)
        delta_weight(spec, mora_matrix)
    mora_update(spec, mora_matrix, x).sum().backward()
    delta_weight(spec, mora_matrix).sum().backward()
    assert mora_matrix.grad is not None
    assert torch.isfinite(mora_matrix.grad).all()


def test_a_sum_of_many_terms_in_low_precision_is_rounded_once():
    """Each addition of 2^-8 to 1 would round to 1 in bf16."""
    sums = index_tables.IndexMap.of(
        torch.tensor([[0], [1], [1], [1], [1]]), torch.device("cpu")
    )
    assert sums(torch.tensor([1, 2**-8]).bfloat16()).tolist() == [1 + 2**-6]


def test_permutations_are_those_that_every_ledger_was_written_with():
    """Literal values: a numpy that drew others would silently ruin every ledger on disk."""
    spec = OperatorSpec(OperatorKind.SHARE, 10, 6, 4, Grouping.PERMUTED, seed=12345)
    inputs, outputs = index_tables.draw_permutations(spec.seed, 10, 6)
    assert inputs.tolist() == [0, 7, 3, 9, 6, 4, 1, 8, 5, 2]
    assert outputs.tolist() == [0, 3, 4, 5, 1, 2]
    mora_matrix = torch.arange(16.0).view(4, 4)
    assert delta_weight(spec, mora_matrix)[0].tolist() == [
        2.0,
        2.0,
        1.0,
        2.0,
        1.0,
        0.0,
        0.0,
        4.0,
        3.0,
        3.0,
    ]


def test_permutation_seeds_are_those_that_every_ledger_was_written_with():
    assert permutation_seed(42, "model.layers.0.mlp.up_proj", 0) == 1646010866
    assert permutation_seed(42, "model.layers.0.mlp.up_proj", 1) == 167467982


@pytest.mark.parametrize("kind", OperatorKind)
def test_permuted_is_plain_between_two_permutations(kind):
    permuted = OperatorSpec(kind, 13, 9, 4, Grouping.PERMUTED, seed=8)
    plain = OperatorSpec(kind, 13, 9, 4, Grouping.PLAIN)
    mora_matrix = random(4, 4)
    inputs, outputs = index_tables.draw_permutations(8, 13, 9)
    shuffled = delta_weight(permuted, mora_matrix)[outputs][:, inputs]
    assert_close(shuffled, delta_weight(plain, mora_matrix), rtol=0, atol=0)


# -- sizes, defaults, errors -----------------------------------------------------------


def test_mora_matrix_size():
    assert mora_matrix_size(4096, 4096, 8, OperatorKind.SHARE) == 256
    # Of 347.6, which the reference rounds to 348
    assert mora_matrix_size(4096, 11008, 8, OperatorKind.SHARE) == 336
    assert mora_matrix_size(4096, 11008, 8, OperatorKind.SHARE, multiple=8) == 344
    assert mora_matrix_size(4096, 11008, 8, OperatorKind.SHARE, multiple=1) == 347
    assert (
        mora_matrix_size(4096, 11008, 8, OperatorKind.ROTATE, multiple=1) == 346
    )  # even
    assert mora_matrix_size(1, 1, 1, OperatorKind.SHARE) == 1
    # Too small for a pair: the config refuses it
    assert mora_matrix_size(1, 1, 1, OperatorKind.ROTATE) == 0


@pytest.mark.parametrize("smallest", [1, 2])
@pytest.mark.parametrize("multiple", [1, 2, 8, 16])
def test_a_side_is_rounded_down_to_a_side(multiple, smallest):
    sides = [round_side(side, multiple, smallest) for side in range(200)]
    assert sides == sorted(sides)
    assert all(rounded <= side for side, rounded in enumerate(sides))
    assert [round_side(side, multiple, smallest) for side in sides] == sides
    assert all(
        side % smallest == 0 and (side < 2 * multiple or side % multiple == 0)
        for side in sides
    )
    assert sides[1] == 2 - smallest
    assert multiple < 16 or sides[30:33] + sides[47:49] == [30, 30, 32, 32, 48]


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank):
    with user_error("`rank` must be at least 1"):
        mora_matrix_size(8, 8, rank, OperatorKind.SHARE)


def test_default_kind_is_the_papers():
    assert [default_kind(rank) for rank in (1, 8, 63)] == [OperatorKind.ROTATE] * 3
    assert [default_kind(rank) for rank in (64, 128, 256)] == [OperatorKind.SHARE] * 3


NO_OPERATORS = """
{kind: rotat} | rotate
{grouping: stridet} | strided
{kind: rotate, r_hat: 3} | even
{kind: rotate, grouping: strided} | belongs to operator 'share'
{kind: decouple, grouping: contiguous} | belongs to operator 'share'
{r_hat: 0} | positive
{d_in: -1} | positive
"""


@each_row("changes, message", NO_OPERATORS)
def test_specs_that_are_no_operator(changes, message):
    with user_error(message):
        spec_from_dict(
            {"kind": "share", "d_in": 8, "d_out": 8, "r_hat": 4, **parsed(changes)}
        )


@every_grouping
def test_specs_survive_json(kind, grouping):
    spec = OperatorSpec(kind, 8, 6, 4, grouping, seed=9)
    assert spec_from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
