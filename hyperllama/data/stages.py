"""Orders with a plan: stages that follow each other, and the loader order of the paper's trainer.

nanotron (as Glocker et al. 2025 ran it) reads a stage like this:

    files      of a source in a permutation by the stage's seed; windows of T+1 tokens, in order, none across files
    sources    greedy: next comes the source that is furthest behind its share; each window once
    tail       the stage's last step, which has too few windows, is filled up with copies (tail.py)

The first two are `Blend`; the third is an option of it, and hangs on the number of processes and the micro-batch of the run
that is repeated.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property

import numpy as np

from hyperllama.config import TailSettings
from hyperllama.data.mixture import Source, Windows
from hyperllama.data.shards import FileShards
from hyperllama.data.tail import Tail
from hyperllama.errors import HyperLlamaError

_BLOCK = 4096  # samples between two stored counts


def greedy_blend(sizes: Sequence[int]) -> np.ndarray:
    """Which source each of sum(sizes) samples comes from, (N,) uint8: the one with the largest deficit.

    At sample i that is share * max(i, 1) - taken, in fp64; of equal ones the first. Each source is taken `sizes` times.
    Some 0.2 microseconds a sample: it is computed once, when the first batch is read.
    """
    total = sum(sizes)
    if len(sizes) == 1:
        return np.zeros(total, dtype=np.uint8)
    shares = [size / total for size in sizes]
    taken, order = [0.0] * len(sizes), bytearray(total)
    others = range(1, len(sizes))
    for i in range(total):
        at = i or 1
        best, largest = 0, shares[0] * at - taken[0]
        for s in others:
            deficit = shares[s] * at - taken[s]
            if deficit > largest:
                best, largest = s, deficit
        taken[best] += 1.0
        order[i] = best
    return np.frombuffer(order, dtype=np.uint8)


class Blend(Windows):
    """Every window of the sources once, in nanotron's order: see the top of the file.

    `length`: windows there are; with a tail, rows: whole batches of `global_batch`. Weights of the sources are not used.
    """

    def __init__(
        self, sources: Sequence[Source], seq_len: int, seed: int, global_batch: int, tail: TailSettings | None = None
    ) -> None:
        super().__init__([replace(source, shards=FileShards(source.shards, seed)) for source in sources], seq_len)
        self.samples = sum(self.windows)
        self.shares = tuple(Fraction(windows, self.samples) for windows in self.windows)
        self.filled = None if tail is None else Tail(self.samples, global_batch, tail.processes, tail.micro_batch)
        self.length = self.samples if self.filled is None else self.filled.computed
        made_of = [(source.name, source.shards.fingerprint) for source in self.sources]
        parts = ("nanotron", seed, seq_len, global_batch, tail and tail.model_dump(), made_of)
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()

    @cached_property
    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        """The source of every sample, and how often each source was taken before every block of _BLOCK samples."""
        order = greedy_blend(self.windows)
        width = len(self.sources)
        counts = [np.bincount(order[low : low + _BLOCK], minlength=width) for low in range(0, len(order), _BLOCK)]
        return order, np.cumsum([np.zeros(width, dtype=np.int64), *counts], axis=0)

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and window within it (in the order of its permuted files) of each row in `index` (N,)."""
        index = np.asarray(index, dtype=np.int64)
        if len(index) and not (index.min() >= 0 and index.max() < self.length):
            raise IndexError(f"rows outside the {self.length} of a stage")
        if self.filled is not None:
            index = self.filled.windows_at(index)
        order, before = self._order
        source = order[index].astype(np.int64)
        window = np.empty_like(index)
        for block in np.unique(index // _BLOCK):
            here = np.flatnonzero(index // _BLOCK == block)
            taken = order[block * _BLOCK : (block + 1) * _BLOCK] == np.arange(len(self.sources))[:, None]
            rank = before[block][:, None] + np.cumsum(taken, axis=1) - 1
            window[here] = rank[source[here], index[here] - block * _BLOCK]
        return source, window

    def counts(self, total_windows: int) -> np.ndarray:
        """Rows of each source in the first `total_windows`, (sources,) int64; copies count."""
        order, before = self._order
        plain = total_windows if self.filled is None else min(total_windows, self.filled.start)
        block = plain // _BLOCK
        rest = order[block * _BLOCK : plain]
        beyond = order[:0] if self.filled is None else order[self.filled.windows_at(np.arange(plain, total_windows))]
        return before[block] + np.bincount(np.concatenate([rest, beyond]), minlength=len(self.sources))

    def check(self, total_windows: int) -> None:
        """Raise HyperLlamaError when a run of `total_windows` needs more than there are."""
        if total_windows > self.length:
            names = ", ".join(source.name for source in self.sources)
            raise HyperLlamaError(
                f"order nanotron reads each window once: {names} have {self.length:,}"
                f"{' rows, the filled last step included' if self.filled is not None else ''}, but {total_windows:,} are needed: "
                "shorten the run or the stage, or add a stage"
            )


class Stages(Windows):
    """Orders one after another: stage k is read from global window `firsts[k]` on, from its own window 0."""

    def __init__(self, stages: Sequence[Windows], firsts: Sequence[int]) -> None:
        self.stages, self.firsts = tuple(stages), np.array(firsts, dtype=np.int64)
        sources = [
            replace(source, name=f"stage {number}: {source.name}")
            for number, stage in enumerate(stages, 1)
            for source in stage.sources
        ]
        super().__init__(sources, stages[0].seq_len)
        self.shares = tuple(share for stage in stages for share in stage.shares)
        parts = [*zip(map(int, self.firsts), (stage.fingerprint for stage in stages), strict=True)]
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()
        self._offsets = np.cumsum([0, *(len(stage.sources) for stage in stages)])

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source (counted through all stages) and window within it of each global window in `index` (N,)."""
        index = np.asarray(index, dtype=np.int64)
        of = np.searchsorted(self.firsts, index, side="right") - 1
        source, window = np.empty_like(index), np.empty_like(index)
        for stage in np.unique(of):
            here = of == stage
            source[here], window[here] = self.stages[stage].locate(index[here] - self.firsts[stage])
            source[here] += self._offsets[stage]
        return source, window

    def _lengths(self, total_windows: int) -> list[int]:
        """Windows of each stage in the first `total_windows`."""
        ends = np.append(self.firsts[1:], max(total_windows, int(self.firsts[-1])))
        return np.maximum(np.minimum(ends, total_windows) - self.firsts, 0).tolist()

    def counts(self, total_windows: int) -> np.ndarray:
        """Draws of each source of each stage in the first `total_windows` windows, (sources,) int64."""
        lengths = zip(self.stages, self._lengths(total_windows), strict=True)
        return np.concatenate([stage.counts(length) for stage, length in lengths])

    def check(self, total_windows: int) -> None:
        """Raise HyperLlamaError when a stage can't give the windows that a run of `total_windows` wants of it."""
        for number, (stage, length) in enumerate(zip(self.stages, self._lengths(total_windows), strict=True), 1):
            try:
                stage.check(length)
            except HyperLlamaError as error:
                raise HyperLlamaError(f"stage {number}: {error}") from None
