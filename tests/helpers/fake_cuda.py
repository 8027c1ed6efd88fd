"""A CUDA device without numbers: what a step does on a GPU, found on a machine that has
none.

    with FakeCuda() as cuda:              tensors on "cuda:0" have no numbers; those on the host are real
        ...
        cuda.permits = Permits.NOTHING    from here on a copy to the device that the host waits for is a fault, too

What is on the device are torch's fake tensors: an operation has their shapes and dtypes,
and raises where devices do not go together, in forward and in backward. `Fault` is raised
where the host would wait for the device: at `item`, `tolist`, `bool` and `nonzero`, at
copies to the host, and at copies to the device that are not `non_blocking` from pinned
memory.

A CPU build of torch needs `fake_cuda.cpp` for it, loaded before torch:
LD_PRELOAD=`build_shim(folder)`.
"""

from __future__ import annotations

import subprocess
from contextlib import ExitStack, nullcontext
from enum import Enum
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)
SHIM = Path(__file__).with_suffix(".cpp")

_FAKE = FakeTensorMode()
"""One per process: tables that a cache holds may be read under the next `FakeCuda`."""
_PATCHES = (
    patch.object(torch.cuda, "_lazy_init", lambda: None),
    patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
    # What is on the device has no address; where addresses are compared, a storage's
    # identity will do.
    patch.object(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata),
    patch.object(Tensor, "pin_memory", lambda tensor: pin([tensor.clone()])[0]),
)


class Fault(AssertionError):
    """The host would wait for the device, or operands are on different ones."""


class Permits(Enum):
    """The reads and copies that the host may do."""

    NOTHING = "wait for nothing: a step"
    COPIES = "wait for copies to the device: a first step, which makes tables"
    READS = "ask for numbers, and get yes and zero: a merge, a checkpoint, an export"


def build_shim(folder):
    """Compile the shim against this torch; takes seconds."""
    library = folder / "fake_cuda.so"
    installed = Path(torch.__file__).parent
    libraries = f"-L{installed}/lib -Wl,-rpath,{installed}/lib -Wl,--no-as-needed -lc10 -ltorch_cpu"
    command = f"g++ -std=c++20 -shared -fPIC -I{installed}/include {SHIM} -o {library} {libraries}"
    subprocess.run(command.split(), check=True)
    return library


def pin(tensors):
    """Note that tensors on the host lie in pinned memory."""
    pinned = list(tensors)
    for tensor in pinned:
        tensor.lies_pinned = True
    return pinned


class FakeCuda(TorchDispatchMode):
    """A mode that every operation of the process goes through, those of the autograd engine
    too.
    """

    permits = Permits.COPIES

    def __enter__(self):
        self._patches = ExitStack()
        for patcher in _PATCHES:
            self._patches.enter_context(patcher)
        # torch.tensor(..., device="cuda") is then a copy that is seen here
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)
        self._patches.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or "cpu")
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if (
            func is torch.ops.aten._to_copy.default
            and device.type != args[0].device.type
            and "device" in kwargs
        ):
            self._check_copy(args[0], device, kwargs.get("non_blocking", False))
            with _FAKE if device.type == "cuda" else nullcontext():
                return torch.zeros(
                    args[0].shape,
                    dtype=kwargs.get("dtype") or args[0].dtype,
                    device=device,
                )
        if (
            func is torch.ops.aten.copy_.default
            and args[0].device.type != args[1].device.type
        ):
            self._check_copy(args[1], args[0].device, args[2:] == (True,))
            if args[0].is_cuda and args[0].itemsize > args[1].itemsize:
                raise Fault(
                    f"{tuple(args[1].shape)} is cast to {args[0].dtype} on the host before it is copied"
                )
            return args[0]
        if device.type == "cpu" and not any(tensor.is_cuda for tensor in tensors):
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, _operand, (args, kwargs))
        try:
            with _FAKE:
                return func(*args, **kwargs)
        except DataDependentOutputException:
            if self.permits is not Permits.READS:
                raise Fault(f"the host waits for the device: {func}") from None
            return args[0].dtype is torch.bool or 0

    def _check_copy(self, source, target, non_blocking):
        is_pinned = hasattr(source, "lies_pinned")
        if target.type == "cpu" and self.permits is not Permits.READS:
            raise Fault(f"{tuple(source.shape)} is copied to the host")
        if (
            target.type == "cuda"
            and self.permits is Permits.NOTHING
            and not (non_blocking and is_pinned)
        ):
            how = "from memory that is not pinned" if non_blocking else "and waited for"
            raise Fault(f"{tuple(source.shape)} is copied to the device {how}")


def _operand(tensor):
    """The stand-in for a tensor that the device computes with; of the host's tensors,
    only single numbers."""
    if tensor.device.type == "cpu" and tensor.dim():
        raise Fault(
            f"a tensor {tuple(tensor.shape)} on the host is among those on the device"
        )
    return tensor if isinstance(tensor, FakeTensor) else _FAKE.from_tensor(tensor)
