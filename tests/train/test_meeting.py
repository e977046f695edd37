"""Processes that start together agree on a name, whatever dead ones have left in the store; who does not come is named."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from hyperllama.errors import Lost
from hyperllama.train.distributed import meet


def together(store, world: int) -> set[str]:
    with ThreadPoolExecutor(world) as threads:
        return set(threads.map(lambda rank: meet(store, rank, world, 20.0), range(world)))


def test_those_who_start_together_agree_and_no_name_comes_twice():
    store = dist.HashStore()
    names = [together(store, 4) for _ in range(5)]
    assert all(len(agreed) == 1 for agreed in names) and len(set().union(*names)) == 5


def test_a_word_of_a_dead_process_is_not_taken_for_an_answer():
    """Of four that met before, three come again at once; they wait for the fourth."""
    store = dist.HashStore()
    (before,) = together(store, 4)
    with ThreadPoolExecutor(4) as threads:
        early = [threads.submit(meet, store, rank, 4, 20.0) for rank in range(3)]
        with pytest.raises(TimeoutError):
            early[0].result(timeout=0.5)
        late = threads.submit(meet, store, 3, 4, 20.0)
        names = {job.result(timeout=20) for job in (*early, late)}
    assert len(names) == 1 and before not in names


def test_who_does_not_come_is_named():
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(meet, store, 0, 3, 1.0)
        threads.submit(meet, store, 1, 3, 1.0)
        with pytest.raises(Lost, match="rank 2 did not come within 1 seconds"):
            first.result(timeout=20)
