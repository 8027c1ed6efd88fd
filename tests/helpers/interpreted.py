"""The Triton kernels in triton's interpreter (`TRITON_INTERPRET=1`), or else on a GPU,
against plain torch on a CPU.

    python -m tests.helpers.interpreted START STEP      every STEP-th of the operators in `operators.specs`, from START

In a process of its own, as triton decides at its import whether it interprets. Exits with
the first difference. Each kernel gathers from shared memory, as by default, or from global
memory, as it does from long rows; or its rows are in several parts, as wide ones are.
"""

import sys
from contextlib import contextmanager
from itertools import islice
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.testing import assert_close
from triton.runtime import interpreter

from mora_ds.adapters.kernels import linear, triton_ops
from mora_ds.adapters.kernels.ops import NAMES
from mora_ds.adapters.kernels.tables import KernelTables
from mora_ds.adapters.ops.index_tables import OPERATORS, Operator
from mora_ds.adapters.ops.int8 import quantize
from mora_ds.adapters.ops.linear import Compute, mora_linear
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from tests.helpers import plain_kernels as plain
from tests.helpers import traffic
from tests.helpers.operators import (
    blocks_onto_wrapped_outputs,
    by_path,
    outputs_and_gradients,
    random,
    spec_id,
    specs,
)

CPU = torch.device("cpu")
DEVICE = CPU if triton_ops.triton.knobs.runtime.interpret else torch.device("cuda")
TOKENS = 5

VARIANTS = {
    "shared": {},
    "global": {"_SHARED": 0},
    "parts": {"_PART": 16, "_FORM_PART": 16},
}
"""Constants of `triton_ops` that choose another branch of a kernel."""


def same(result, expected, what):
    """Equal to the bit in fp32 and fp64. In half precision within one unit in the last
    place: the interpreter truncates bf16 where torch rounds."""
    assert result.shape == expected.shape, what
    assert result.dtype == expected.dtype, what
    if result.dtype in (torch.float32, torch.float64):
        assert torch.equal(result, expected), (
            f"{what}: {(result - expected).abs().max()} apart"
        )
        return
    apart = (_ordinal(result) - _ordinal(expected)).abs().max()
    assert apart <= 1, f"{what}: {apart} units in the last place"


def _ordinal(x):
    """Numbers in 16 bits as integers in their order."""
    bits = x.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def launched(kernel, *operands):
    """The output of a kernel, without a write to its operands; of one that works in
    place, its first operand."""
    on_device = [
        operand.to(DEVICE, copy=True) if isinstance(operand, Tensor) else operand
        for operand in operands
    ]
    result = kernel(*on_device)
    return (on_device[0] if result is None else result).to(CPU)


def check_kernels(spec, dtype):
    tables = KernelTables(spec, CPU)
    check_rows(spec, tables, dtype)
    check_form(spec, tables, dtype)


def check_rows(spec, tables, dtype):
    """All kernels but `effective_weight`: what they make of rows of tokens."""
    rotation = tables.rotation
    x = random(TOKENS, spec.d_in).to(dtype)
    g = random(TOKENS, spec.d_out, seed=1).to(dtype)
    z = plain.gather_sum(x, tables.fold, *rotation, False)
    same(launched(triton_ops.gather_sum, x, tables.fold, *rotation, False), z, "fold")
    c = plain.gather_sum(g, tables.collect, None, None, False)
    same(
        launched(triton_ops.gather_sum, g, tables.collect, None, None, False),
        c,
        "collect",
    )
    repeated = (
        c
        if tables.blocks_read is None
        else c.view(TOKENS, -1, spec.r_hat)[:, tables.blocks_read].flatten(1)
    )
    for target, source, arguments in (
        (g, z, (tables.spread, None, None, False)),
        (x, repeated, (tables.unfold, *rotation, True)),
    ):
        result = launched(triton_ops.gather_add_, target, source, *arguments)
        expected = target.clone()
        plain.gather_add_(expected, source, *arguments)
        same(result, expected, "spread or unfold")
    # `tl.dot` multiplies the bit patterns of bf16 in triton 3.9's interpreter
    # (`create_dot`): fp16 in its place.
    c = c.view(TOKENS, -1, spec.r_hat).half()
    z = z.view(TOKENS, -1, spec.r_hat).half()
    products = launched(triton_ops.product, c, z)
    assert_close(
        products.float().sum(0), plain.product(c, z)[0].float(), rtol=2e-3, atol=1e-5
    )
    first = products[0].float()
    stack = torch.stack([first, 2 * first, -first / 3])
    same(
        launched(triton_ops.sum_parts, stack, dtype),
        plain.sum_parts(stack, dtype),
        "sum_parts",
    )


def check_form(spec, tables, dtype):
    mora_matrix = random(spec.r_hat, spec.r_hat, seed=2).to(dtype)
    weight = random(spec.d_out, spec.d_in, seed=3).to(dtype)
    operands = (
        mora_matrix,
        tables.unfold,
        tables.slots,
        tables.members,
        *tables.rotation,
        tables.blocks_out,
    )
    expected = plain.effective_weight(weight, None, *operands)
    same(
        launched(triton_ops.effective_weight, weight, None, *operands),
        expected,
        "effective_weight",
    )
    same(
        launched(triton_ops.effective_weight, weight.T.contiguous().T, None, *operands),
        expected,
        "form of a transposed weight",
    )
    values, scales = quantize(weight)
    same(
        launched(triton_ops.effective_weight, values, scales, *operands),
        plain.effective_weight(values, scales, *operands),
        "form of int8",
    )


def check_parts():
    """A sum so long that it is made in several parts, the last of them shorter; with sides
    of several tiles.
    """
    for terms, r_hat in ((1300, 18), (70, 150)):
        c = random(terms, 1, r_hat).half()
        z = random(terms, 1, r_hat, seed=1).half()
        partial_sums = launched(triton_ops.product, c, z)
        if DEVICE == CPU:  # a GPU has as many as it runs at once
            assert len(partial_sums) == (2 if terms == 1300 else 1)
        expected = c.flatten(0, 1).double().T @ z.flatten(0, 1).double()
        assert_close(partial_sums.double().sum(0), expected, rtol=1e-3, atol=1e-4)


def check_wide():
    """Rows that are in several parts by their own width. A weight of wide outputs has many
    rows, none of which is wide.
    """
    for kind in (OperatorKind.ROTATE, OperatorKind.SHARE):
        wide_inputs, wide_outputs = (
            OperatorSpec(kind, *sides, 24, Grouping.PERMUTED, seed=1)
            for sides in ((2200, 40), (40, 2200))
        )
        check_kernels(wide_inputs, torch.float32)
        check_rows(wide_outputs, KernelTables(wide_outputs, CPU), torch.float32)


def check_reads(spec):
    """Programs read what `traffic` counts: programs of different parts of a tensor read
    different numbers; of a tensor that no two programs share, each reads its own."""
    builder = interpreter.interpreter_builder
    load = builder.create_masked_load
    addresses = {}

    def noted(pointers, mask, *options):
        x, y, _ = builder.grid_idx
        addresses.setdefault(x + y * builder.grid_dim[0], []).append(
            pointers.data[mask.data]
        )
        return load(pointers, mask, *options)

    for name, launch in traffic.launches(
        spec, torch.float32, tokens=9, device=CPU
    ).items():
        addresses.clear()
        with patch.object(builder, "create_masked_load", noted):
            launch()
        parts_read = traffic.parts_read(launch)
        for argument, tensor in traffic.operands(launch).items():
            start = tensor.data_ptr()
            read = {}
            for program, loads in addresses.items():
                part = (
                    int(parts_read[argument][program])
                    if argument in parts_read
                    else program
                )
                read.setdefault(part, set()).update(
                    np.concatenate(loads, axis=None).tolist()
                )
            inside = [
                {address for address in of if 0 <= address - start < tensor.nbytes}
                for of in read.values()
            ]
            assert sum(map(len, inside)) == len(set.union(*inside)), (
                f"{name} reads {argument} otherwise than counted"
            )


def check_outputs_that_read_several_rows():
    """`effective_weight` of an operator that is not packaged, rotated and not."""
    packaged = OPERATORS[OperatorKind.TRUNCATE]
    for rotates in (False, True):
        OPERATORS[OperatorKind.TRUNCATE] = Operator(
            blocks_onto_wrapped_outputs, in_blocks=True, rotates=rotates
        )
        spec = OperatorSpec(OperatorKind.TRUNCATE, 18, 11, 4, Grouping.PERMUTED)
        check_form(spec, KernelTables(spec, CPU), torch.float32)
    OPERATORS[OperatorKind.TRUNCATE] = packaged


def check_layer(spec):
    """Outputs and gradients of both paths, by the kernels and by plain torch."""
    products = linear.KernelProducts(KernelTables(spec, DEVICE))
    for path in (Compute.ACTIVATION, Compute.WEIGHT):

        def layer(x, weight, bias, mora_matrix, path=path):
            x, weight, bias, mora_matrix = (
                tensor.to(DEVICE) for tensor in (x, weight, bias, mora_matrix)
            )
            with_bias = mora_linear(x, weight, bias, mora_matrix, products, path)
            bias_after = (
                mora_linear(x, weight, None, mora_matrix, products, path) + bias
            )
            return ((with_bias + bias_after) / 2).to(CPU)

        expected = outputs_and_gradients(spec, torch.float64, layer)
        with by_triton():
            results = outputs_and_gradients(spec, torch.float64, layer)
        by_torch = outputs_and_gradients(spec, torch.float64, by_path(spec, path))
        for one, right, plainly in zip(results, expected, by_torch, strict=True):
            if DEVICE == CPU:
                same(one, right, path.value)
            assert_close(one, plainly, rtol=1e-9, atol=1e-9, msg=path.value)


@contextmanager
def by_triton():
    """Within it, layers call the interpreted kernels."""
    registered = linear.ops
    linear.ops = SimpleNamespace(**{name: getattr(triton_ops, name) for name in NAMES})
    try:
        yield
    finally:
        linear.ops = registered


@contextmanager
def variant(constants):
    before = {name: getattr(triton_ops, name) for name in constants}
    vars(triton_ops).update(constants)
    try:
        yield
    finally:
        vars(triton_ops).update(before)


def main():
    check_parts()
    check_outputs_that_read_several_rows()
    check_wide()
    with variant(VARIANTS["parts"]):  # the interpreter alone tells what is read
        for kind in (OperatorKind.ROTATE, OperatorKind.SHARE) if DEVICE == CPU else ():
            for d_in, d_out in ((80, 36), (36, 80)):
                check_reads(
                    OperatorSpec(kind, d_in, d_out, 18, Grouping.PERMUTED, seed=1)
                )
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    names = list(VARIANTS)
    start, step = map(int, sys.argv[1:])
    for number, spec in islice(enumerate(specs()), start, None, step):
        dtype = dtypes[number % 3]
        name = names[number // 3 % 3]
        try:
            check_kernels(spec, torch.float32)
            with variant(VARIANTS[name]):
                check_kernels(spec, dtype)
            if number % 2:
                check_layer(spec)
        except AssertionError as error:
            sys.exit(f"{spec_id(spec)}, {dtype}, {name}: {error}")
        print(spec_id(spec), dtype, name, flush=True)


if __name__ == "__main__":
    main()
