"""Every token is scored once, with at least half a window before it, and whatever the batches are."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate.score import score, window_length, windows_of
from hyperllama.flops import window_flops
from hyperllama.model import Llama
from tests.reference import random_model, shape

SEQUENCES = [[(7 * i + 3 * n) % 96 for i in range(n)] for n in (1, 5, 0, 24, 3, 60, 25, 24, 1)]


def model() -> Llama:
    return random_model(shape(), torch.float32)


@pytest.mark.parametrize("seq_len", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("n_tokens", range(0, 40, 3))
def test_windows_score_each_token_once_with_half_a_window_of_context(n_tokens, seq_len):
    windows = list(windows_of(0, n_tokens, seq_len))
    assert [t for w in windows for t in range(w.first, w.end)] == list(range(n_tokens))
    assert all(w.begin <= w.first < w.end and w.end - w.begin <= seq_len for w in windows)
    assert all(w.end - w.begin == seq_len for w in windows[:-1])
    for before, after in pairwise(windows):
        assert before.end == after.first
        assert after.first - after.begin == seq_len // 2


@pytest.mark.parametrize("batch_tokens", [1, 30, 64, 10**6])
def test_batches_do_not_change_the_scores(batch_tokens):
    wanted = score(model(), SEQUENCES, start=0, seq_len=24)
    got = score(model(), SEQUENCES, start=0, seq_len=24, batch_tokens=batch_tokens)
    assert got.nll == pytest.approx(wanted.nll, rel=1e-6)
    assert got.flops == wanted.flops
    assert wanted.nll[2] == 0
    assert wanted == score(model(), SEQUENCES, start=0, seq_len=24)


def test_equal_sequences_are_computed_once_and_score_the_same():
    once = score(model(), [[5, 6, 7]], start=0, seq_len=24)
    often = score(model(), [[5, 6, 7], [1], (5, 6, 7)], start=0, seq_len=24)
    assert often.nll[0] == often.nll[2] == pytest.approx(once.nll[0], rel=1e-6)
    assert often.flops == once.flops + score(model(), [[1]], start=0, seq_len=24).flops


def test_flops_are_those_of_the_forward_passes_over_real_tokens():
    got = score(model(), [[1] * 3, [2] * 60], start=0, seq_len=24, batch_tokens=1000)
    lengths = [3, 24, 24, 24, 24]  # 60 tokens: 24, then 12 new ones in each of three windows
    assert got.flops == sum(window_flops(shape(), length, "causal") for length in lengths) // 3
    assert isinstance(got.flops, int)


def test_thousands_of_sequences_take_few_forward_passes(monkeypatch):
    shapes, plain = [], Llama.token_losses

    def counted(self: Llama, ids: Tensor, targets: Tensor) -> Tensor:
        shapes.append(ids.shape)
        return plain(self, ids, targets)

    monkeypatch.setattr(Llama, "token_losses", counted)
    sequences = [[i % 96, i // 96, *[5] * (i % 12)] for i in range(2000)]
    score(model(), sequences, start=0, seq_len=24, batch_tokens=1024)
    tokens, padded = sum(map(len, sequences)), sum(rows * length for rows, length in shapes)
    assert padded < 1.1 * tokens
    assert len(shapes) < 1.1 * padded / 1024 + 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error(value):
    damaged = model()
    damaged.arena.logical("weights")["model.norm.weight"][0] = value
    with pytest.raises(HyperLlamaError, match="not finite"):
        score(damaged, SEQUENCES, start=0, seq_len=24)


def test_a_window_longer_than_the_models_is_refused():
    assert window_length(model(), None) == 32
    assert window_length(model(), 7) == 7
    for seq_len in (33, 0, -1):
        with pytest.raises(HyperLlamaError, match=f"seq_len is {seq_len}.* 1 to 32"):
            window_length(model(), seq_len)
