"""What is to be measured as soon as there is a GPU, one question at a time, each
within minutes.

    python tools/bench/gpu.py ceilings|operators|layer|attention|step|resume [--json FILE]
    python tools/bench/gpu.py QUESTION --toy        at toy sizes, without a GPU too, as a test does

    ceilings    what the card gives at best: copies in TB/s, products in TFLOP/s
    operators   the kernels of every operator, grouping, dtype and path against plain torch
                in fp64 on the CPU; merges: the bits of the CPU
    layer       a layer, forward and backward, against the frozen layer: both paths, and
                LoRA by PEFT and fused (addmm_)
    attention   by documents against a dense mask: time, and what leaks from one document to
                another (0)
    step        one rank under ZeRO 1, 2 and 3: tokens a second, peak memory, and how often
                the host waits inside a micro-batch (torch.cuda.set_sync_debug_mode); by
                phase a run's summary.json has the peaks
    resume      a run that is saved and resumed, against the uninterrupted one, to the bit,
                as --deterministic has it

Without a GPU, a line says so.
"""

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

# A bare checkout, not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from mora_ds import MoRAConfig, initialize, inject
from mora_ds.adapters.inject import mora_layers
from mora_ds.adapters.kernels.linear import KernelProducts
from mora_ds.adapters.kernels.tables import KernelTables
from mora_ds.adapters.ops.index_tables import OPERATORS, mora_matrix_size
from mora_ds.adapters.ops.linear import Compute, LayerProducts, mora_linear
from mora_ds.adapters.ops.mora import OperatorSpec, delta_weight
from mora_ds.adapters.ops.spec import OperatorKind
from mora_ds.common.tensor_files import dtype_name
from mora_ds.data.documents import Documents
from mora_ds.engine import zero
from mora_ds.engine.device import make_deterministic
from mora_ds.engine.initialize import start_distributed
from mora_ds.models.attention import document_attention
from mora_ds.models.base import write_own_base
from mora_ds.runtime import cli
from mora_ds.train.run import Run
from tools.bench.layer import PATHS, TITLES, layers_of, row
from tools.bench.measuring import clock, llama_config, only_rank, zero3_config
from tools.bench.report import Report, bench_parser

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main() -> None:
    options = _options()
    options.on_gpu = torch.cuda.is_available()
    options.device = torch.device("cuda" if options.on_gpu else "cpu")
    if not (options.on_gpu or options.toy):
        print(
            "no GPU here: nothing is measured (--toy runs the same code at toy sizes)"
        )
        return
    report = Report(options)
    where = torch.cuda.get_device_name() if options.on_gpu else "a CPU"
    report.say(f"{options.question} on {where}{', toy sizes' if options.toy else ''}")
    report.show(options.question, QUESTIONS[options.question](options))
    report.write()


def _options() -> argparse.Namespace:
    parser = bench_parser(__doc__)
    parser.add_argument("question", choices=list(QUESTIONS), help="what to measure")
    parser.add_argument(
        "--toy", action="store_true", help="toy sizes, which say nothing about speed"
    )
    return parser.parse_args()


# -- questions: each answers with a table ----------------------------------------------


def ceilings(options: argparse.Namespace) -> list[list[str]]:
    side = 128 if options.toy else 8192
    rows = [["what", "dtype", "throughput"]]
    for dtype in DTYPES:
        a, b = (
            torch.randn(side, side, device=options.device).to(dtype) for _ in range(2)
        )
        copied = 2 * a.nbytes / _seconds(partial(b.copy_, a), options)
        product = 2 * side**3 / _seconds(partial(torch.matmul, a, b), options)
        name = dtype_name(dtype)
        rows.append(["copy", name, f"{copied / 1e12:.3f} TB/s"])
        rows.append(["product", name, f"{product / 1e12:.2f} TFLOP/s"])
    return rows


def operators(options: argparse.Namespace) -> list[list[str]]:
    errors = ("error of y", "of x's gradient", "of M's gradient")
    rows = [["operator", "dtype", "path", *errors, "merge"]]
    for spec in _specs(options):
        rows += _operator_rows(spec, options)
    return rows


def _specs(options: argparse.Namespace) -> Iterator[OperatorSpec]:
    d_in, d_out, rank = (48, 80, 8) if options.toy else (4096, 11008, 256)
    for kind, operator in OPERATORS.items():
        r_hat = mora_matrix_size(d_in, d_out, 8 if operator.rotates else rank, kind)
        for grouping in operator.groupings:
            yield OperatorSpec(kind, d_in, d_out, min(r_hat, d_in), grouping, seed=1)


def _operator_rows(spec: OperatorSpec, options: argparse.Namespace) -> list[list[str]]:
    """The kernels, in every dtype and by every path, against torch in fp64 on the
    CPU."""
    x = torch.randn(8 if options.toy else 512, spec.d_in).double()
    weight = torch.randn(spec.d_out, spec.d_in).double()
    mora_matrix = torch.randn(spec.r_hat, spec.r_hat).double()
    plain = LayerProducts(spec)
    wanted = _product(plain, Compute.ACTIVATION, x, weight, mora_matrix)
    merged = delta_weight(spec, mora_matrix.float())
    merged_there = delta_weight(spec, mora_matrix.float().to(options.device))
    same = torch.equal(merged_there.cpu(), merged)
    kernels = KernelProducts(KernelTables(spec, options.device))
    rows = []
    for dtype in DTYPES:
        there = [
            tensor.to(options.device, dtype) for tensor in (x, weight, mora_matrix)
        ]
        for path in PATHS:
            results = _product(kernels, path, *there)
            errors = [
                f"{(result.double().cpu() - right).norm() / right.norm():.1e}"
                for result, right in zip(results, wanted, strict=True)
            ]
            rows.append(
                [
                    f"{spec.kind.value}, {spec.grouping.value}",
                    dtype_name(dtype),
                    path.value,
                    *errors,
                    "same bits" if same else "OTHER BITS",
                ]
            )
    return rows


def _product(
    products: LayerProducts,
    path: Compute,
    x: Tensor,
    weight: Tensor,
    mora_matrix: Tensor,
) -> tuple[Tensor, ...]:
    """y, and the gradients of x and M for a gradient of one everywhere."""
    x = x.detach().requires_grad_()
    mora_matrix = mora_matrix.detach().requires_grad_()
    y = mora_linear(x, weight, None, mora_matrix, products, path)
    return y.detach(), *torch.autograd.grad(y.sum(), (x, mora_matrix))


def layer(options: argparse.Namespace) -> list[list[str]]:
    """Llama 7B's layers."""
    shapes = [(48, 80)] if options.toy else [(4096, 4096), (4096, 11008), (11008, 4096)]
    tokens = [64] if options.toy else [4096, 16384]
    cases = ((OperatorKind.ROTATE, 8), (OperatorKind.SHARE, 256))
    like = {"dtype": torch.bfloat16, "device": options.device}
    seconds = 0 if options.toy else 1
    layers = layers_of(shapes, tokens, cases, **like)
    return [TITLES, *(row(one, seconds) for one in layers)]


def attention(options: argparse.Namespace) -> list[list[str]]:
    rows = [_attention_row(options, documents) for documents in (1, 4, 16)]
    return [["documents", "by documents, ms", "dense mask, ms", "leak"], *rows]


def _attention_row(options: argparse.Namespace, count: int) -> list[str]:
    """`count` documents of the same length."""
    heads, size, length = (4, 32, 64) if options.toy else (32, 128, 16384)
    like = {"device": options.device, "requires_grad": True}
    dtype = torch.bfloat16 if options.on_gpu else torch.float32
    q, k, v = (
        torch.randn(1, heads, length, size, dtype=dtype, **like) for _ in range(3)
    )
    module: Any = SimpleNamespace(training=True, is_causal=True, num_key_value_groups=1)
    positions = torch.arange(length // count).repeat(count)
    documents = Documents.of(positions[None]).to(options.device)
    number = torch.arange(count, device=options.device).repeat_interleave(
        length // count
    )

    def by_documents() -> Tensor:
        return document_attention(module, q, k, v, None, documents=documents)[0]

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, (number[:, None] == number).tril()
        )

    leak = 0.0
    if (
        count > 1
    ):  # what the last document's output takes from the first document's keys
        (of_keys,) = torch.autograd.grad(by_documents()[:, -1].float().sum(), k)
        leak = of_keys[:, :, : length // count].abs().max().item()
    times = [
        _seconds(partial(_forward_backward, attend), options)
        for attend in (by_documents, dense)
    ]
    return [str(count), *(f"{1e3 * seconds:.3f}" for seconds in times), f"{leak:g}"]


def _forward_backward(attend: Callable[[], Tensor]) -> None:
    attend().float().sum().backward()


def step(options: argparse.Namespace) -> list[list[str]]:
    rows = [["ZeRO", "tokens/s", "peak, GiB", "waits inside a micro-batch"]]
    ids = _ids(options)
    for stage in (1, 2, 3):
        engine = _engine(stage, options)
        _train(engine, ids, 3)  # DeepSpeed traces the model in the first steps
        with counted_waits(options.device) as waits:
            engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()
        seconds = _seconds(partial(_train, engine, ids, 1), options)
        rate = f"{ids.numel() / seconds:,.0f}"
        if options.on_gpu:
            peak = f"{torch.cuda.max_memory_reserved() / 2**30:.2f}"
            rows.append([str(stage), rate, peak, str(len(waits))])
        else:
            rows.append([str(stage), rate, "-", "only a GPU can say"])
        engine.destroy()
    return rows


def resume(options: argparse.Namespace) -> list[list[str]]:
    make_deterministic()
    ids = _ids(options)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        out = Path(folder) / "out"
        write_own_base(_model(options), base)
        engine = _engine(3, options)
        run = Run(engine, base=base, folder=out)
        _train(engine, ids, 2)
        run.merge(2)
        run.save(2)
        losses = _train(engine, ids, 3)
        again = _engine(3, options)
        Run(again, base=base, folder=out, resume="auto")
        same = _train(again, ids, 3) == losses and all(
            torch.equal(one, another)
            for one, another in zip(_matrices(engine), _matrices(again), strict=True)
        )
    return [
        ["steps after the checkpoint", "losses and matrices"],
        ["3", "same" if same else "DIFFERENT"],
    ]


QUESTIONS: dict[str, Callable[[argparse.Namespace], list[list[str]]]] = {
    question.__name__: question
    for question in (ceilings, operators, layer, attention, step, resume)
}


# -- what they share -------------------------------------------------------------------


def _seconds(work: Callable[[], object], options: argparse.Namespace) -> float:
    """Median of a call, after one that is not counted."""
    now = clock(options.device)
    times = []
    for _ in range(3 if options.toy else 21):
        started = now()
        work()
        times.append(now() - started)
    return median(times[1:])


def _config(options: argparse.Namespace) -> LlamaConfig:
    shape = (32, 2, 64, 32) if options.toy else (4096, 8, 32000, 4096)
    return llama_config(*shape)


def _model(options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(_config(options))


def _ids(options: argparse.Namespace) -> Tensor:
    torch.manual_seed(0)
    config = _config(options)
    ids = torch.randint(config.vocab_size, (1, config.max_position_embeddings))
    return ids.to(options.device)


def _engine(stage: int, options: argparse.Namespace) -> Any:
    """An engine of one process."""
    os.environ.update(only_rank())
    start_distributed()
    model = _model(options)
    inject(model, MoRAConfig(rank=8))
    # One process gathers nothing, and DeepSpeed would make the host wait for what it
    # does instead.
    persistent = {"stage": stage, "stage3_param_persistence_threshold": 10**9}
    bf16 = {"enabled": options.on_gpu}
    config = zero3_config(1, zero_optimization=persistent, bf16=bf16)
    return initialize(model=model, config=config)[0]


def _train(engine: Any, ids: Tensor, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return [step_loss.item() for step_loss in losses]


def _matrices(engine: Any) -> list[Tensor]:
    return [
        zero.full_fp32(layer.adapter_weight)
        for layer in mora_layers(engine.module).values()
    ]


@contextmanager
def counted_waits(device: torch.device) -> Iterator[list[warnings.WarningMessage]]:
    """A list with an entry for each wait of the host. Torch warns of each; as an error,
    a wait would stop DeepSpeed's engine within a micro-batch."""
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message=".*synchroniz")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        yield waits
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    cli.run(main)
