"""The last step of a stage is filled as nanotron's sampler is described to fill it, by a slow loop and by the paper's stages."""

import numpy as np
import pytest

from hyperllama.data.mixture import Mixture, Source
from hyperllama.data.shards import Shards
from hyperllama.data.tail import Tail

BATCH = 5120


def walked(windows: int, batch: int, processes: int, size: int) -> list[int]:
    """The last step in the order of micro-batches and processes; -1 where the sampler has no window and takes the last."""
    first = windows // batch * batch
    rest = list(range(first, windows))
    groups = []
    while len(rest) >= processes * size:
        groups.append(rest[: processes * size])
        rest = rest[processes * size :]
    while sum(map(len, groups)) < batch:
        turn = len(groups) - (windows - first) // (processes * size)
        group = []
        for process in range(processes):
            begin = process + turn * processes * size
            group += [rest[i] if i < len(rest) else -1 for i in range(begin, begin + size)]
        groups.append(group)
    return [window for group in groups for window in group]


@pytest.mark.parametrize(
    "rows, processes, size, copies, unseen",
    [
        (2465, 16, 8, 2560, 10), (2465, 16, 4, 2624, 14), (624, 16, 8, 4480, 89), (624, 16, 4, 4480, 29),
        (2825, 16, 8, 2260, 0), (2825, 16, 4, 2274, 0), (2137, 16, 8, 2944, 66), (364, 16, 8, 4736, 85),
        (2317, 16, 8, 2740, 0), (2317, 16, 4, 2770, 0), (4365, 32, 8, 692, 0), (4365, 32, 4, 722, 0),
        (2137, 16, 4, 2944, None), (364, 16, 4, 4736, None),
        (835, 32, 8, 4096, None), (174, 32, 8, 4864, None), (4785, 32, 8, 256, None),
    ],
)  # fmt: skip
def test_the_papers_stages_have_as_many_copies_and_unseen_windows(rows, processes, size, copies, unseen):
    windows = 3 * BATCH + rows
    expected = walked(windows, BATCH, processes, size)
    assert len(expected) == BATCH and expected.count(-1) == copies
    if unseen is not None:
        assert rows - len(set(expected) - {-1}) == unseen
    tail = Tail(windows, BATCH, processes, size)
    got = tail.windows_at(np.arange(3 * BATCH, 4 * BATCH))
    assert got.tolist() == [windows - 1 if window < 0 else window for window in expected]
    assert tail.computed == 4 * BATCH
    assert tail.windows_at(np.arange(3 * BATCH)).tolist() == list(range(3 * BATCH))


@pytest.mark.parametrize("rows", range(25))
def test_every_remainder_of_a_small_step_is_the_slow_loops(rows):
    tail = Tail(48 + rows, 24, 3, 2)
    expected = walked(48 + rows, 24, 3, 2)[:24] if rows % 24 else list(range(24 * (48 + rows) // 24 - 24, 48 + rows))
    last = np.arange(tail.computed - 24, tail.computed)
    assert tail.windows_at(last).tolist() == [47 + rows if window < 0 else window for window in expected]


def test_a_mixture_locates_and_counts_its_tail(study):
    shards = Shards.open(study / "shards" / "eng")
    tail = Tail(50, 8, 2, 2)
    plain, ended = (Mixture([Source("eng", shards, 1.0)], 32, 7, t) for t in (None, tail))
    places = np.arange(tail.computed)
    assert all(
        np.array_equal(a, b) for a, b in zip(ended.locate(places), plain.locate(tail.windows_at(places)), strict=True)
    )
    assert ended.counts(56).tolist() == [56] and ended.fingerprint != plain.fingerprint
    two = [Source("eng", shards, 1.0), Source("swe", Shards.open(study / "shards" / "swe"), 1.0)]
    mixed = Mixture(two, 32, 7, Tail(40_003, 8000, 2, 2))
    assert mixed.counts(48_000).tolist() == np.bincount(mixed.locate(np.arange(48_000))[0]).tolist()
