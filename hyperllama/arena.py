"""Parameters live in one arena: a flat buffer per role, packed tensors as views into it.

    weights   what the forward reads, in the compute dtype
    master    fp32 copy the optimizer updates (the same buffer as weights when the compute dtype is already that wide, or when the
              weights are to be updated themselves, rounded stochastically)
    grad      fp32, accumulated by the backward of every op straight into place
    m, v      fp32, AdamW's moments

Hence one optimizer launch, one norm launch, one collective, and checkpoints, growth and merging as work on views.

A sharded arena (`parallel: fsdp`) has the same addresses, but every process holds only its slice of all five. What the model
computes with is in units, the embedding, every layer, and what follows them, each a buffer of its own that comes and goes.
"""

from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Literal

import torch
from torch import Tensor

from hyperllama.kernels.adamw import LINE
from hyperllama.names import logical_tensors, packed_shapes
from hyperllama.settings import ModelConfig

Role = Literal["weights", "master", "grad", "m", "v"]
ALIGNMENT = LINE  # elements: 256 bytes in bf16, so every tensor starts on a whole cache line and a 128-bit access


@dataclass(frozen=True)
class Unit:
    """Weights and gradients of the elements `start` to `stop` of a sharded arena, whose memory comes and goes."""

    start: int
    stop: int
    weights: Tensor
    grad: Tensor

    def take(self, role: Literal["weights", "grad"]) -> Tensor:
        """The buffer with memory behind it, whose content is undefined where it had none.

        What is written there leaves autograd's version counters alone: a layer that comes back has the weights that it had.
        """
        buffer: Tensor = getattr(self, role)
        buffer.untyped_storage().resize_(buffer.numel() * buffer.itemsize)
        return buffer.data

    def give_back(self, role: Literal["weights", "grad"]) -> None:
        """Free the buffer's memory; views of it stay."""
        getattr(self, role).untyped_storage().resize_(0)


class Arena:
    """The flat buffers of one model.

    `dtype` is the compute dtype (bf16, fp32, or fp64 for exact tests); masters, gradients and moments are fp32
    (fp64 for fp64) and exist only when `training`; without `masters` the weights are their own. With world > 1, masters and
    moments are slice `rank` of `world`: `span` of the buffers, whose size is a multiple of the slices. `sharded`: so are
    weights and gradients, and there are `units`.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        training: bool,
        rank: int = 0,
        world: int = 1,
        sharded: bool = False,
        masters: bool = True,
    ):
        self.dtype, self.training, self.rank, self.world, self.sharded = dtype, training, rank, world, sharded
        self._lay_out(config)
        wide = torch.promote_types(dtype, torch.float32)
        self.rounds = dtype != wide and masters  # whether weights are another buffer than the masters
        held = self.size // world if sharded else self.size
        self.weights = torch.zeros(held, dtype=dtype, device=device)
        if training:
            self.grad = torch.zeros(held, dtype=wide, device=device)
            self._allocate_state()
        self.units: list[Unit] = []
        if sharded:
            self._views: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {
                "weights": ({}, {}),
                "grad": ({}, {}),
            }
            self._make_units(wide)

    def _lay_out(self, config: ModelConfig) -> None:
        self.config, self.shapes = config, packed_shapes(config)
        self.offsets, self.size = layout(config, self.world)
        own = self.size // self.world
        self.span = slice(own * self.rank, own * (self.rank + 1))

    def _make_units(self, wide: torch.dtype) -> None:
        """Units and all views of them, which torch makes only where there is memory; then that of the layers goes."""
        layers = [self.offsets[f"layers.{i}.attn_norm"] for i in range(self.config.num_layers)]
        for start, stop in pairwise([0, *layers, self.offsets["norm"], self.size]):
            weights, grad = (torch.zeros(stop - start, dtype=d, device=self.weights.device) for d in (self.dtype, wide))
            unit = Unit(start, stop, weights, grad)
            roles: list[tuple[Literal["weights", "grad"], Tensor]] = [("weights", weights), ("grad", grad)]
            for role, buffer in roles:
                packed = self._packed(buffer, start)
                for views, more in zip(self._views[role], (packed, self._logical(packed)), strict=True):
                    views |= more
                if start in layers:  # a tied table is used at both ends: they stay
                    unit.give_back(role)
            self.units.append(unit)

    def own(self, role: Literal["weights", "grad"]) -> Tensor:
        """This process's slice of a role that it may hold all of."""
        buffer: Tensor = getattr(self, role)
        return buffer if self.sharded else buffer[self.span]

    def zero_grad(self) -> None:
        """Begin a step."""
        self.grad.zero_()
        for unit in (*self.units[:1], *self.units[-1:]):
            unit.grad.zero_()

    def write(self, start: int, values: Tensor) -> None:
        """Set the weights from element `start` on, or what this process holds of them, to `values` of any shape."""
        flat, first = values.flatten(), self.span.start if self.sharded else 0
        low, high = max(start, first), min(start + len(flat), first + len(self.weights))
        if low < high:
            self.weights[low - first : high - first].copy_(flat[low - start : high - start])

    def _allocate_state(self) -> None:
        own = self.own("weights")
        self.master = torch.zeros(len(own), dtype=self.grad.dtype, device=own.device) if self.rounds else own
        self.m, self.v = (torch.zeros(len(own), dtype=self.grad.dtype, device=own.device) for _ in range(2))

    @property
    def whole(self) -> bool:
        """Whether this process has all masters and moments."""
        return self.world == 1

    def tail(self, config: ModelConfig) -> "Arena":
        """The arena of a smaller model in the end of this one's buffers: expanded front to back it can grow in place.

        Slices of masters and moments would not: they are buffers of their own.
        """
        small = copy(self)
        small._lay_out(config)
        first = self.size - small.size
        small.weights = self.weights[first:]
        if self.training:
            small.grad = self.grad[first:]
            if not self.whole:
                small._allocate_state()
                return small
            small.m, small.v = self.m[first:], self.v[first:]
            small.master = self.master[first:] if self.rounds else small.weights
        return small

    def packed(self, role: Role) -> dict[str, Tensor]:
        """Packed tensors of a role, as views; not of slices. A sharded arena's lie in its units."""
        assert self.whole or role in ("weights", "grad")
        return self._views[role][0] if self.sharded else self._packed(getattr(self, role), 0)

    def logical(self, role: Role) -> dict[str, Tensor]:
        """Logical tensors of a role under their Hugging Face names, as views."""
        return self._views[role][1] if self.sharded else self._logical(self.packed(role))

    def _packed(self, buffer: Tensor, start: int) -> dict[str, Tensor]:
        """The packed tensors in a buffer that begins at element `start`."""
        at = {name: offset - start for name, offset in self.offsets.items() if 0 <= offset - start < len(buffer)}
        return {name: buffer[i : i + prod(self.shapes[name])].view(self.shapes[name]) for name, i in at.items()}

    def _logical(self, packed: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            tensor.name: packed[tensor.packed][tensor.start : tensor.start + tensor.shape[0]]
            for tensor in logical_tensors(self.config)
            if tensor.packed in packed
        }

    def line_range(self, name: str) -> slice:
        """The lines of ALIGNMENT elements that hold the packed tensor `name` and the padding behind it."""
        start = self.offsets[name] // ALIGNMENT
        return slice(start, start - (-prod(self.shapes[name]) // ALIGNMENT))

    def master_from_weights(self) -> None:
        """Rebuild the fp32 masters after the weights were written."""
        if self.rounds:
            self.master.copy_(self.own("weights"))

    def weights_from_master(self) -> None:
        """Round the weights anew, those of this process's slice, after the masters were written."""
        if self.rounds:
            self.own("weights").copy_(self.master)

    def bytes(self) -> int:
        """Memory of all buffers, in bytes; at its most where units come and go."""
        if self.sharded:
            return sharded_bytes(self.config, self.dtype, self.world, masters=self.rounds)
        return arena_bytes(self.size, self.dtype, training=self.training, world=self.world, masters=self.rounds)


def layout(config: ModelConfig, world: int = 1) -> tuple[dict[str, int], int]:
    """Where every packed tensor starts, and the length of the buffers, `world` slices of whole lines, in elements."""
    offsets, size = {}, 0
    for name, shape in packed_shapes(config).items():
        offsets[name] = size
        size += -(-prod(shape) // ALIGNMENT) * ALIGNMENT
    return offsets, -(-size // (ALIGNMENT * world)) * ALIGNMENT * world


def arena_bytes(size: int, dtype: torch.dtype, *, training: bool, world: int = 1, masters: bool = True) -> int:
    """Bytes of an arena of `size` elements, with slice one of `world` of masters and moments: for --dry-run."""
    wide = torch.promote_types(dtype, torch.float32)
    state = (3 if dtype != wide and masters else 2) * size // world
    return size * dtype.itemsize + (size + state) * wide.itemsize * training


def sharded_bytes(config: ModelConfig, dtype: torch.dtype, world: int, *, masters: bool = True) -> int:
    """Bytes of a sharded arena in training, two layers' weights and two layers' gradients on their way included."""
    offsets, size = layout(config, world)
    wide = torch.promote_types(dtype, torch.float32)
    layer = offsets["norm" if config.num_layers == 1 else "layers.1.attn_norm"] - offsets["layers.0.attn_norm"]
    ends = size - config.num_layers * layer
    state = (
        4 if dtype != wide and masters else 3
    ) * wide.itemsize + dtype.itemsize  # master (else weights), grad, m, v
    return size // world * state + (ends + 2 * layer) * (dtype.itemsize + wide.itemsize)
