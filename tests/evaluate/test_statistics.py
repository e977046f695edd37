"""Intervals and tests against published values, exact fractions and simulation."""

from fractions import Fraction
from math import factorial

import numpy as np
import pytest

from hyperllama.evaluate.statistics import bootstrap, mcnemar, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_newcombes_table(successes, n, low, high):
    """Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3."""
    assert wilson(successes, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    mirrored = wilson(n - successes, n)
    assert mirrored == (pytest.approx(1 - high, abs=5e-5), pytest.approx(1 - low, abs=5e-5))


def test_mcnemar_is_the_exact_binomial_test():
    def binomial(n: int, k: int) -> Fraction:
        return Fraction(factorial(n), factorial(k) * factorial(n - k)) / 2**n

    for b in range(12):
        for c in range(12):
            n = b + c
            as_rare = [binomial(n, k) for k in range(n + 1) if binomial(n, k) <= binomial(n, b)]
            assert mcnemar(b, c) == pytest.approx(float(sum(as_rare)), abs=1e-12)
    assert mcnemar(3, 200) < 1e-40 and mcnemar(0, 0) == 1


def test_bootstrap_intervals_hold_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(1)
    held = 0
    for trial in range(200):
        sizes = generator.integers(50, 150, size=80)
        values = sizes * 2.0 + generator.normal(0, 30, size=80)
        ((low, high),), _ = bootstrap([values], sizes, seed=trial, resamples=300)
        held += low <= 2.0 <= high
    assert 0.89 <= held / 200 <= 0.99  # about 95 %: 190 of 200, give or take 3.1


def test_differences_are_paired_so_what_models_share_cancels():
    sizes = np.full(50, 100)
    hard = np.random.default_rng(0).normal(200, 60, size=50)
    levels, changes = bootstrap([hard, hard + 3.0, hard], sizes)
    assert levels[0][1] - levels[0][0] > 0.2
    assert changes[0] == (0.0, 0.0) == changes[2]
    assert changes[1] == (pytest.approx(0.03), pytest.approx(0.03))


def test_the_same_seed_gives_the_same_interval_whatever_the_block(monkeypatch):
    values, sizes = np.arange(1.0, 30.0), np.ones(29)
    whole = bootstrap([values], sizes)
    monkeypatch.setattr("hyperllama.evaluate.statistics._BLOCK", 1000)
    assert bootstrap([values], sizes) == whole
