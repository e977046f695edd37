"""The measure of every op: its error against fp64 is at most twice that of plain torch in the same dtype."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]
Function = Callable[..., Sequence[Tensor]]


def gradients(function: Function, inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of `function` and the gradients of its floating-point inputs."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = list(function(*leaves))
    wanted = [t for t in leaves if t.requires_grad]
    given = [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
    return outputs + list(torch.autograd.grad(outputs, wanted, given))


def upstream_of(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Random gradients for the outputs of `function`, in the dtype of its inputs."""
    dtype = next(t.dtype for t in inputs if t.is_floating_point())
    return [torch.randn(output.shape).to(dtype) for output in function(*inputs)]


def check(ours: Function, plain: Function, inputs: Sequence[Tensor], exact: Function | None = None) -> None:
    """Compare `ours` and `plain` torch, forward and backward, with `exact` (or `plain`) in fp64 on the same inputs."""
    upstream = upstream_of(plain, inputs)
    truth = gradients(exact or plain, [t.double() if t.is_floating_point() else t for t in inputs], upstream)
    reference, result = gradients(plain, inputs, upstream), gradients(ours, inputs, upstream)
    for true, expected, got in zip(truth, reference, result, strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        if not got.numel():
            continue
        assert torch.isfinite(got).all()
        worst = (got.double() - true).abs().max()
        allowed = 2 * (expected.double() - true).abs().max()
        # where plain torch happens to be exact, one rounding of the largest value is still allowed
        assert worst <= max(allowed, torch.finfo(got.dtype).eps * true.abs().max()), f"{worst} > {allowed}"


def check_compiled(function: Function, inputs: Sequence[Tensor], compiler: str = "aot_eager") -> None:
    """Compare torch.compile of `function`, which must be one graph, with eager, forward and backward."""
    upstream = upstream_of(function, inputs)
    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    eager = gradients(function, inputs, upstream)
    for expected, got in zip(eager, gradients(compiled, inputs, upstream), strict=True):
        torch.testing.assert_close(got, expected)
