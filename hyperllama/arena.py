"""Parameters live in one arena: a flat buffer per role, packed tensors as views into it.

    weights   what the forward reads, in the compute dtype
    master    fp32 copy the optimizer updates (the same buffer as weights when the compute dtype is already that wide)
    grad      fp32, accumulated by the backward of every op straight into place
    m, v      fp32, AdamW's moments

Hence one optimizer launch, one norm launch, one collective, and checkpoints, growth and merging as work on views.
"""

from copy import copy
from math import prod
from typing import Literal

import torch
from torch import Tensor

from hyperllama.config import ModelConfig
from hyperllama.kernels.adamw import LINE
from hyperllama.names import logical_tensors, packed_shapes

Role = Literal["weights", "master", "grad", "m", "v"]
ALIGNMENT = LINE  # elements: 256 bytes in bf16, so every tensor starts on a whole cache line and a 128-bit access


class Arena:
    """The flat buffers of one model.

    `dtype` is the compute dtype (bf16, fp32, or fp64 for exact tests); masters, gradients and moments are fp32
    (fp64 for fp64) and exist only when `training`. With world > 1, masters and moments are slice `rank` of `world`: `span`
    of the buffers, whose size is a multiple of the slices.
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
    ):
        self.dtype, self.training, self.rank, self.world = dtype, training, rank, world
        self._lay_out(config)
        wide = torch.promote_types(dtype, torch.float32)
        self.rounds = dtype != wide  # whether weights are another buffer than the masters
        self.weights = torch.zeros(self.size, dtype=dtype, device=device)
        if training:
            self.grad = torch.zeros(self.size, dtype=wide, device=device)
            self._allocate_state()

    def _lay_out(self, config: ModelConfig) -> None:
        self.config, self.shapes = config, packed_shapes(config)
        self.offsets, self.size = layout(config, self.world)
        own = self.size // self.world
        self.span = slice(own * self.rank, own * (self.rank + 1))

    def _allocate_state(self) -> None:
        own = self.weights if self.whole else self.weights[self.span]
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
        """Packed tensors of a role, as views; not of slices."""
        assert self.whole or role in ("weights", "grad")
        buffer: Tensor = getattr(self, role)
        return {
            name: buffer[self.offsets[name] : self.offsets[name] + prod(shape)].view(shape)
            for name, shape in self.shapes.items()
        }

    def logical(self, role: Role) -> dict[str, Tensor]:
        """Logical tensors of a role under their Hugging Face names, as views."""
        packed = self.packed(role)
        return {
            tensor.name: packed[tensor.packed][tensor.start : tensor.start + tensor.shape[0]]
            for tensor in logical_tensors(self.config)
        }

    def line_range(self, name: str) -> slice:
        """The lines of ALIGNMENT elements that hold the packed tensor `name` and the padding behind it."""
        start = self.offsets[name] // ALIGNMENT
        return slice(start, start - (-prod(self.shapes[name]) // ALIGNMENT))

    def master_from_weights(self) -> None:
        """Rebuild the fp32 masters after the weights were written."""
        if self.rounds:
            self.master.copy_(self.weights[self.span])

    def weights_from_master(self) -> None:
        """Round the weights anew, those of this process's slice, after the masters were written."""
        if self.rounds:
            self.weights[self.span].copy_(self.master)

    def bytes(self) -> int:
        """Memory of all buffers, in bytes."""
        return arena_bytes(self.size, self.dtype, training=self.training, world=self.world)


def layout(config: ModelConfig, world: int = 1) -> tuple[dict[str, int], int]:
    """Where every packed tensor starts, and the length of the buffers, `world` slices of whole lines, in elements."""
    offsets, size = {}, 0
    for name, shape in packed_shapes(config).items():
        offsets[name] = size
        size += -(-prod(shape) // ALIGNMENT) * ALIGNMENT
    return offsets, -(-size // (ALIGNMENT * world)) * ALIGNMENT * world


def arena_bytes(size: int, dtype: torch.dtype, *, training: bool, world: int = 1) -> int:
    """Bytes of an arena of `size` elements, with slice one of `world` of masters and moments: for --dry-run."""
    wide = torch.promote_types(dtype, torch.float32)
    state = (2 if dtype == wide else 3) * size // world
    return size * dtype.itemsize + (size + state) * wide.itemsize * training
