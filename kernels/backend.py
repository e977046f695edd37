"""Which implementation of an op runs, and how an op is made known to torch.

The choice is made per call, by device: CUDA tensors go to Triton, CPU tensors to csrc, everything else to the plain-torch
reference. So do dtypes that a kernel does not take (see DTYPES), and ops that have no kernel of their own yet. `use` and
HYPERLLAMA_BACKEND force one.
"""

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hyperllama.errors import HyperLlamaError, WrongIndex
from hyperllama.kernels.native import FORCED as _forced
from hyperllama.kernels.native import csrc, library

try:  # importing the package works without Triton; asking for a Triton kernel says what is missing
    import triton
    import triton.language as tl

    jit, constexpr = triton.jit, tl.constexpr
except ImportError:
    triton = tl = None

    def jit(function: Any) -> Any:
        """Leave a kernel as it is: without Triton it is never launched."""
        return function

    def constexpr(value: Any) -> Any:
        """Leave a kernel's constant as it is, too."""
        return value


__all__ = [
    "BACKENDS", "DTYPES", "Differentiable", "Kernel", "choose", "constexpr", "csrc", "define", "jit", "library", "pointer", "tl",
    "triton", "use", "wide",
]  # fmt: skip
BACKENDS = ("reference", "csrc", "triton")
DTYPES = {"csrc": (torch.float32, torch.bfloat16), "triton": (torch.float32, torch.bfloat16, torch.float16)}
LIBRARY = torch.library.Library("hyperllama", "FRAGMENT")


@dataclass(frozen=True)
class Gpu:
    """What the launch of a Triton kernel may depend on, besides shapes and dtypes."""

    arch: str  # sm_90, gfx942; "interpreter" where Triton interprets kernels on CPU tensors
    multiprocessors: int
    shared_bytes: int  # of shared memory that one program may use
    warp: int = 32  # threads

    @property
    def capability(self) -> int:
        """90 for sm_90; 0 where it is no NVIDIA GPU."""
        return int(self.arch.removeprefix("sm_")) if self.arch.startswith("sm_") else 0


# A100, H100 and H200, B200, MI300X; the sizes are those of their tuning guides
GPUS = {
    "sm_80": Gpu("sm_80", 108, 163 << 10),
    "sm_90": Gpu("sm_90", 132, 227 << 10),
    "sm_100": Gpu("sm_100", 148, 227 << 10),
    "gfx942": Gpu("gfx942", 304, 64 << 10, warp=64),
}
INTERPRETER = Gpu("interpreter", 4, 227 << 10)
_pretended: ContextVar[Gpu | None] = ContextVar("hyperllama_gpu", default=None)


@contextmanager
def pretend(gpu: Gpu) -> Iterator[None]:
    """Let launches inside the block be chosen for a GPU that need not be there: to compile them ahead of time."""
    token = _pretended.set(gpu)
    try:
        yield
    finally:
        _pretended.reset(token)


def gpu_of(tensor: Tensor) -> Gpu:
    """The GPU that a kernel on this tensor runs on."""
    return _pretended.get() or (_gpu(tensor.device) if tensor.is_cuda else INTERPRETER)


@cache
def _gpu(device: torch.device) -> Gpu:
    found: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack a part of them
    amd = torch.version.hip is not None
    arch = found.gcnArchName.partition(":")[0] if amd else f"sm_{found.major}{found.minor}"
    shared = found.shared_memory_per_block if amd else found.shared_memory_per_block_optin
    return Gpu(arch, found.multi_processor_count, shared, found.warp_size)


@contextmanager
def use(name: str | None) -> Iterator[None]:
    """Force one implementation inside the block: `reference`, `csrc` or `triton`; None leaves the choice free.

    Raises HyperLlamaError for another name; a missing implementation is named when an op needs it.
    """
    token = _forced.set(None if name is None else _known(name))
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The implementation that `use` forces here: a backward that runs in a thread of autograd's must be given it."""
    return _forced.get()


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise HyperLlamaError(f"{name!r} is not a backend; one of {', '.join(BACKENDS)} was expected")
    return name


def same_device(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError, naming `op` and the tensors, unless all are on one device: Triton would read another's memory."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"{op}: {', '.join(f'{name} is on {device}' for name, device in devices.items())}")


def floating(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError, naming `op` and the tensors, unless all hold floating-point numbers."""
    wrong = [f"{name} is {t.dtype}" for name, t in tensors.items() if t is not None and not t.is_floating_point()]
    if wrong:
        raise ValueError(f"{op}: {', '.join(wrong)}; floating-point numbers were expected")


def choose(
    implementations: Mapping[str, Callable[..., Any]], x: Tensor, csrc_dtypes: Sequence[torch.dtype] = DTYPES["csrc"]
) -> Callable[..., Any]:
    """The implementation that runs for tensors like `x`; `csrc_dtypes` for an op whose C++ takes others than most.

    Raises HyperLlamaError when the forced one, or Triton for a CUDA tensor, is not there or can't run on x's device.
    """
    forced = _forced.get() or os.environ.get("HYPERLLAMA_BACKEND")
    name = _known(forced) if forced else {"cuda": "triton", "cpu": "csrc"}.get(x.device.type, "reference")
    if forced == "csrc" and library() is None:
        raise HyperLlamaError("the backend csrc was asked for, but hyperllama was installed without a C++ compiler")
    if forced == "triton" and triton is None:
        raise HyperLlamaError("the backend triton was asked for, but Triton is not installed: pip install triton")
    dtypes = {**DTYPES, "csrc": csrc_dtypes}
    if name not in implementations or name == "reference" or x.dtype not in dtypes[name]:
        return implementations["reference"]
    if name == "triton" and triton is None:
        raise HyperLlamaError("CUDA tensors need Triton, which is not installed: pip install triton")
    if name == "csrc" and x.device.type != "cpu":
        raise HyperLlamaError(f"the backend csrc was asked for, but it runs on CPU tensors and these are on {x.device}")
    if name == "csrc" and library() is None:
        return implementations["reference"]
    return implementations[name]


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """A tensor's data for csrc; a null pointer for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@dataclass(frozen=True)
class Kernel:
    """A launcher and the op `hyperllama::<name>` it is registered as."""

    launch: Callable[..., Any]
    registered: Callable[..., Any]

    def __call__(self, *inputs: Any) -> Any:
        """Launch it; torch.compile and export see the registered op."""
        return self.registered(*inputs) if torch.compiler.is_compiling() else self.launch(*inputs)


def define(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Kernel:
    """Register `hyperllama::<schema>` with one launcher for all devices, and its shape function."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hyperllama::{name}", fake, lib=LIBRARY)
    return Kernel(launch, getattr(torch.ops.hyperllama, name))


class Differentiable:
    """A kernel with gradients: eager calls skip the dispatcher, torch.compile and export see registered ops only.

    `setup(ctx, inputs, output)` is as torch.library.register_autograd takes it; `gradients(run, ctx, *grads)` gives one
    gradient per input and calls the backward kernel as `run`. With a `main_grad`, the gradient of input number `weight`
    is added to it in place (fp32 accumulation into the arena) and that input gets none.
    """

    def __init__(
        self,
        forward: Kernel,
        backward: Kernel,
        setup: Callable[..., None],
        gradients: Callable[..., tuple[Any, ...]],
        weight: int | None = None,
    ):
        self.registered = forward.registered
        name = str(forward.registered).removeprefix("hyperllama.")
        torch.library.register_autograd(
            f"hyperllama::{name}",
            lambda ctx, *grads: gradients(backward.registered, ctx, *grads),
            setup_context=setup,
            lib=LIBRARY,
        )

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:  # a setup_context of its own would cost 13 us a call
                output = forward.launch(*inputs[:-1])
                ctx.main_grad, ctx.forced = inputs[-1], _forced.get()
                setup(ctx, inputs[:-1], output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                with use(ctx.forced):  # as in the forward, also in the thread that runs backwards on a GPU
                    result = [*gradients(backward.launch, ctx, *grads), None]
                if ctx.main_grad is not None and weight is not None:
                    ctx.main_grad.add_(result[weight])
                    result[weight] = None
                return tuple(result)

        self.eager = Eager

    def __call__(self, *inputs: Any, main_grad: Tensor | None = None) -> Any:
        """Run the op; `main_grad` receives the weight's gradient in place."""
        if torch.compiler.is_compiling() and main_grad is None:
            return self.registered(*inputs)
        return self.eager.apply(*inputs, main_grad)


WRONG_INDEX = {  # what each bit of a device's flag says
    1: "embedding: a token id is outside the vocabulary",
    2: "linear_cross_entropy: a target is outside the vocabulary",
    4: "rope: a position is outside the tables",
}
_flags: dict[torch.device, Tensor] = {}


def wrong_index_flag(x: Tensor) -> Tensor:
    """The int32 (1,) on x's device into which a Triton kernel ORs the bit of a wrong index: no op waits for the device."""
    flag = _flags.get(x.device)
    if flag is None:
        flag = torch.zeros(1, dtype=torch.int32, device=x.device)
        if type(flag) is Tensor:  # a fake tensor lives no longer than its mode
            _flags[x.device] = flag
    return flag


def check_indices(device: torch.device) -> None:
    """Raise WrongIndex, naming the op, when a kernel has met a wrong index on `device` since the last call; waits for it.

    The wrong ones did no harm: an unknown id or target takes no part, a position beyond the tables is turned by their last.
    """
    flag = _flags.get(device)
    bits = 0 if flag is None else int(flag)
    if flag is not None and bits:
        flag.zero_()
        raise WrongIndex("; ".join(text for bit, text in WRONG_INDEX.items() if bits & bit))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic and gradients of `dtype` are in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)
