"""Time one layer with a square, forward and backward, against the frozen layer alone, LoRA and full training.

    python tools/bench_layer.py [--dtype float32] [--threads 1] [--shapes 192x192 512x2048] [--tokens 256 2048]

Every figure is the best of several runs divided by that of the frozen base (output and input gradient) in the same
process, so that 1.00 is an adapter that costs nothing. LoRA has as many parameters as the square.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mora_ds.compute import Compute, choose, mora_linear
from mora_ds.operators import Grouping, OperatorKind, OperatorSpec, square_size

CASES = ((OperatorKind.ROTATE, 8), (OperatorKind.SHARE, 64))
Step = Callable[[], object]


def seconds(step: Step, device: torch.device, repeats: int) -> float:
    """Best of `repeats`, after one run that is not counted."""
    step()
    best = float("inf")
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def steps(d_in: int, d_out: int, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """Name -> one forward and backward; the frozen base comes first."""
    make: dict[str, Any] = {"dtype": dtype, "device": device}
    weight, x = torch.randn(d_out, d_in, **make), torch.randn(tokens, d_in, **make).requires_grad_()
    g = torch.randn(tokens, d_out, **make)
    trained = weight.clone().requires_grad_()

    def backward(y: Tensor, *leaves: Tensor) -> object:
        return torch.autograd.grad(y, (x, *leaves), g)

    found: dict[str, Step] = {
        "frozen": lambda: backward(F.linear(x, weight)),
        "full": lambda: backward(F.linear(x, trained), trained),
    }
    for kind, rank in CASES:
        r_hat = min(square_size(d_in, d_out, rank, kind), max(d_in, d_out))
        spec = OperatorSpec(kind, d_in, d_out, r_hat, Grouping.PERMUTED, seed=1)
        square = torch.zeros(r_hat, r_hat, **make).requires_grad_()
        for path in (Compute.ACTIVATION, Compute.WEIGHT):
            found[f"{kind.value} r={rank} {path.value}"] = lambda spec=spec, square=square, path=path: backward(  # type: ignore[misc]
                mora_linear(x, weight, None, square, spec, path), square
            )
        down = torch.randn(rank, d_in, **make).requires_grad_()
        up = torch.zeros(d_out, rank, **make).requires_grad_()
        found[f"lora r={rank}"] = lambda down=down, up=up: backward(  # type: ignore[misc]
            F.linear(x, weight) + F.linear(F.linear(x, down), up), down, up
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=["192x192", "512x512", "512x2048", "2048x512", "1024x1024"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {options.threads} thread(s)"
    print(f"{name}, torch {torch.__version__}, {options.dtype}; d_in x d_out; ratios to the frozen layer alone")
    for shape in options.shapes:
        d_in, d_out = (int(side) for side in shape.split("x"))
        for tokens in options.tokens:
            timed = {
                k: seconds(s, device, options.repeats) for k, s in steps(d_in, d_out, tokens, dtype, device).items()
            }
            base = timed.pop("frozen")
            ratios = "  ".join(f"{case} {value / base:.2f}" for case, value in timed.items())
            taken = choose(tokens, d_in, d_out, dtype).value
            print(f"{shape:>11} {tokens:>5} tokens {base * 1e3:8.2f} ms | {ratios} | auto: {taken}", flush=True)


if __name__ == "__main__":
    main()
