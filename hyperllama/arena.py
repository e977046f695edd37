"""Parameters live in one arena: a flat buffer per role, packed tensors as views into it.

    weights   what the forward reads, in the compute dtype
    master    fp32 copy the optimizer updates (the same buffer as weights when the compute dtype is already that wide)
    grad      fp32, accumulated by the backward of every op straight into place
    m, v      fp32, AdamW's moments

Hence one optimizer launch, one norm launch, one collective, and checkpoints, growth and merging as work on views.
"""

from typing import Literal

import torch
from torch import Tensor

from hyperllama.config import ModelConfig
from hyperllama.names import logical_tensors, packed_shapes

Role = Literal["weights", "master", "grad", "m", "v"]
ALIGNMENT = 128  # elements: 256 bytes in bf16, so every tensor starts on a whole cache line and a 128-bit access


class Arena:
    """The flat buffers of one model.

    `dtype` is the compute dtype (bf16, fp32, or fp64 for exact tests); masters, gradients and moments are fp32
    (fp64 for fp64) and exist only when `training`.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str, *, training: bool):
        self.config, self.dtype, self.training = config, dtype, training
        self.offsets: dict[str, int] = {}
        self.shapes = packed_shapes(config)
        size = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = size
            n_elements = shape[0] * (shape[1] if len(shape) == 2 else 1)
            size += -(-n_elements // ALIGNMENT) * ALIGNMENT
        self.size = size
        wide = torch.promote_types(dtype, torch.float32)
        self.weights = torch.zeros(size, dtype=dtype, device=device)
        if training:
            self.master = self.weights if dtype == wide else torch.zeros(size, dtype=wide, device=device)
            self.grad, self.m, self.v = (torch.zeros(size, dtype=wide, device=device) for _ in range(3))

    def packed(self, role: Role) -> dict[str, Tensor]:
        """Packed tensors of a role, as views."""
        buffer: Tensor = getattr(self, role)
        views = {}
        for name, shape in self.shapes.items():
            n_elements = shape[0] * (shape[1] if len(shape) == 2 else 1)
            views[name] = buffer[self.offsets[name] : self.offsets[name] + n_elements].view(shape)
        return views

    def logical(self, role: Role) -> dict[str, Tensor]:
        """Logical tensors of a role under their Hugging Face names, as views."""
        packed = self.packed(role)
        return {
            tensor.name: packed[tensor.packed][tensor.start : tensor.start + tensor.shape[0]]
            for tensor in logical_tensors(self.config)
        }

    def master_from_weights(self) -> None:
        """Rebuild the fp32 masters after the weights were written."""
        if self.master is not self.weights:
            self.master.copy_(self.weights)

    def bytes(self) -> int:
        """Memory of all buffers, in bytes."""
        return arena_bytes(self.size, self.dtype, training=self.training)


def arena_bytes(size: int, dtype: torch.dtype, *, training: bool) -> int:
    """Bytes of an arena of `size` elements: for --dry-run."""
    wide = torch.promote_types(dtype, torch.float32)
    extra = (3 if dtype == wide else 4) * wide.itemsize if training else 0
    return size * (dtype.itemsize + extra)
