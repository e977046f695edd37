"""The processes of a run: torchrun's environment, one collective library, whole-buffer reductions. No engine of our own."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from hyperllama.errors import HyperLlamaError, Lost
from hyperllama.train.watchdog import Watchdog


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    world: int
    device: torch.device
    watchdog: Watchdog | None = None

    def doing(self, step: int, operation: str) -> None:
        """Note what this process begins, for the sentence about a run that hangs."""
        if self.watchdog is not None:
            self.watchdog.doing(step, operation)

    def alive(self) -> None:
        """Note that a long operation of this process goes on."""
        if self.watchdog is not None:
            self.watchdog.alive()

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

    def micro_batches(self, windows: int, micro_batch: int) -> list[int]:
        """Micro-batches of every process for a batch of `windows`, shared as the loader does."""
        borders = [windows * rank // self.world for rank in range(self.world + 1)]
        return [-(-(stop - start) // micro_batch) for start, stop in pairwise(borders)]


def pick_device(setting: str, local_rank: int = 0) -> torch.device:
    """The device of a `device: auto|cpu|cuda` setting for process `local_rank` of this machine.

    Raises HyperLlamaError when there is no CUDA device, or none for this process.
    """
    if setting == "cuda" and not torch.cuda.is_available():
        raise HyperLlamaError(
            "device is cuda, but torch sees no CUDA device: set device=cpu or install a CUDA build of torch"
        )
    if setting == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= (devices := torch.cuda.device_count()):
        raise HyperLlamaError(
            f"process {local_rank + 1} of this machine has no CUDA device, torch sees {devices}: "
            f"start {devices} (torchrun --nproc-per-node={devices}), or set device=cpu"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Have torch choose, or demand, algorithms that give the same bits every time; as before afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:  # cuBLAS reads this when it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def meet(store: dist.Store, rank: int, world: int, seconds: float) -> str:
    """A name that the processes which are here now agree on, and none before them had.

    torchrun keeps its store when it restarts processes, with the addresses of those before in it; and when one node of several
    restarts, the others' counts of restarts stay behind. So everybody leaves a word, the first process repeats all words with one
    of its own, and who finds his word there says so: what dead processes have left is not repeated.
    Raises Lost, naming them, when processes do not come within `seconds`.
    """
    word, deadline = uuid4().hex, time.monotonic() + seconds
    store.set(f"word {rank}", word)

    def heard(keys: list[str]) -> list[str | None]:
        return [store.get(key).decode() if store.check([key]) else None for key in keys]

    while time.monotonic() < deadline:
        if rank == 0:
            words = heard([f"word {r}" for r in range(world)])
            store.set("all words", json.dumps(words))
            missing = [r for r, said in enumerate(heard([f"{word} {r}" for r in range(1, world)]), 1) if said is None]
            if not missing:
                return word
        else:
            (told,) = heard(["all words"])
            words, missing = json.loads(told) if told else [None] * world, [0]
            if len(words) == world and words[rank] == word and words[0]:
                store.set(f"{words[0]} {rank}", "here")
                return str(words[0])
        time.sleep(0.02)
    raise Lost(f"{', '.join(f'rank {r}' for r in missing)} did not come within {seconds:.0f} seconds")


@contextmanager
def processes(device: str, seconds: float) -> Iterator[Processes]:
    """Join the run's processes (torchrun sets RANK, WORLD_SIZE, LOCAL_RANK); alone without torchrun.

    A process that does not come to an operation of the loop within `seconds` ends the run: see watchdog.py.
    Raises Lost when another process is gone.
    """
    world, rank, local = (
        int(os.environ.get(key, default)) for key, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
    )
    picked = pick_device(device, local)
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    if world == 1 or dist.is_initialized():
        yield Processes(rank, world, picked)
        return
    store, rank, world = next(rendezvous("env://"))
    store = dist.PrefixStore(meet(store, rank, world, max(300.0, seconds)), store)
    # integers of the host go through Gloo: asking for them must not wait for the GPU. The library's own time limit is the last
    # resort: before the loop, one process may check the data's hashes for long
    backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo"
    limit = timedelta(seconds=max(1800.0, 2 * seconds))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    with Watchdog(store, rank, world, seconds) as watchdog:
        try:
            yield Processes(rank, world, picked, watchdog)
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
                raise watchdog.lost(error) from error
            raise
    dist.destroy_process_group()
