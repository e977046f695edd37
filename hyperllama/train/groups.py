"""Parameters that share factors of AdamW's step: of a grown tensor, so that it moves as the small one would have, and of decay.

A tensor with p copies of its outputs and q of its inputs has gradients of 1/p and is read q times. Its moments, grown by the same
factor, go on; then lr' = a lr and eps' = b eps with a = 1/q, b = 1/p make the same step in function space. Its squared gradient
weighs 1/(p q b^2) in the global norm: clipping decides as for the small model. (The formulas: grow/operators.py.)
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from hyperllama.arena import ALIGNMENT, Arena
from hyperllama.grow.operators import Operator, TensorMap
from hyperllama.names import logical_tensors
from hyperllama.settings import ModelConfig


@dataclass(frozen=True)
class Groups:
    """Tables for the ops adamw and grad_norm: the group of every line, uint8; (a, b, decay) and the norm's weight of a group."""

    of_line: Tensor
    scales: Tensor
    norm_weights: Tensor


def parameter_groups(
    arena: Arena, decay: Literal["all", "matrices"], growth: tuple[Operator, ModelConfig] | None = None
) -> Groups | None:
    """The groups of an arena, or of its slice; None where all factors are 1. growth: the operator that made it, of which shape.

    Raises ValueError when a tensor's factors are not the same for all of its elements, as for uneven shares.
    """
    maps = growth[0].tensors(growth[1]) if growth else {}
    table: dict[tuple[float, ...], int] = {}
    of_line = torch.zeros(arena.size // ALIGNMENT, dtype=torch.uint8)
    for tensor in logical_tensors(arena.config):  # those packed together have the same factors
        a, b, weight = _factors(maps[tensor.name], tensor.shape) if growth else (1.0, 1.0, 1.0)
        decays = 1.0 if decay == "all" or len(tensor.shape) == 2 else 0.0
        of_line[arena.line_range(tensor.packed)] = table.setdefault((a, b, decays, weight), len(table))
    if list(table) == [(1.0, 1.0, 1.0, 1.0)]:
        return None
    of_line = of_line[arena.span.start // ALIGNMENT : arena.span.stop // ALIGNMENT]
    rows, device = torch.tensor(list(table), dtype=torch.float64), arena.grad.device
    return Groups(of_line.to(device), rows[:, :3].to(device, arena.grad.dtype), rows[:, 3].to(device).contiguous())


def _factors(how: TensorMap, shape: tuple[int, ...]) -> tuple[float, float, float]:
    """a, b and the norm's weight of a grown tensor."""
    rows, cols = how.gradient_factors()
    lr = how.lr_factors()
    vectors = [rows, *(v for v in (cols, lr) if v is not None)]
    if any((v != v[0]).any() for v in vectors):
        raise ValueError(f"the copies in {how.source} have unequal shares: factors of single elements are not kept")
    b = float(rows[0] * (cols[0] if cols is not None else 1))
    old = how.rows.size * (how.cols.size if how.cols else 1)
    return float(lr[0]) if lr is not None else 1.0, b, old / (prod(shape) * b * b)
