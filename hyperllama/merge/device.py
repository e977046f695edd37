"""Merges folders on a GPU, with copies and files beside the arithmetic: three threads, each with a stream of its own.

    loads     memory map -> two pinned pieces in turn -> GPU       the next step's tensors, hashed on the way
    merges    the ops of kernels/merge.py, on whole tensors        one launch of Triton for most methods
    stores    GPU -> pinned memory -> file                         the result before, hashed

Memory on the GPU: the inputs of two steps, and two results. Pinned memory: two pieces and the largest result.
Not run on a GPU yet; on a CPU (device "cpu", for tests) the threads do the same without streams and pinned memory.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hyperllama.dtypes import BYTES
from hyperllama.errors import HyperLlamaError
from hyperllama.hub import Folder, FolderWriter
from hyperllama.kernels.hashing import hash_bytes
from hyperllama.merge.executor import Hashes
from hyperllama.merge.steps import Step
from hyperllama.merge.tensors import merged
from hyperllama.weights import hex_hash

PIECE = 64 << 20  # bytes


def device_named(name: str) -> torch.device:
    """The device of a name such as cuda or cuda:1. Raises HyperLlamaError when this machine has none."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise HyperLlamaError(f"{name!r} is no device: cpu, cuda or cuda:N was expected") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise HyperLlamaError(f"device {name}: this machine has {torch.cuda.device_count()} GPUs that torch can use")
    return device


class _Lane:
    """A stream and pinned memory of one thread's copies; on a CPU plain memory, and everything is done when a call returns."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copies(self) -> AbstractContextManager[Any]:
        """Inside, the stream is the current one."""
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    def memory(self, n_bytes: int) -> Tensor:
        """Host memory that copies do not wait for."""
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self.stream is not None)

    def event(self) -> Any:
        """What has been asked of the current stream so far; None on a CPU."""
        return torch.cuda.current_stream(self.device).record_event() if self.stream else None


class _Inputs(NamedTuple):
    """A step's inputs on the device, once `ready` has happened, and their hashes."""

    tensors: dict[str, dict[str, Tensor]]
    hashes: Hashes
    ready: Any


class _Model(dict[str, Tensor]):
    """One model's tensors as `merged` asks for them."""

    def tensor(self, name: str) -> Tensor:
        return self[name]


class _Loader:
    def __init__(self, device: torch.device, folders: dict[str, Folder]):
        self.lane, self.folders = _Lane(device), folders
        self.pieces = [(self.lane.memory(PIECE), None) for _ in range(2)]

    def load(self, step: Step) -> _Inputs:
        tensors: dict[str, dict[str, Tensor]] = {}
        hashes: Hashes = {}
        with self.lane.copies():
            for read in step.reads:
                content = self.folders[read.model].bytes(read.tensor)
                dtype = getattr(torch, self.folders[read.model].dtype(read.tensor))
                on_device = torch.empty(step.shape, dtype=dtype, device=self.lane.device)
                self._copy(content, on_device.view(-1).view(torch.uint8))
                tensors.setdefault(read.model, _Model())[read.tensor] = on_device
                hashes.setdefault(read.model, {})[read.tensor] = hex_hash(hash_bytes(content))
            return _Inputs(tensors, hashes, self.lane.event())

    def _copy(self, content: memoryview, to: Tensor) -> None:
        for at in range(0, len(content), PIECE):
            memory, busy = self.pieces.pop(0)
            if busy is not None:
                busy.synchronize()
            part = content[at : at + PIECE]
            np.copyto(memory.numpy()[: len(part)], part)
            to[at : at + len(part)].copy_(memory[: len(part)], non_blocking=True)
            self.pieces.append((memory, self.lane.event()))


class _Storer:
    def __init__(self, device: torch.device, writer: FolderWriter, largest: int):
        self.lane, self.writer = _Lane(device), writer
        self.memory = self.lane.memory(largest)

    def store(self, step: Step, result: Tensor, ready: Any) -> str:
        """Write a result once `ready` has happened; returns its hash."""
        content = result.contiguous().view(-1).view(torch.uint8)
        host = self.memory[: len(content)]
        with self.lane.copies():
            if self.lane.stream:
                self.lane.stream.wait_event(ready)
                content.record_stream(self.lane.stream)
            host.copy_(content, non_blocking=True)
            if self.lane.stream:
                self.lane.stream.synchronize()
        return self.writer.write(step.name, host.numpy())


def merge_on(
    device: torch.device, steps: Sequence[Step], folders: dict[str, Folder], writer: FolderWriter
) -> Iterator[Hashes]:
    """Carry out steps into their places, in order; yields, step by step once it is written, the hashes of what it read.

    Raises HyperLlamaError when a result is not finite.
    """
    if not steps:
        return
    loader = _Loader(device, folders)
    storer = _Storer(device, writer, max(prod(step.shape) * BYTES[step.dtype] for step in steps))
    with ThreadPoolExecutor(1) as loads, ThreadPoolExecutor(1) as stores:
        coming = loads.submit(loader.load, steps[0])
        before: tuple[Step, Hashes, Future[str]] | None = None
        for i, step in enumerate(steps):
            inputs = coming.result()
            if i + 1 < len(steps):
                coming = loads.submit(loader.load, steps[i + 1])
            if inputs.ready is not None:
                compute = torch.cuda.current_stream(device)
                compute.wait_event(inputs.ready)
                for model in inputs.tensors.values():
                    for tensor in model.values():
                        tensor.record_stream(compute)
            result = merged(step, inputs.tensors)
            stored = stores.submit(storer.store, step, result, storer.lane.event())
            if before is not None:
                yield _finish(writer, *before)
            before = step, inputs.hashes, stored
        assert before is not None
        yield _finish(writer, *before)


def _finish(writer: FolderWriter, step: Step, hashes: Hashes, stored: "Future[str]") -> Hashes:
    writer.finish(step.name, stored.result(), reads=hashes)
    return hashes
