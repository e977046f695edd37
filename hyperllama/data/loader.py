"""Batches: global windows [first, first + count) as tensors, this rank's slice of them.

The slices of all ranks, in rank order, are the global batch, for every number of ranks. With fewer windows than
ranks some slices are empty: shapes (0, T).
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from hyperllama.data.mixture import Windows
from hyperllama.errors import HyperLlamaError

IGNORE = -100  # a target that has no loss


@dataclass(frozen=True)
class Batch:
    """B windows on the CPU.

    ids, targets: (B, T) int64; a target is the next token, or IGNORE. window_ids: (B,) int64, global.
    cu_seqlens: None, or int32 borders of the documents in the flattened ids: 0, ..., B*T, strictly increasing.
    language_tokens: (B, len(languages)) int64, targets by language of their document; ignored ones count too.
    """

    ids: Tensor
    targets: Tensor
    window_ids: np.ndarray
    cu_seqlens: Tensor | None
    languages: tuple[str, ...]
    language_tokens: np.ndarray

    @property
    def tokens_by_language(self) -> dict[str, int]:
        """Targets by language; they sum to B*T."""
        totals = self.language_tokens.sum(0).tolist()
        return {tag: total for tag, total in zip(self.languages, totals, strict=True) if total}


class Loader:
    """Batches of a mixture for rank `rank` of `world`; while one is used the next is read in a background thread.

    documents: give cu_seqlens, with a border at every window and after every EOS.
    mask_first_token_of_document: no loss for predicting a document's first token from what stood before it.
    pin_memory: put ids and targets into page-locked memory, so that copies to a GPU can overlap with its work.
    Close it, or use it as a context manager.
    """

    def __init__(
        self,
        mixture: Windows,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        *,
        documents: bool = False,
        mask_first_token_of_document: bool = False,
        pin_memory: bool = False,
    ) -> None:
        if global_batch < 1 or not 0 <= rank < world:
            raise HyperLlamaError(f"no batches of {global_batch} windows for rank {rank} of {world}")
        self.mixture, self.global_batch, self.rank, self.world = mixture, global_batch, rank, world
        self.documents, self.mask_first = documents, mask_first_token_of_document
        self.pin_memory = pin_memory
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._next: tuple[int, int, Future[Batch]] | None = None

    def batch(self, first_window: int, count: int | None = None) -> Batch:
        """This rank's slice of the global windows [first_window, first_window + count); count: default global_batch.

        A pure function of its arguments: any order, any number of times. Raises what reading the windows raises.
        """
        count = self.global_batch if count is None else count
        if first_window < 0 or count < 0:
            raise ValueError(f"no windows [{first_window}, {first_window} + {count})")
        ready, self._next = self._next, None  # a failed read is not kept: asking again reads again
        batch = (
            ready[2].result()
            if ready is not None and ready[:2] == (first_window, count)
            else self._read(first_window, count)
        )
        following = first_window + count
        self._next = following, count, self._thread.submit(self._read, following, count)
        return batch

    def _read(self, first_window: int, count: int) -> Batch:
        low, high = (first_window + count * r // self.world for r in (self.rank, self.rank + 1))
        window_ids = np.arange(low, high)
        source, window = self.mixture.locate(window_ids)
        seq_len = self.mixture.seq_len
        tokens = np.empty((len(window_ids), seq_len + 1), dtype=np.int64)
        for s in np.unique(source):
            rows = np.flatnonzero(source == s)
            tokens[rows] = self.mixture.sources[s].shards.windows(window[rows], seq_len)
        ids, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        cu_seqlens = None
        if self.documents:
            border = np.zeros(ids.size + 1, dtype=bool)
            border[::seq_len] = True
            border[1:] |= ids.reshape(-1) == self.mixture.eos_id
            cu_seqlens = torch.from_numpy(np.flatnonzero(border).astype(np.int32))
        if self.mask_first:
            targets[ids == self.mixture.eos_id] = IGNORE
        return Batch(
            self._tensor(ids),
            self._tensor(targets),
            window_ids,
            cu_seqlens,
            self.mixture.languages,
            self.mixture.language_tokens(source, window),
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.pin_memory else tensor

    def close(self) -> None:
        """Stop the background thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def micro_batches(batch: Batch, micro_batch: int) -> Iterator[Batch]:
    """Yield the windows of `batch` in order, `micro_batch` at a time (the last has the rest), as views."""
    seq_len = batch.ids.shape[1]
    for low in range(0, len(batch.ids), micro_batch):
        part = slice(low, low + micro_batch)
        ids, borders = batch.ids[part], batch.cu_seqlens
        if borders is not None:
            start, stop = low * seq_len, low * seq_len + ids.numel()
            borders = borders[(borders >= start) & (borders <= stop)] - start
        yield Batch(
            ids, batch.targets[part], batch.window_ids[part], borders, batch.languages, batch.language_tokens[part]
        )


def nothing(seq_len: int, *, documents: bool) -> Batch:
    """A window without targets: for a process that has no micro-batch left and must work along with the others."""
    none = torch.zeros(1, seq_len, dtype=torch.int64)
    borders = torch.tensor([0, seq_len], dtype=torch.int32) if documents else None
    return Batch(none, torch.full_like(none, IGNORE), np.zeros(0, np.int64), borders, (), np.zeros((0, 0), np.int64))
