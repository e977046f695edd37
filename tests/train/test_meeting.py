"""Processes that start together agree on a name, whatever dead ones have left in the store; who does not come is named.

They have the same settings, data and run folder, and each the device of its place on its machine.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier

import pytest
import torch
import torch.distributed as dist

from hyperllama.errors import HyperLlamaError, Lost
from hyperllama.train import folder
from hyperllama.train.distributed import Processes, meet, pick_device, processes
from hyperllama.train.folder import check_alike, only_run
from hyperllama.train.plan import make_plan
from tests.study import run_config


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


class Crew:
    """Processes of one run as threads."""

    def __init__(self, world: int):
        self.world, self.values, self.met = world, [0] * world, Barrier(world)

    def each(self, work) -> list[str]:
        """What `work(process)` raised, by rank."""

        def told(rank: int) -> str:
            try:
                work(_Member(rank, self.world, torch.device("cpu"), crew=self))
            except HyperLlamaError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(self.world) as threads:
            return list(threads.map(told, range(self.world)))


@dataclass(frozen=True)
class _Member(Processes):
    crew: Crew | None = None

    def largest_int(self, value: int) -> int:
        self.crew.values[self.rank] = value
        self.crew.met.wait(30)
        largest = max(self.crew.values)
        self.crew.met.wait(30)
        return largest


def test_processes_that_were_started_unlike_are_refused_all_of_them(study, tmp_path):
    plans = [make_plan(run_config(study, tmp_path, log_every=every)) for every in (2, 2, 3)]
    assert Crew(2).each(lambda mine: check_alike(plans[mine.rank], mine)) == ["", ""]
    told = Crew(3).each(lambda mine: check_alike(plans[mine.rank], mine))
    assert all("differ in settings, data or version" in sentence for sentence in told)


def test_a_folder_that_is_not_the_same_for_all_processes_is_refused(tmp_path, monkeypatch):
    """As a local disk of every machine; the other has a folder from an earlier run."""
    monkeypatch.setattr(folder, "SHARED_SECONDS", 0.2)

    def start(outs):
        def work(mine):
            with only_run(outs[mine.rank], mine):
                pass

        return Crew(3).each(work)

    one, other = tmp_path / "one", tmp_path / "other"
    assert start([one, one, one]) == ["", "", ""]
    assert start([other, other, other]) == ["", "", ""]
    assert all("of rank 2 is not the folder of rank 0" in sentence for sentence in start([one, one, other]))


def test_a_process_takes_the_device_of_its_place_on_its_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for key, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    with processes("auto", 60) as mine:
        assert (mine.rank, mine.world, mine.device) == (3, 4, torch.device("cuda", 1))
    with pytest.raises(HyperLlamaError, match="process 3 of this machine has no CUDA device, torch sees 2"):
        pick_device("cuda", 2)
