"""What is to be measured on the day that a GPU is there, one question at a time, each
within minutes.

    python tools/bench/gpu.py ceilings|operators|layer|attention|step|resume [--json FILE]
    python tools/bench/gpu.py ... --device cpu --toy        the same code at toy sizes, which a test runs

    ceilings    what the card gives at best: copies in TB/s, products in TFLOP/s
    operators   the kernels of every operator, grouping, dtype and path against plain torch in fp64 on the CPU; merges:
                the bits of the CPU
    layer       a layer, forward and backward, against the frozen layer: both paths, and LoRA by PEFT and fused (addmm_)
    attention   by documents against a dense mask: time, and what leaks from one document to another (0)
    step        one rank under ZeRO 1, 2 and 3: tokens a second, peak memory, and how often the host waits inside a
                micro-batch (torch.cuda.set_sync_debug_mode); by phase a run's summary.json has the peaks
    resume      a run that is saved and resumed, against the uninterrupted one, to the bit, as --deterministic has it

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
from transformers import AutoModelForCausalLM

from mora_ds import MoRAConfig, initialize, inject
from mora_ds.adapters.inject import mora_layers
from mora_ds.adapters.kernels.linear import kernel_linear
from mora_ds.adapters.kernels.tables import KernelTables
from mora_ds.adapters.ops.index_tables import OPERATORS, square_size
from mora_ds.adapters.ops.linear import Compute, mora_linear
from mora_ds.adapters.ops.mora import OperatorSpec, delta_weight
from mora_ds.data.documents import Documents
from mora_ds.engine import zero
from mora_ds.engine.device import make_deterministic
from mora_ds.engine.initialize import start_distributed
from mora_ds.models.base import write_own_base
from mora_ds.models.document_attention import document_attention
from mora_ds.runtime import cli
from mora_ds.train.run import Run
from tools.bench.layer import TITLES, layers_of, row
from tools.bench.measuring import clock, llama_config, only_rank, zero3_config
from tools.bench.report import Report, bench_parser

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATHS = (Compute.ACTIVATION, Compute.WEIGHT)


def main() -> None:
    options = _options()
    options.device = torch.device(options.device)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        print(
            "no GPU here: nothing is measured (--device cpu --toy runs the same code at toy sizes)"
        )
        return
    report = Report(options)
    where = torch.cuda.get_device_name() if options.device.type == "cuda" else "a CPU"
    report.say(f"{options.question} on {where}{', toy sizes' if options.toy else ''}")
    QUESTIONS[options.question](options, report)
    report.write()


# -- questions ---------------------------------------------------------------------------------------------------------


def ceilings(options: argparse.Namespace, report: Report) -> None:
    side = 128 if options.toy else 8192
    rows = [["what", "dtype", "rate"]]
    for dtype in DTYPES:
        a, b = (torch.randn(side, side, device=options.device).to(dtype) for _ in range(2))
        copied = 2 * a.nbytes / _seconds(partial(b.copy_, a), options)
        product = 2 * side**3 / _seconds(partial(torch.matmul, a, b), options)
        name = str(dtype).removeprefix("torch.")
        rows += [
            ["copy", name, f"{copied / 1e12:.3f} TB/s"],
            ["product", name, f"{product / 1e12:.2f} TFLOP/s"],
        ]
    report.show("ceilings", rows)


def operators(options: argparse.Namespace, report: Report) -> None:
    rows = [
        [
            "operator",
            "dtype",
            "path",
            "error of y",
            "of x's gradient",
            "of M's gradient",
            "merge",
        ]
    ]
    for spec in _specs(options):
        x, weight, square = (
            torch.randn(*shape, dtype=torch.float64) for shape in _shapes(spec, options)
        )
        by_torch = partial(mora_linear, spec=spec, path=Compute.ACTIVATION)
        wanted = _product(by_torch, x, weight, square)
        tables = KernelTables(spec, options.device)
        merged = delta_weight(spec, square.float())
        same = torch.equal(
            delta_weight(spec, square.float().to(options.device)).cpu(), merged
        )
        for dtype in DTYPES:
            there = (
                x.to(options.device, dtype),
                weight.to(options.device, dtype),
                square.to(options.device, dtype),
            )
            for path in PATHS:
                results = _product(partial(kernel_linear, tables=tables, path=path), *there)
                errors = [
                    f"{(a.double().cpu() - b).norm() / b.norm():.1e}"
                    for a, b in zip(results, wanted, strict=True)
                ]
                name = f"{spec.kind.value}, {spec.grouping.value}"
                rows.append(
                    [
                        name,
                        str(dtype)[6:],
                        path.value,
                        *errors,
                        "same bits" if same else "OTHER BITS",
                    ]
                )
    report.show("operators", rows)


def layer(options: argparse.Namespace, report: Report) -> None:
    """Llama 7B's layers."""
    shapes = ["48x80"] if options.toy else ["4096x4096", "4096x11008", "11008x4096"]
    tokens = [64] if options.toy else [4096, 16384]
    cases = argparse.Namespace(
        shapes=shapes, tokens=tokens, operators=["rotate:8", "share:256"]
    )
    layers = layers_of(cases, {"dtype": torch.bfloat16, "device": options.device})
    report.show(
        "layer",
        [
            TITLES,
            *(row(one, clock(options.device), 0 if options.toy else 1) for one in layers),
        ],
    )


def attention(options: argparse.Namespace, report: Report) -> None:
    rows = [_attention_row(options, documents) for documents in (1, 4, 16)]
    report.show(
        "attention", [["documents", "by documents, ms", "dense mask, ms", "leak"], *rows]
    )


def _attention_row(options: argparse.Namespace, count: int) -> list[str]:
    """`count` documents of the same length."""
    heads, size, length = (4, 32, 64) if options.toy else (32, 128, 16384)
    dtype = torch.float32 if options.device.type == "cpu" else torch.bfloat16
    module: Any = SimpleNamespace(training=True, is_causal=True, num_key_value_groups=1)
    documents = Documents.of(torch.arange(length // count).repeat(count)[None]).to(
        options.device
    )
    number = torch.arange(count, device=options.device).repeat_interleave(length // count)
    q, k, v = (
        torch.randn(1, heads, length, size, device=options.device)
        .to(dtype)
        .requires_grad_()
        for _ in range(3)
    )

    def by_documents() -> Tensor:
        return document_attention(module, q, k, v, None, documents=documents)[0]

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, (number[:, None] == number).tril())

    leak = 0.0
    if count > 1:  # what the last document's output takes from the first document's keys
        (by,) = torch.autograd.grad(by_documents()[:, -1].float().sum(), k)
        leak = by[:, :, : length // count].abs().max().item()
    times = [
        _seconds(partial(_forward_backward, attend), options)
        for attend in (by_documents, dense)
    ]
    return [str(count), *(f"{1e3 * seconds:.3f}" for seconds in times), f"{leak:g}"]


def _forward_backward(attend: Callable[[], Tensor]) -> None:
    attend().float().sum().backward()


def step(options: argparse.Namespace, report: Report) -> None:
    rows = [["ZeRO", "tokens/s", "peak, GiB", "waits inside a micro-batch"]]
    _one_rank()
    for stage in (1, 2, 3):
        engine = _engine(options, stage)
        ids = _ids(options)
        _train(engine, ids, 3)  # DeepSpeed traces the model in the first steps
        with _counted_waits(options.device) as waits:
            engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()
        on_gpu = options.device.type == "cuda"
        said = str(len(waits)) if on_gpu else "only a GPU can say"
        seconds = _seconds(partial(_train, engine, ids, 1), options)
        peak = torch.cuda.max_memory_reserved() / 2**30 if on_gpu else float("nan")
        rows.append([str(stage), f"{ids.numel() / seconds:,.0f}", f"{peak:.2f}", said])
        engine.destroy()
    report.show("step", rows)


def resume(options: argparse.Namespace, report: Report) -> None:
    make_deterministic()
    _one_rank()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        out = Path(folder) / "out"
        write_own_base(_model(options), base)
        whole = _engine(options, 3)
        run = Run(whole, base=base, folder=out)
        _train(whole, _ids(options), 2)
        run.merge(2)
        run.save(2)
        losses = _train(whole, _ids(options), 3)
        again = _engine(options, 3)
        Run(again, base=base, folder=out, resume="auto")
        resumed_losses = _train(again, _ids(options), 3)
        pairs = zip(_matrices(whole), _matrices(again), strict=True)
        same = resumed_losses == losses and all(
            torch.equal(one, another) for one, another in pairs
        )
    rows = [
        ["steps after the checkpoint", "losses and matrices"],
        ["3", "same" if same else "DIFFERENT"],
    ]
    report.show("resume", rows)


QUESTIONS: dict[str, Callable[[argparse.Namespace, Report], None]] = {
    question.__name__: question
    for question in (ceilings, operators, layer, attention, step, resume)
}


# -- what they share ---------------------------------------------------------------------------------------------------


def _seconds(work: Callable[[], object], options: argparse.Namespace) -> float:
    """Median of a call, after one that is not counted."""
    now = clock(options.device)
    times = []
    for _ in range(3 if options.toy else 21):
        started = now()
        work()
        times.append(now() - started)
    return median(times[1:])


def _specs(options: argparse.Namespace) -> Iterator[OperatorSpec]:
    d_in, d_out, rank = (48, 80, 8) if options.toy else (4096, 11008, 256)
    for kind, operator in OPERATORS.items():
        r_hat = square_size(d_in, d_out, 8 if operator.rotates else rank, kind)
        for grouping in operator.groupings:
            yield OperatorSpec(kind, d_in, d_out, min(r_hat, d_in), grouping, seed=1)


def _shapes(spec: OperatorSpec, options: argparse.Namespace) -> tuple[tuple[int, int], ...]:
    return (
        (_tokens(options) // 8, spec.d_in),
        (spec.d_out, spec.d_in),
        (spec.r_hat, spec.r_hat),
    )


def _tokens(options: argparse.Namespace) -> int:
    return 64 if options.toy else 4096


def _product(
    layer: Callable[..., Tensor], x: Tensor, weight: Tensor, square: Tensor
) -> tuple[Tensor, ...]:
    """y, and the gradients of x and M for a gradient of one everywhere."""
    x = x.detach().requires_grad_()
    square = square.detach().requires_grad_()
    y = layer(x, weight, None, square)
    return y.detach(), *torch.autograd.grad(y.sum(), (x, square))


def _model(options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    shape = (32, 2, 64, 32) if options.toy else (4096, 8, 32000, 4096)
    return AutoModelForCausalLM.from_config(llama_config(*shape))


def _ids(options: argparse.Namespace) -> Tensor:
    length, vocabulary = (32, 64) if options.toy else (4096, 32000)
    return torch.randint(
        vocabulary, (1, length), generator=torch.Generator().manual_seed(0)
    ).to(options.device)


def _engine(options: argparse.Namespace, stage: int) -> Any:
    model = _model(options)
    inject(model, MoRAConfig(rank=8))
    return initialize(model=model, config=_settings(options, stage))[0]


def _settings(options: argparse.Namespace, stage: int) -> dict[str, Any]:
    # One process gathers nothing: DeepSpeed would make the host wait for what it does in
    # place of it.
    persistent = {"stage": stage, "stage3_param_persistence_threshold": 10**9}
    return zero3_config(
        1, zero_optimization=persistent, bf16={"enabled": options.device.type == "cuda"}
    )


def _train(engine: Any, ids: Tensor, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return [step_loss.item() for step_loss in losses]


def _matrices(engine: Any) -> list[Tensor]:
    return [zero.full_fp32(layer.value) for layer in mora_layers(engine.module).values()]


def _one_rank() -> None:
    if "RANK" not in os.environ:
        os.environ.update(only_rank())
    start_distributed()


@contextmanager
def _counted_waits(device: torch.device) -> Iterator[list[warnings.WarningMessage]]:
    """A list with an entry for each wait of the host, of which torch warns. As an error, a
    wait would leave DeepSpeed's engine in the midst of a micro-batch."""
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message=".*synchroniz")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        yield waits
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def _options() -> argparse.Namespace:
    parser = bench_parser(__doc__)
    parser.add_argument("question", choices=list(QUESTIONS), help="what to measure")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="where")
    parser.add_argument(
        "--toy", action="store_true", help="toy sizes, which say nothing about speed"
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
