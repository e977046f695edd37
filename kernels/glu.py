"""Gated linear unit on a packed buffer (Shazeer 2020, arXiv 2002.05202).

    out = act(gate) * up        gate, up = the halves of gate_up (..., 2F)

act: silu, g / (1 + e^-g); gelu, g (1 + erf(g / sqrt 2)) / 2; gelu_tanh, its tanh approximation. Arithmetic is fp32 (fp64 for
fp64), rounded once. The backward recomputes the activation from gate_up, all that is saved. CPU: C++.
"""

from ctypes import c_int64
from math import pi, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hyperllama.kernels.backend import Differentiable, choose, csrc, define, pointer, wide

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def glu_reference(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, in plain torch."""
    gate, up = gate_up.to(wide(gate_up.dtype)).chunk(2, dim=-1)
    if activation == "silu":
        out = functional.silu(gate) * up
    else:
        out = functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up
    return out.to(gate_up.dtype)


def glu_backward_reference(dy: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    """The gradient of gate_up, packed like it, in plain torch."""
    gate, up = gate_up.to(wide(gate_up.dtype)).chunk(2, dim=-1)
    dy = dy.to(gate.dtype)
    if activation == "silu":
        share = torch.sigmoid(gate)
        slope = share * (1 + gate * (1 - share))
    elif activation == "gelu":
        share = 0.5 * (1 + torch.erf(gate / sqrt(2)))
        slope = share + gate * torch.exp(-0.5 * gate * gate) / sqrt(2 * pi)
    else:
        inner = sqrt(2 / pi) * (gate + 0.044715 * gate**3)
        share = 0.5 * (1 + torch.tanh(inner))
        slope = share + 0.5 * gate * (1 - torch.tanh(inner) ** 2) * sqrt(2 / pi) * (1 + 3 * 0.044715 * gate * gate)
    return torch.cat([dy * up * slope, dy * gate * share], dim=-1).to(gate_up.dtype)


def _glu_csrc(gate_up: Tensor, activation: str) -> Tensor:
    return _launch(None, gate_up, gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2), activation)


def _glu_backward_csrc(dy: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    return _launch(
        dy.contiguous(), gate_up, torch.empty_like(gate_up, memory_format=torch.contiguous_format), activation
    )


def _launch(dy: Tensor | None, gate_up: Tensor, out: Tensor, activation: str) -> Tensor:
    if out.numel():
        gate_up, width = gate_up.contiguous(), gate_up.shape[-1] // 2
        csrc("glu")(
            int(out.dtype == torch.bfloat16), ACTIVATIONS.index(activation), pointer(dy), pointer(gate_up), pointer(out),
            c_int64(gate_up.numel() // (2 * width)), c_int64(width), torch.get_num_threads(),
        )  # fmt: skip
    return out


def _forward(gate_up: Tensor, activation: str) -> Tensor:
    return choose({"reference": glu_reference, "csrc": _glu_csrc}, gate_up)(gate_up, activation)


def _backward(dy: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    return choose({"reference": glu_backward_reference, "csrc": _glu_backward_csrc}, gate_up)(dy, gate_up, activation)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate_up, ctx.activation = inputs
    ctx.save_for_backward(gate_up)


def _gradients(run: Any, ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return run(dy, ctx.saved_tensors[0], ctx.activation), None


_glu = Differentiable(
    define(
        "glu(Tensor gate_up, str activation) -> Tensor",
        _forward,
        lambda gate_up, activation: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
    ),
    define(
        "glu_backward(Tensor dy, Tensor gate_up, str activation) -> Tensor",
        _backward,
        lambda dy, gate_up, activation: torch.empty_like(gate_up, memory_format=torch.contiguous_format),
    ),
    _setup,
    _gradients,
)


def glu(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) * up of a packed gate_up (..., 2F): (..., F).

    Raises ValueError for an unknown activation or an odd width.
    """
    if activation not in ACTIVATIONS or gate_up.shape[-1] % 2:
        raise ValueError(
            f"glu: activation {activation!r} on width {gate_up.shape[-1]}; one of {', '.join(ACTIVATIONS)}, even width"
        )
    return _glu(gate_up, activation)
