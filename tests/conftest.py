"""The same threads and the same random numbers for every test, and what several of them read."""

import signal

import pytest
import torch

from tests.study import make_study

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def seeded():
    """Tests draw from one seed, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """Text, a tokenizer and shards: to be read, never written."""
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def number_of_threads():
    """torch.set_num_threads, set back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_configure():
    """A job that a shell starts in the background ignores SIGINT, and so would all processes that tests interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def records(monkeypatch):
    """What a CUDA graph is for a test: the work over tensors that stay, done at every replay. Returns what was recorded."""
    made = []

    def record(work):
        made.append(work)
        return work

    for module in ("micro", "update"):
        monkeypatch.setattr(f"hyperllama.train.{module}.record", record)
    return made
