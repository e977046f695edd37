"""The processes of a run: torchrun's environment, one collective library, whole-buffer reductions. No engine of our own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hyperllama.errors import HyperLlamaError


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_ints(self, values: list[int]) -> list[int]:
        """Sum host integers over all processes, exactly."""
        if self.world == 1:
            return values
        return [int(v) for v in self.sum_(torch.tensor(values, dtype=torch.int64)).tolist()]

    def largest_int(self, value: int) -> int:
        """The largest of a host integer over all processes."""
        if self.world == 1:
            return value
        held = torch.tensor(value)
        dist.all_reduce(held, dist.ReduceOp.MAX)
        return int(held)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            dist.barrier()


def pick_device(setting: str, local_rank: int = 0) -> torch.device:
    """The device of a `device: auto|cpu|cuda` setting."""
    if setting == "cuda" and not torch.cuda.is_available():
        raise HyperLlamaError(
            "device is cuda, but torch sees no CUDA device: set device=cpu or install a CUDA build of torch"
        )
    if setting == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the run's processes (torchrun sets RANK, WORLD_SIZE, LOCAL_RANK); alone without torchrun."""
    world, rank, local = (
        int(os.environ.get(key, default)) for key, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
    )
    picked = pick_device(device, local)
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    if world == 1 or dist.is_initialized():
        yield Processes(rank, world, picked)
        return
    # integers of the host go through Gloo: asking for them must not wait for the GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo")
    try:
        yield Processes(rank, world, picked)
    finally:
        dist.destroy_process_group()
