"""The ops of merge.py and grow.py on memory and files as they are, without torch: one binding per function of csrc.

A tensor is an address, a dtype by name, and its elements. A result goes to an address, or to a place in an open file, which it
reaches through a buffer that stays in a cache, hashed (hashing.py) and checked for NaN and infinity on the way.

    unfold: what a grown matrix' copies sum to: max over i, c of |sum_{j: cols[j] = c} out[i, j] - W[rows[i], c]|

is the test of growth that keeps the function: consumers of equal inputs see the sum of their copies' weights and nothing else.
"""

from collections.abc import Sequence
from ctypes import Structure, byref, c_double, c_int, c_int32, c_int64, c_uint64, c_void_p
from os import strerror
from typing import Any, NamedTuple

from hyperllama.errors import HyperLlamaError
from hyperllama.kernels.native import csrc, threads
from hyperllama.keys import key_of

DTYPES = ("float32", "bfloat16", "float16")
RESCALE = ("none", "density", "norm")
SMALLEST_DIVISOR = 1e-8
MIN_NOISE_DB = 4.78  # sqrt(3) * 10^(-dB/20) <= 1 keeps the larger share at most S


def task_divisor(weights: Sequence[float]) -> float:
    """What `normalize` divides the sum of task vectors by."""
    total = sum(weights)
    return total if abs(total) >= SMALLEST_DIVISOR else 1.0


class Raw(NamedTuple):
    """A tensor in memory: contiguous, kept alive by its owner."""

    address: int
    dtype: str
    elements: int


class Target(Structure):
    """Where a result goes, see csrc/target.h: `Target(data=address)`, or `Target(fd=file, offset=bytes)`.

    Afterwards `finite` says whether all of it is; for a file `hash` is that of the content.
    """

    _fields_ = (
        ("data", c_void_p),
        ("offset", c_int64),
        ("hash", c_uint64),
        ("fd", c_int32),
        ("finite", c_int32),
        ("error", c_int32),
        ("unused", c_int32),
    )

    def __init__(self, **fields: int):
        super().__init__(finite=1, **fields)

    def raise_for_error(self) -> None:
        """Raise OSError when the file could not be written."""
        if self.error:
            raise OSError(self.error, strerror(self.error))


class Calls:
    """Inputs of a merge as csrc takes them: models, then the base or a null pointer; `hashes` gets one of each where wanted."""

    def __init__(self, base: Raw | None, tensors: Sequence[Raw]):
        held = [*tensors, *([] if base is None else [base])]
        size = len(tensors) + 1
        self.count, self.elements = len(tensors), held[0].elements
        self.pointers = (c_void_p * size)(*[tensor.address for tensor in held])
        self.dtypes = (c_int * size)(*[DTYPES.index(tensor.dtype) for tensor in held])
        self.hashes = (c_uint64 * size)()

    def merge(
        self, out: Target, out_dtype: str, *, weights: Sequence[float], divisor: float, densities: Sequence[float] = (),
        keys: Sequence[int] = (), lam: float = 1.0, normalize: bool = False, rescale: str = "none", elect: bool = False,
        hashed: bool = False,
    ) -> None:  # fmt: skip
        """linear (no base), task_arithmetic or ties (elect) of merge.py into `out`."""
        csrc("merge")(
            self.pointers, self.dtypes, self.hashes if hashed else None, c_int64(self.count), c_int64(self.elements),
            (c_double * self.count)(*weights), (c_double * self.count)(*densities), (c_uint64 * self.count)(*keys),
            2 if keys else int(bool(densities)), RESCALE.index(rescale), int(elect), int(normalize), c_double(divisor),
            c_double(lam), byref(out), DTYPES.index(out_dtype), threads(),
        )  # fmt: skip
        out.raise_for_error()

    def gram(self, out: Any, *, hashed: bool = False) -> None:
        """gram of merge.py into the count x count doubles at `out`."""
        csrc("merge_gram")(
            self.pointers, self.dtypes, self.hashes if hashed else None, c_int64(self.count), c_int64(self.elements),
            out, threads(),
        )  # fmt: skip


def half_range(noise_db: float) -> float:
    """Half the range of u, the noise's share of what two copies share (see grow.py)."""
    return 0.5 * 3**0.5 * 10 ** (-noise_db / 20)


def check_noise(noise_db: float | None) -> None:
    """Raise HyperLlamaError when the noise is no number or too loud to keep the pairs' sums exact."""
    if noise_db is not None and not noise_db >= MIN_NOISE_DB:
        raise HyperLlamaError(
            f"noise of {noise_db} dB is too loud: at least {MIN_NOISE_DB} dB keeps the function exact"
        )


def noise_key(seed: int, name: str) -> int:
    """The key of a tensor's noise."""
    return key_of("grow", seed, name)


def grow(
    source: Raw, out: Target, rows: int, cols: int, row_copies: int, col_copies: int, divisor: float,
    half: float | None, key: int,
) -> None:  # fmt: skip
    """grow of grow.py, or plain tiles with `divisor` 1; `half` is half the range of the noise, None for none."""
    csrc("grow")(
        int(source.dtype == "bfloat16"), c_void_p(source.address), byref(out), c_int64(rows), c_int64(cols),
        c_int64(row_copies), c_int64(col_copies), c_double(divisor), c_double(half or 0.0),
        int(half is not None), c_uint64(key), threads(),
    )  # fmt: skip
    out.raise_for_error()


def remap(source: Raw, out: Target, width: int, rows: int, height: int, cols: int, n: int, scale: int | None) -> None:
    """remap of grow.py: `width` columns of source; addresses of `height` rows, `n` columns (int64) and scales (fp32)."""
    csrc("remap")(
        int(source.dtype == "bfloat16"), c_void_p(source.address), byref(out), c_int64(width), c_void_p(rows),
        c_int64(height), c_void_p(cols), c_int64(n), c_void_p(scale), threads(),
    )  # fmt: skip
    out.raise_for_error()


def unfold(
    source: Raw, grown: Raw, width: int, rows: int, height: int, cols: int | None, n: int
) -> tuple[float, float]:
    """(largest difference, largest magnitude), in fp64, as the top of the file says; no `cols`: tiles."""
    result = (c_double * 2)()
    csrc("unfold")(
        int(source.dtype == "bfloat16"), c_void_p(source.address), c_void_p(grown.address), c_int64(width),
        c_void_p(rows), c_int64(height), c_void_p(cols), c_int64(n), result, threads(),
    )  # fmt: skip
    return result[0], result[1]
