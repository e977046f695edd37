"""The order of training windows: a pure function of (seed, i), with no state to save and no list to store.

Global window i is the j-th draw from some source s. Both come from i's round, a block of R windows:

    quotas      after r rounds source s has been drawn r*R*w_s times, rounded by largest remainder
    order       in a round, the k-th of a source's q draws stands at (k + u) / q, u uniform: every stretch of the
                order holds the sources in about their weights, without a pattern
    epochs      draw j is window permute(j mod W_s) of epoch j div W_s: each of the W_s windows once per epoch

Hence a longer run extends a shorter one, and resuming needs only i.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from hyperllama.data.shards import Shards
from hyperllama.data.tail import Tail
from hyperllama.errors import HyperLlamaError

ORDER = 1  # changes when the same seed would give another order; part of the fingerprint
ROUND = 1024  # windows; doubled until the smallest weight has a whole window in it, so that no quota is negative
SMALLEST_SHARE = 2.0**-20  # a round's order is a table in memory, 16 bytes a window
_FEISTEL_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Hash (N,) uint64 to (N,) uint64, one to one (Steele, Lea, Flood 2014, the output function of SplitMix64)."""
    x = (x + _GOLDEN).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray | int, n: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """Where a pseudo-random permutation of [0, n) sends `index`; int64, of the common shape of the arguments.

    A bijection for every (n, key): a Feistel network on pairs (l, r) of Z_a x Z_b with a*b just above n, walking the
    cycle until it is back below n (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    Raises IndexError for an index outside [0, n).
    """
    arrays = np.broadcast_arrays(*(np.asarray(value).astype(np.uint64) for value in (index, n, key)))
    shape = arrays[0].shape
    x, n, key = (array.reshape(-1) for array in arrays)
    if (x >= n).any():
        raise IndexError(f"an index to permute is not in [0, n), n = {n[np.argmax(x >= n)]}")
    a = np.sqrt(n - np.uint64(1)).astype(np.uint64) + np.uint64(1)
    x = _feistel(x, a, (n + a - np.uint64(1)) // a, key)
    while len(outside := np.flatnonzero(x >= n)):
        rows = a[outside]
        x[outside] = _feistel(x[outside], rows, (n[outside] + rows - np.uint64(1)) // rows, key[outside])
    return x.astype(np.int64).reshape(shape)


def _feistel(x: np.ndarray, a: np.ndarray, b: np.ndarray, key: np.ndarray) -> np.ndarray:
    """One pass of the network over x = l * b + r; a bijection of [0, a*b)."""
    left, right = x // b, x % b
    for i in range(_FEISTEL_ROUNDS):
        key = splitmix64(key)
        if i % 2 == 0:
            left = (left + splitmix64(right ^ key) % a) % a
        else:
            right = (right + splitmix64(left ^ key) % b) % b
    return left * b + right


@dataclass(frozen=True)
class Source:
    """One part of a mixture: its share is weight / sum of weights, of windows; `max_epochs` None means no limit."""

    name: str
    shards: Shards
    weight: float
    max_epochs: float | None = None


class Windows(ABC):
    """Windows of several sources in some order: what a run reads. Which source and window come i-th is a subclass's `locate`.

    Attributes: `sources`, `seq_len`, `windows` (windows in each source), `languages` (sorted tags), `eos_id`, `vocab_size`,
    `shares` (of each source, fractions), `fingerprint` (hex SHA-256 over all that decides the order and the tokens).
    Raises HyperLlamaError for sources that cannot be mixed, naming them.
    """

    shares: tuple[Fraction, ...]
    fingerprint: str
    tail: Tail | None = None

    def __init__(self, sources: Sequence[Source], seq_len: int) -> None:
        if not sources:
            raise HyperLlamaError("a mixture needs at least one source")
        if seq_len < 1:
            raise HyperLlamaError(f"seq_len must be at least 1, not {seq_len}")
        self.sources, self.seq_len = tuple(sources), seq_len
        tokenizer = sources[0].shards.manifest["tokenizer"]
        for source in sources:
            shards = source.shards
            if [other.name for other in sources].count(source.name) > 1:
                raise HyperLlamaError(f"two sources are named {source.name!r}: give each its own name")
            if not (math.isfinite(source.weight) and source.weight > 0):
                raise HyperLlamaError(f"source {source.name!r} has weight {source.weight}: it must be above 0")
            if shards.num_windows(seq_len) == 0:
                raise HyperLlamaError(
                    f"source {source.name!r} ({shards.path}) has {shards.tokens} tokens, fewer than one window of "
                    f"{seq_len + 1}: shorten seq_len or add text"
                )
            if shards.manifest["tokenizer"]["fingerprint"] != tokenizer["fingerprint"]:
                raise HyperLlamaError(f"{shards.path} and {sources[0].shards.path} were made with different tokenizers")
            if shards.eos_id != tokenizer["eos_id"]:
                raise HyperLlamaError(
                    f"documents end in other tokens in {shards.path} than in {sources[0].shards.path}"
                )
        self.windows = tuple(source.shards.num_windows(seq_len) for source in sources)
        self.languages = tuple(sorted({tag for source in sources for tag in source.shards.languages}))
        self.eos_id: int = tokenizer["eos_id"]
        self.vocab_size: int = tokenizer["vocab_size"]

    @abstractmethod
    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and window within it of each global window in `index` (N,); two (N,) int64 arrays."""

    @abstractmethod
    def counts(self, total_windows: int) -> np.ndarray:
        """Draws of each source in the first `total_windows` windows, (sources,) int64."""

    def describe(self, total_windows: int) -> dict[str, dict[str, Any]]:
        """What a run of `total_windows` takes from each source, by name.

        Keys: windows (drawn), tokens (targets, windows * T), epochs, available (windows in the source), share.
        """
        return {
            source.name: {
                "windows": int(count),
                "tokens": int(count) * self.seq_len,
                "epochs": int(count) / available,
                "available": available,
                "share": float(share),
            }
            for source, count, available, share in zip(
                self.sources, self.counts(total_windows), self.windows, self.shares, strict=True
            )
        }

    def check(self, total_windows: int) -> None:
        """Raise HyperLlamaError when a run of `total_windows` would pass a source's `max_epochs`."""
        for source, row in zip(self.sources, self.describe(total_windows).values(), strict=True):
            if source.max_epochs is not None and row["epochs"] > source.max_epochs:
                raise HyperLlamaError(
                    f"source {source.name!r} has {row['available']} windows of {self.seq_len + 1} tokens and may be "
                    f"read {source.max_epochs} times, but the run needs {row['windows']} ({row['epochs']:.2f} epochs): "
                    "lower its weight, shorten the run or raise max_epochs"
                )

    def language_tokens(self, source: np.ndarray, window: np.ndarray) -> np.ndarray:
        """Targets by language of located windows, (N, len(languages)) int64; each row sums to T."""
        out = np.zeros((len(source), len(self.languages)), dtype=np.int64)
        for s in np.unique(source):
            shards, rows = self.sources[s].shards, np.flatnonzero(source == s)
            columns = np.array([self.languages.index(tag) for tag in shards.languages])
            out[rows[:, None], columns] = shards.language_tokens(window[rows], self.seq_len)
        return out

    def tokens_by_language(self, first_window: int, count: int) -> dict[str, int]:
        """Targets by language in the global windows [first_window, first_window + count), without reading them."""
        total = np.zeros(len(self.languages), dtype=np.int64)
        for start in range(first_window, first_window + count, 1 << 16):
            index = np.arange(start, min(start + (1 << 16), first_window + count))
            total += self.language_tokens(*self.locate(index)).sum(0)
        return {tag: int(tokens) for tag, tokens in zip(self.languages, total, strict=True) if tokens}

    def token_counts(self, windows: int, alive: Callable[[], None] = lambda: None) -> dict[str, np.ndarray]:
        """How often each token id is a target in the first `windows` windows: language -> (vocab_size,) int64, exact.

        Reads the windows once more, some nanoseconds a token, and calls `alive` now and then: the counts are no state to keep
        through checkpoints and processes.
        """
        total = {tag: np.zeros(self.vocab_size, dtype=np.int64) for tag in self.languages}
        for start in range(0, windows, 1 << 12):
            alive()
            source, window = self.locate(np.arange(start, min(start + (1 << 12), windows)))
            for s in np.unique(source):
                shards = self.sources[s].shards
                for tag, counts in zip(
                    shards.languages, shards.token_counts(window[source == s], self.seq_len), strict=True
                ):
                    total[tag] += counts
        return {tag: counts for tag, counts in total.items() if counts.any()}


class Mixture(Windows):
    """Sources by their weights, each one's windows in another random order every epoch: see the top of the file.

    `tail`: of a stage as nanotron ends it.
    """

    def __init__(self, sources: Sequence[Source], seq_len: int, seed: int, tail: Tail | None = None) -> None:
        super().__init__(sources, seq_len)
        self.seed, self.tail = seed, tail
        weights = [Fraction(str(source.weight)) for source in sources]  # 0.1 means a tenth, not its nearest float
        self.shares = tuple(weight / sum(weights) for weight in weights)
        for source, share in zip(sources, self.shares, strict=True):
            if share < SMALLEST_SHARE:
                raise HyperLlamaError(f"source {source.name!r} has less than {SMALLEST_SHARE} of the weight: drop it")
        self._round = ROUND
        while self._round * min(self.shares) < 1:
            self._round *= 2
        self._order_key = _key(seed, "")
        self._keys = np.array([_key(seed, f"/{source.name}") for source in sources], dtype=np.uint64)
        self._last: tuple[int, np.ndarray, np.ndarray] | None = None

        parts: list[Any] = [ORDER, seed, seq_len]
        parts += [(s.name, str(share), s.shards.fingerprint) for s, share in zip(sources, self.shares, strict=True)]
        parts += [tail] if tail else []
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()

    def _quotas(self, total: int) -> np.ndarray:
        """Draws of each source in the first `total` windows, a multiple of the round; (sources,) int64, exact."""
        wanted = [total * share for share in self.shares]
        draws = [math.floor(value) for value in wanted]
        by_remainder = sorted(range(len(draws)), key=lambda s: (draws[s] - wanted[s], s))
        for s in by_remainder[: total - sum(draws)]:
            draws[s] += 1
        return np.array(draws, dtype=np.int64)

    def _order(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and draw of each window in a round; the last round asked for is kept."""
        last = self._last
        if last is None or last[0] != number:
            before = self._quotas(number * self._round)
            quotas = self._quotas((number + 1) * self._round) - before
            source = np.repeat(np.arange(len(quotas)), quotas)
            nth = np.arange(self._round) - (np.cumsum(quotas) - quotas)[source]
            key = splitmix64(np.array([number], np.uint64) ^ self._order_key)
            jitter = (splitmix64(np.arange(self._round, dtype=np.uint64) ^ key) >> np.uint64(11)) * 2.0**-53
            order = np.argsort((nth + jitter) / quotas[source], kind="stable")
            last = self._last = number, source[order], (before[source] + nth)[order]
        return last[1], last[2]

    def _draws(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and draw of each global window in `index`, (N,) int64."""
        if self.tail is not None:
            index = self.tail.windows_at(index)
        number, place = np.divmod(index, self._round)
        source, draw = np.empty_like(index), np.empty_like(index)
        for r in np.unique(number):
            here = number == r
            sources, draws = self._order(int(r))
            source[here], draw[here] = sources[place[here]], draws[place[here]]
        return source, draw

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and window within it of each global window in `index` (N,); two (N,) int64 arrays."""
        source, draw = self._draws(np.asarray(index, dtype=np.int64))
        windows = np.array(self.windows)[source]
        epoch, place = np.divmod(draw, windows)
        keys = splitmix64(self._keys[source] + epoch.astype(np.uint64) * _GOLDEN)
        return source, permute(place, windows, keys)

    def counts(self, total_windows: int) -> np.ndarray:
        """Draws of each source in the first `total_windows` windows, (sources,) int64."""
        ordinary = total_windows if self.tail is None else min(total_windows, self.tail.start)
        whole = ordinary // self._round
        rest, _ = self._draws(np.arange(whole * self._round, total_windows))
        return self._quotas(whole * self._round) + np.bincount(rest, minlength=len(self.sources))


def _key(seed: int, name: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.sha256(f"{seed}{name}".encode()).digest()[:8], "little"))
