"""Files of weights without torch: safetensors headers, tensors over memory maps, and weights written in place.

file      8 bytes: length of the header; the header, JSON: name -> dtype, shape, data_offsets; the tensors, back to back
writing   headers first, files at their full size; then tensor after tensor to its place, each noted in a journal. What a
          killed process left goes on from there: tensors in the journal whose bytes have the noted hash are kept.
"""

import json
import mmap
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hyperllama.dtypes import BYTES, SAFETENSORS
from hyperllama.errors import HyperLlamaError
from hyperllama.kernels.hashing import hash_bytes
from hyperllama.kernels.native import address
from hyperllama.kernels.raw import Raw, Target

if TYPE_CHECKING:  # numpy is imported by what computes with it: merging folders does not
    import numpy as np

    from hyperllama.kernels.hashing import Bytes

SHARD_BYTES = 5 * 10**9  # as the field's tools cut them
MOST_HEADER = 100 << 20  # bytes; the format's own limit
JOURNAL = "journal"
_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
_SIZES |= {code: BYTES[name] for code, name in SAFETENSORS.items()}
_CODES = {name: code for code, name in SAFETENSORS.items()}


class Entry(NamedTuple):
    """A tensor of a file: the code of its dtype, its shape, and where its bytes are in the file."""

    code: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file opened for reading: the header now, the tensors over a memory map when they are asked for.

    Raises HyperLlamaError naming the file when it is missing, cut off, or not what its header says.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or not 0 < length <= min(size - 8, MOST_HEADER):
                    raise ValueError("its header is longer than the file")
                header = json.loads(file.read(length))
            self.entries = _entries(header, 8 + length, size)
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
        ) as error:  # JSON and UTF-8 errors are ValueErrors
            reason = error.strerror if isinstance(error, OSError) else error
            raise HyperLlamaError(f"{path} is damaged or not a safetensors file: {reason}") from None

    @cached_property
    def _map(self) -> mmap.mmap:
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @cached_property
    def _address(self) -> int:
        return address(self._map)

    def dtype(self, name: str) -> str:
        """The dtype by name. Raises HyperLlamaError for one that is no floating-point format of weights."""
        code = self.entries[name].code
        if code not in SAFETENSORS:
            raise HyperLlamaError(
                f"{self.path}: tensor {name} has dtype {code}; weights must be one of {', '.join(SAFETENSORS)}"
            )
        return SAFETENSORS[code]

    def bytes(self, name: str) -> memoryview:
        """A tensor's bytes, over the memory map."""
        entry = self.entries[name]
        return memoryview(self._map)[entry.begin : entry.end]

    def raw(self, name: str) -> Raw:
        """A tensor as the kernels take it; valid while this file is."""
        entry = self.entries[name]
        return Raw(self._address + entry.begin, self.dtype(name), prod(entry.shape))

    def expect(self, name: str, most: int) -> None:
        """Have the first `most` bytes of a tensor read from disk, without waiting for them."""
        entry = self.entries[name]
        begin = entry.begin // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, begin, min(entry.end - begin, most))


def _entries(header: dict[str, Any], start: int, size: int) -> dict[str, Entry]:
    """The tensors of a header. Raises ValueError, TypeError, KeyError or AttributeError when it is not one of `size` bytes."""
    entries: dict[str, Entry] = {}
    for name, value in header.items():
        if name == "__metadata__":
            continue
        begin, end = value["data_offsets"]
        shape = tuple(value["shape"])
        if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
            raise ValueError(f"tensor {name} has no shape and place in whole numbers")
        entry = Entry(str(value["dtype"]), shape, start + begin, start + end)
        if entry.code in _SIZES and end - begin != prod(shape) * _SIZES[entry.code]:
            raise ValueError(f"tensor {name} has {end - begin} bytes, its shape {shape} asks for others")
        entries[name] = entry
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin != at or entry.end < at:
            raise ValueError(f"tensor {name} is not where the one before it ends")
        at = entry.end
    if at != size:
        raise ValueError(f"it has {size} bytes, its header asks for {at}")
    return entries


class NewTensor(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * BYTES[self.dtype]


def shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names of tensors cut into files of at most SHARD_BYTES, a larger tensor alone, in order; sizes in bytes."""
    files: list[list[str]] = [[]]
    size = 0
    for name, n_bytes in sizes.items():
        if files[-1] and size + n_bytes > SHARD_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += n_bytes
    return files


def shard_names(count: int) -> list[str]:
    """Names of the files of a model in `count` shards."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def shard_index(files: Sequence[Sequence[str]], total: int) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    places = {name: file for file, names in zip(shard_names(len(files)), files, strict=True) for name in names}
    return {"metadata": {"total_size": total}, "weight_map": places}


class WeightsWriter:
    """The weights of a new model folder, written in place into files that have their full size from the start.

    tensors: all of them, in order. job: what names the work; a journal of the same job in `folder` is gone on with, and the
    records of tensors that it finished and that are still whole are in `done`. Raises OSError when the disk has no room.
    """

    def __init__(self, folder: Path, tensors: Sequence[NewTensor], job: str):
        self.folder, self.tensors = folder, {tensor.name: tensor for tensor in tensors}
        self.shards = shards({tensor.name: tensor.n_bytes for tensor in tensors})
        self.done: dict[str, dict[str, Any]] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._files = [self._create(folder / file, names) for file, names in self._named_shards()]
        if journal_job(folder) == job:
            self._keep_finished()
        with open(folder / JOURNAL, "w", encoding="utf-8") as file:  # without the line that a kill cut off
            file.writelines(json.dumps(line) + "\n" for line in [{"job": job}, *self.done.values()])
        self._journal = open(folder / JOURNAL, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def _named_shards(self) -> list[tuple[str, list[str]]]:
        return list(zip(shard_names(len(self.shards)), self.shards, strict=True))

    def _create(self, path: Path, names: list[str]) -> int:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in sorted(
            names, key=lambda name: -BYTES[self.tensors[name].dtype]
        ):  # wider dtypes first: all are aligned
            tensor = self.tensors[name]
            places = [at, at + tensor.n_bytes]
            header[name] = {"dtype": _CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": places}
            at += tensor.n_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.posix_fallocate(descriptor, 0, 8 + len(text) + at)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        os.pwrite(descriptor, len(text).to_bytes(8, "little") + text, 0)
        for name in names:
            self._places[name] = (descriptor, 8 + len(text) + header[name]["data_offsets"][0])
        return descriptor

    def _keep_finished(self) -> None:
        for line in (self.folder / JOURNAL).read_text(encoding="utf-8").splitlines()[1:]:
            try:
                record = json.loads(line)
                if self.content(record["name"])[1] == record["hash"]:
                    self.done[record["name"]] = record
            except (ValueError, KeyError):
                continue

    def target(self, name: str) -> Target:
        """Where a kernel writes a tensor to."""
        descriptor, offset = self._places[name]
        return Target(fd=descriptor, offset=offset)

    def write(self, name: str, data: "Bytes") -> str:
        """Write a tensor that was made in memory; returns its hash."""
        descriptor, offset = self._places[name]
        view, done = data.data, 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], offset + done)
        return hex_hash(hash_bytes(data))

    def content(self, name: str) -> tuple[memoryview, str]:
        """The bytes of a tensor as they are in the file now, over a memory map, and their hash."""
        descriptor, offset = self._places[name]
        begin = offset // mmap.PAGESIZE * mmap.PAGESIZE
        size = self.tensors[name].n_bytes
        mapped = mmap.mmap(descriptor, offset - begin + size, access=mmap.ACCESS_READ, offset=begin)
        data = memoryview(mapped)[offset - begin :]
        return data, hex_hash(hash_bytes(data))

    def finish(self, name: str, digest: str, **notes: Any) -> None:
        """Note a tensor as written, with its hash and what else is to be known after a kill."""
        self.done[name] = {"name": name, "hash": digest, **notes}
        self._journal.write(json.dumps(self.done[name]) + "\n")
        self._journal.flush()

    def hashes(self) -> dict[str, str]:
        """Every tensor's hash, by name."""
        return {name: self.done[name]["hash"] for name in self.tensors}

    def close(self) -> None:
        """Close the files; without it nothing may be renamed."""
        self._journal.close()
        for descriptor in self._files:
            os.close(descriptor)


def journal_job(folder: Path) -> str | None:
    """The job of the journal in a folder; None without one."""
    try:
        with open(folder / JOURNAL, encoding="utf-8") as file:
            return str(json.loads(file.readline())["job"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def hex_hash(value: int) -> str:
    """A 64-bit hash as it is written."""
    return f"{value:016x}"


def widened(data: "Bytes | memoryview", dtype: str) -> "np.ndarray[Any, Any]":
    """Bytes of a tensor as fp32 (fp64 for fp64), flat."""
    import numpy as np

    if dtype == "bfloat16":
        return (np.frombuffer(data, "<u2").astype("<u4") << np.uint32(16)).view("<f4")
    numbers = np.frombuffer(data, {"float16": "<f2", "float32": "<f4", "float64": "<f8"}[dtype])
    return numbers.astype("<f4") if dtype == "float16" else numbers


def narrowed(numbers: "np.ndarray[Any, Any]", dtype: str) -> "Bytes":
    """The inverse of `widened`, rounded to nearest even; NaN stays NaN."""
    import numpy as np

    if dtype == "bfloat16":
        bits = np.ascontiguousarray(numbers, "<f4").view("<u4")
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
        return (
            np.where(np.isnan(numbers), (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype("<u2").view(np.uint8)
        )
    with np.errstate(over="ignore"):
        kind = {"float16": "<f2", "float32": "<f4", "float64": "<f8"}[dtype]
        return np.ascontiguousarray(numbers).astype(kind).view(np.uint8)
