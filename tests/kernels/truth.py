"""The measure of every op: its error against fp64 is at most twice that of plain torch in the same dtype."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]


def gradients(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], upstream: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs of `function` and the gradients of its floating-point inputs."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = list(function(*leaves))
    wanted = [t for t in leaves if t.requires_grad]
    return outputs + list(
        torch.autograd.grad(outputs, wanted, [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)])
    )


def check(
    ours: Callable[..., Sequence[Tensor]],
    plain: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    exact: Callable[..., Sequence[Tensor]] | None = None,
) -> None:
    """Compare `ours` and `plain` torch, forward and backward, with `exact` (default: plain) in fp64 on the same inputs."""
    shapes = [o.shape for o in plain(*inputs)]
    dtype = next(t.dtype for t in inputs if t.is_floating_point())
    upstream = [torch.randn(shape).to(dtype) for shape in shapes]
    truth = gradients(exact or plain, [t.double() if t.is_floating_point() else t for t in inputs], upstream)
    reference, result = gradients(plain, inputs, upstream), gradients(ours, inputs, upstream)
    for true, expected, got in zip(truth, reference, result, strict=True):
        assert got.shape == expected.shape
        if not got.numel():
            continue
        assert torch.isfinite(got).all()
        worst = (got.double() - true).abs().max()
        allowed = 2 * (expected.double() - true).abs().max()
        # where plain torch happens to be exact, one rounding of the largest value is still allowed
        assert worst <= max(allowed, torch.finfo(got.dtype).eps * true.abs().max()), f"{worst} > {allowed}"
