"""The same threads and the same random numbers for every test."""

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def seeded():
    """Tests draw from one seed, whatever ran before."""
    torch.manual_seed(0)
