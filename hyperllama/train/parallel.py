"""Data parallelism over the arena: how the gradients of several processes become one update.

    ddp      every process has the whole arena: gradients are summed, and all make the same update
    zero1    masters and moments are cut into a slice a process (Rajbhandari et al. 2020, arXiv 1910.02054): gradients are summed
             into their slice, a process updates its own, and the weights are gathered

A layer's gradients are complete when the backward leaves it: in the last micro-batch their sum runs beside the backward of the
layers below. Collectives are torch.distributed's.
"""

from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from hyperllama.arena import ALIGNMENT, Arena, Role
from hyperllama.grow.operators import Operator
from hyperllama.grow.tensors import Kind, grow_tensor
from hyperllama.names import logical_tensors
from hyperllama.train.distributed import Processes


class GradientSum:
    """Sums an arena's gradients over the processes, layer by layer from the last."""

    def __init__(self, arena: Arena, mine: Processes):
        self.arena, self.mine = arena, mine
        self.layer, self.end = arena.config.num_layers, arena.size  # what is summed or being summed: from there on
        self.pending: list[dist.Work] = []

    def layer_done(self, layer: int) -> None:
        """Start the sum of the gradients of `layer` and of what lies behind it: the backward has left it."""
        self._start(self.arena.offsets[f"layers.{layer}.attn_norm"])
        self.layer = layer

    def finish(self) -> None:
        """Start what is left and wait for all. The pieces are the same for a process that had no window."""
        for layer in reversed(range(self.layer)):
            self.layer_done(layer)
        self._start(0)
        for work in self.pending:
            work.wait()
        self.pending.clear()
        self.layer, self.end = self.arena.config.num_layers, self.arena.size

    def _start(self, begin: int) -> None:
        """Sum the elements from `begin` to `end`: everywhere (ddp), or where their slice is (zero1)."""
        if self.mine.world > 1 and self.arena.whole:
            self.pending.append(dist.all_reduce(self.arena.grad[begin : self.end], async_op=True))
        elif self.mine.world > 1:
            own = self.arena.size // self.mine.world
            for rank in range(begin // own, -(-self.end // own)):
                part = self.arena.grad[max(begin, rank * own) : min(self.end, (rank + 1) * own)]
                self.pending.append(dist.reduce(part, rank, async_op=True))
        self.end = begin


def whole_norm(norm: Tensor, arena: Arena, mine: Processes) -> Tensor:
    """The norm of the whole gradient from that of this process's slice."""
    return norm if arena.whole else mine.sum_(norm.double().square()).sqrt().to(norm.dtype)


def gather_weights(arena: Arena, mine: Processes) -> None:
    """zero1: give every process the weights that the others have updated."""
    if not arena.whole:
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        gather(arena.weights, arena.weights[arena.span])


@torch.no_grad()
def grow_slices(small: Arena, large: Arena, operator: Operator, mine: Processes) -> None:
    """zero1: grow_arena where every process has a slice of the masters and moments.

    Tensor by tensor: all processes get the small one, grow it, and keep what is in their slice. The small slices lie apart.
    """
    maps = operator.tensors(small.config)
    before = {key: list(parts) for key, parts in groupby(logical_tensors(small.config), lambda tensor: tensor.packed)}
    roles: list[tuple[Role, Kind]] = [("master" if small.rounds else "weights", "weights"), ("m", "m"), ("v", "v")]
    for packed, parts in groupby(logical_tensors(large.config), lambda tensor: tensor.packed):
        names, lines = [tensor.name for tensor in parts], large.line_range(packed)
        first, end = lines.start * ALIGNMENT, lines.stop * ALIGNMENT
        for role, kind in roles:
            old = small.packed("weights")[packed] if role == "weights" else _collected(small, role, packed, mine)
            sources = {tensor.name: old[tensor.start : tensor.start + tensor.shape[0]] for tensor in before[packed]}
            grown = torch.cat([grow_tensor(name, maps[name], sources.__getitem__, kind).flatten() for name in names])
            if kind == "weights":
                large.weights[first:end].zero_()
                large.weights[first : first + len(grown)].copy_(grown)
            if role != "weights":
                low, high = max(first, large.span.start), min(first + len(grown), large.span.stop)
                if low < high:
                    buffer: Tensor = getattr(large, role)
                    buffer[low - large.span.start : high - large.span.start].copy_(grown[low - first : high - first])


def _collected(arena: Arena, role: Role, packed: str, mine: Processes) -> Tensor:
    """A packed tensor of a sliced role, from the processes that have its parts."""
    shape, first = arena.shapes[packed], arena.offsets[packed]
    whole = torch.zeros(shape, dtype=arena.grad.dtype, device=arena.grad.device)
    flat, buffer = whole.view(-1), getattr(arena, role)
    low, high = max(first, arena.span.start), min(first + len(flat), arena.span.stop)
    if low < high:
        flat[low - first : high - first].copy_(buffer[low - arena.span.start : high - arena.span.start])
    return mine.sum_(whole)  # all but one of the terms are zeros
