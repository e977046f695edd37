"""A GPU that need not be there: CUDA tensors are fake (they have shapes and no values), and launches are recorded.

    with fake_gpu(GPUS["sm_90"]) as trace:
        ...                           # public ops, models, `backward`; what reads a value or copies it to the host raises
    trace.launches, trace.operations

A launch is kept as the launcher made it: kernel, arguments, grid and options. What a GPU's driver would specialize on is known
without one: a tensor begins 512 bytes apart from others, as torch's allocator places it, plus its offset into its storage.
"""

import ctypes
import functools
import heapq
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from hyperllama.errors import HyperLlamaError
from hyperllama.kernels.backend import Gpu, pretend

ALLOCATION = 512  # bytes: torch's caching allocator rounds every block up to this


@dataclass(frozen=True)
class Pointer:
    """What Triton asks a tensor for at a launch."""

    dtype: torch.dtype
    address: int
    bytes: int  # of the whole storage

    def data_ptr(self) -> int:
        """Its address, from where its storage begins."""
        return self.address

    def ptr_range(self) -> int:
        """For AMD, where buffer instructions reach 2 GiB."""
        return self.bytes


@dataclass(frozen=True)
class Launch:
    """One `kernel[grid](*arguments, **options)`; tensors have become Pointers."""

    kernel: JITFunction
    grid: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """`rms_norm._forward_kernel`."""
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"


class Trace(TorchDispatchMode):
    """What ran: Triton's launches, and the names of torch's ops that launch something (not views, not allocations)."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an op. Raises HostSync when it copies from the GPU to the host."""
        result = func(*args, **(kwargs or {}))
        space, _, name = func._schema.name.partition("::")
        read = [arg for arg in args if isinstance(arg, Tensor) and arg.is_cuda]
        if isinstance(result, Tensor) and read and not result.is_cuda:
            raise HostSync(f"{name} copies from the GPU to the host")
        view = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        if (
            space == "aten"
            and isinstance(result, Tensor)
            and not view
            and "empty" not in name
            and name != "_unsafe_view"
        ):
            self.operations.append(name)
        return result


class HostSync(Exception):
    """The host would wait for the GPU."""


@contextmanager
def fake_gpu(gpu: Gpu) -> Iterator[Trace]:
    """Make CUDA tensors fake, and launches recorded and chosen for `gpu`.

    Reading a value raises torch's DataDependentOutputException or DynamicOutputShapeException, copying one to the host HostSync.
    """
    _let_autograd_know_cuda()
    trace = Trace()

    def record(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        options = {name: _pointer(value) for name, value in options.items()}
        trace.launches.append(Launch(kernel, grid, tuple(map(_pointer, arguments)), options))

    with mock.patch.object(JITFunction, "run", record), pretend(gpu), FakeTensorMode(), trace:
        yield trace


def _pointer(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_pointer, value))
    if not isinstance(value, Tensor):
        return value
    return Pointer(
        value.dtype, ALLOCATION + int(value.storage_offset()) * value.itemsize, int(value.untyped_storage().nbytes())
    )


@torch.no_grad()
def backward(output: Tensor) -> None:
    """Run the gradient functions of a scalar in the engine's order: latest first.

    In their place because torch's engine wants the streams of a device that is there.
    """
    grads: dict[Any, dict[int, Tensor]] = {output.grad_fn: {output.output_nr: torch.ones_like(output)}}
    waiting = _consumers(output.grad_fn)
    ready: list[tuple[int, int, Any]] = [(0, 0, output.grad_fn)]
    while ready:
        node = heapq.heappop(ready)[2]
        given = grads.pop(node, {})
        results: Any = ()
        if given:  # a node that nothing reached has nothing to pass on
            arguments = [given.get(i) for i in range(len(node._input_metadata))]
            results = getattr(node, "apply", node)(*arguments)
            results = results if isinstance(results, tuple) else (results,)
        for i, (follower, slot) in enumerate(node.next_functions):
            if follower is None:
                continue
            grad = results[i] if i < len(results) else None
            if grad is not None:
                slots = grads.setdefault(follower, {})
                slots[slot] = slots[slot] + grad if slot in slots else grad
            waiting[follower] -= 1
            if not waiting[follower]:
                heapq.heappush(ready, (-follower._sequence_nr(), len(waiting) - id(follower), follower))


def _consumers(root: Any) -> dict[Any, int]:
    """How many edges lead to each node that can be reached from `root`."""
    counts: dict[Any, int] = {}
    stack, seen = [root], {root}
    while stack:
        for follower, _ in stack.pop().next_functions:
            if follower is None:
                continue
            counts[follower] = counts.get(follower, 0) + 1
            if follower not in seen:
                seen.add(follower)
                stack.append(follower)
    return counts


GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


@functools.cache
def _let_autograd_know_cuda() -> None:
    """A CPU build of torch knows no CUDA devices, and autograd asks for one's stream: give it one that does nothing.

    Raises HyperLlamaError without a C++ compiler.
    """
    if torch.backends.cuda.is_built():
        return
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD, encoding="utf-8")
        command = [
            "c++",
            "-shared",
            "-fPIC",
            "-std=c++20",
            "-I",
            str(root / "include"),
            str(source),
            "-o",
            str(library),
        ]
        command += ["-L", str(root / "lib"), "-lc10"]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise HyperLlamaError(f"gradients of fake CUDA tensors need a C++ compiler: {error}") from None
        ctypes.CDLL(str(library))
