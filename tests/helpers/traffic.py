"""Bytes that the kernels of a layer read and write, counted from their grids and tables: no
GPU is needed.

    python -m tests.helpers.traffic [--json FILE]

Programs run in the order of the grid, in waves of as many as an H100 holds. What several
programs of a wave read, they read once; what an earlier wave has read or written is still
in L2 unless more than L2 holds has passed since, else it counts again. The least: each
number that a kernel needs once, and each that it makes once. A layer's gradient of M ("dM")
is a product and the sum of its parts; the parts count, as neither needs them.
"""

import math

import numpy as np
import torch
from torch import Tensor

from mora_ds.adapters.kernels import triton_ops
from mora_ds.adapters.kernels.tables import KernelTables, empty_product
from mora_ds.adapters.ops.index_tables import mora_matrix_size
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from mora_ds.runtime import cli
from tools.bench.report import Report, bench_parser

PROCESSORS = 132
THREADS = 512
"""Threads of a processor, with 128 registers each."""
L2 = 40 << 20
"""Bytes."""

META = torch.device("meta")
OPERATORS = ((OperatorKind.ROTATE, 8), (OperatorKind.SHARE, 256))
SHAPES = (
    (4096, 4096),
    (4096, 11008),
    (11008, 4096),
    (8192, 8192),
    (8192, 28672),
    (28672, 8192),
    (8192, 1024),
)
"""(d_in, d_out) of Llama 7B's and 70B's layers."""
TOKENS = (4096, 16384)
STEPS = {
    "fold": ("fold",),
    "effective_weight": ("effective_weight",),
    "collect": ("collect",),
    "dM": ("product", "sum_parts"),
    "spread": ("spread",),
    "unfold": ("unfold",),
}


def main():
    report = Report(bench_parser(__doc__).parse_args())
    by_shape = [
        [
            "operator",
            "d_in x d_out",
            "tokens",
            *(f"{step}, MB" for step in STEPS),
            *STEPS,
        ]
    ]
    most = [["bytes / least, at most", *STEPS]]
    for kind, rank in OPERATORS:
        for tokens in TOKENS:
            ratios = []
            for shape in SHAPES:
                counted = step_bytes(layer_spec(kind, rank, shape), tokens)
                ratios.append([actual / least for actual, least in counted.values()])
                megabytes = [f"{actual / 1e6:,.0f}" for actual, _ in counted.values()]
                name = (
                    f"{kind.value} r={rank}",
                    f"{shape[0]} x {shape[1]}",
                    f"{tokens:,}",
                )
                by_shape.append(
                    [*name, *megabytes, *(f"{ratio:.2f}" for ratio in ratios[-1])]
                )
            most.append(
                [
                    f"{kind.value} r={rank}, {tokens:,} tokens",
                    *(f"{max(of):.2f}" for of in zip(*ratios, strict=True)),
                ]
            )
    report.show("by shape", by_shape)
    report.show("most", most)
    report.write()


def layer_spec(kind, rank, shape):
    return OperatorSpec(
        kind, *shape, mora_matrix_size(*shape, rank, kind), Grouping.PERMUTED, seed=1
    )


def step_bytes(spec, tokens):
    """Step -> (bytes that its kernels read and write, the least)."""
    planned = launches(spec, torch.bfloat16, tokens=tokens)
    counted = {}
    for step, names in STEPS.items():
        actual = sum(launch_bytes(planned[name]) for name in names)
        counted[step] = (
            actual,
            float(
                sum(
                    value.nbytes
                    for name in names
                    for value in operands(planned[name]).values()
                )
            ),
        )
    parts = operands(planned["sum_parts"])["partial_sums"]
    if len(parts) == 1:  # that is the gradient
        product = planned["product"]
        counted["dM"] = (
            launch_bytes(product),
            float(sum(value.nbytes for value in operands(product).values())),
        )
    else:  # written just before they are read
        actual, least = counted["dM"]
        counted["dM"] = (
            actual - parts.nbytes * (parts.nbytes <= L2),
            least - 2 * parts.nbytes,
        )
    return counted


def launches(spec, dtype, int8=False, tokens=4096, device=META):
    """The kernels that one layer starts, by name."""

    def tensor(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device=device)

    tables = KernelTables(spec, device)
    rotation = tables.rotation
    side = spec.r_hat
    x = tensor(tokens, spec.d_in)
    y = tensor(tokens, spec.d_out)
    z = tensor(tokens, tables.fold.shape[1])
    c = tensor(tokens, tables.collect.shape[1])
    mora_matrix = tensor(side, side)
    weight = tensor(spec.d_out, spec.d_in, dtype=torch.int8 if int8 else dtype)
    scales = tensor(spec.d_out, dtype=torch.float32) if int8 else None
    base = tensor(spec.d_out, spec.d_in), weight, scales, mora_matrix, tables.unfold
    z_blocks = z.view(tokens, -1, side)
    c_blocks = c.view(tokens, -1, side)
    empty = empty_product(c_blocks, z_blocks, 2 * PROCESSORS)
    parts = tensor(*empty.shape, dtype=empty.dtype)
    launch = triton_ops.gather_sum_launch
    return {
        "fold": launch(z, x, tables.fold, *rotation, False, add=False),
        "collect": launch(c, y, tables.collect, None, None, False, add=False),
        "spread": launch(y, z, tables.spread, None, None, False, add=False),
        "unfold": launch(
            x, z if spec.rotates else c, tables.unfold, *rotation, True, add=False
        ),
        "add spread": launch(y, z, tables.spread, None, None, False, add=True),
        "effective_weight": triton_ops.form_launch(
            *base, tables.slots, tables.members, *rotation, tables.blocks_out
        ),
        "product": triton_ops.product_launch(parts, c_blocks, z_blocks),
        "sum_parts": triton_ops.sum_parts_launch(mora_matrix, parts),
    }


# -- what a launch reads ---------------------------------------------------------------


def operands(launch):
    """The tensors of a launch, by the names of the kernel's arguments."""
    return {
        name: value
        for name, value in launch.arguments.items()
        if isinstance(value, Tensor)
    }


def parts_read(launch):
    """Name of a tensor that programs share -> the number of the part that each of them
    reads, in the order in which they start.

    Of tensors that are left out, programs read or write a part each. If the number is 0
    for every program, each of them reads the complete tensor.
    """
    program = np.arange(math.prod(launch.grid))
    first = program % launch.grid[0]
    second = program // launch.grid[0]
    everything = np.zeros_like(program)
    constants = launch.constants
    arguments = launch.arguments
    match launch.kernel.fn.__name__:
        case "_gather_sum":
            chunks = -(-arguments["columns"] // constants["PART"])
            return {
                "x": program // chunks,
                "table": everything,
                "cos": everything,
                "sin": everything,
            }
        case "_form_groups":
            return {
                "mora_matrix": second,
                "unfold": everything,
                "members": everything,
                "scales": everything,
            }
        case "_form_blocks":
            return dict.fromkeys(
                ("mora_matrix", "unfold", "slots", "cos", "sin", "scales"), everything
            )
        case "_product":
            tiles = -(-arguments["r_hat"] // constants["TILE"])
            return {
                "c": second * tiles + first // tiles,
                "z": second * tiles + first % tiles,
            }
    return {}


def launch_bytes(launch):
    """Bytes from and to memory."""
    shared = parts_read(launch)
    tensors = operands(launch)
    streamed = sum(
        tensor.nbytes for name, tensor in tensors.items() if name not in shared
    )
    programs = math.prod(launch.grid)
    wave = np.arange(programs) // (
        PROCESSORS * (THREADS // (32 * launch.options["num_warps"]))
    )
    waves = int(wave[-1]) + 1
    touched = {
        name: _by_wave(part, wave) for name, part in shared.items() if name in tensors
    }
    sizes = {
        name: tensors[name].nbytes / (int(shared[name].max()) + 1) for name in touched
    }
    passed = np.full(waves, streamed / waves)
    for name, (_, of_wave) in touched.items():
        passed += sizes[name] * np.bincount(of_wave, minlength=waves)
    passed = passed.cumsum()
    return streamed + sum(
        sizes[name] * _reads(*by_wave, passed) for name, by_wave in touched.items()
    )


def _by_wave(part, wave):
    """(part, wave) of each part that a wave reads, once, in order."""
    waves = int(wave[-1]) + 1
    both = np.unique(part * waves + wave)
    return both // waves, both % waves


def _reads(part, wave, passed):
    """How often a part comes from memory. `passed`: bytes up to the end of each wave."""
    again = part[1:] == part[:-1]
    in_l2 = passed[wave[1:]] - passed[wave[:-1]] <= L2
    return len(part) - int((again & in_l2).sum())


if __name__ == "__main__":
    cli.run(main)
