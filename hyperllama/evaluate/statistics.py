"""How sure a figure is: intervals of shares, exact tests of paired answers, bootstraps over documents.

Wilson      (p + z^2/2n  +-  z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n)         a share p of n answers
McNemar     P(a split of b + c at least this uneven, if both were as likely)     b: only the first right, c: only the second
bootstrap   quantiles over documents drawn again with replacement                a ratio of sums, and differences of two
"""

from collections.abc import Sequence
from math import sqrt

import numpy as np

Z = 1.959963984540054  # 97.5 % of the normal distribution lie below
RESAMPLES = 2000
_BLOCK = 1 << 22  # numbers drawn at once


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); `successes` may hold halves, for ties."""
    p, square = successes / n, Z * Z / n
    half = Z * sqrt(p * (1 - p) / n + square / (4 * n))
    low, high = ((p + square / 2 + sign * half) / (1 + square) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided exact p-value of McNemar's test on the pairs that two models answer differently."""
    n, k = first_only + second_only, min(first_only, second_only)
    if n == 0:
        return 1.0
    term = total = 1
    for i in range(k):
        term = term * (n - i) // (i + 1)
        total += term
    return min(1.0, 2 * total / 2**n)


def bootstrap(
    values: Sequence[np.ndarray], sizes: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """95 % intervals of sum(v) / sum(sizes) for every v in `values` (units,), and of its difference to the first's.

    All are resampled alike, so the differences are paired. Units (documents, facts) are what is drawn.
    """
    units = len(sizes)
    generator = np.random.default_rng(seed)
    table = np.stack([*values, sizes]).astype(np.float64)  # (models + 1, units)
    sums = []
    step = max(1, _BLOCK // units)
    for low in range(0, resamples, step):
        count = min(step, resamples - low)
        drawn = generator.multinomial(units, np.full(units, 1 / units), size=count)  # how often each unit comes
        sums.append(drawn @ table.T)
    totals = np.concatenate(sums)
    ratios = totals[:, :-1] / totals[:, -1:]
    return _quantiles(ratios), _quantiles(ratios - ratios[:, :1])


def _quantiles(samples: np.ndarray) -> list[tuple[float, float]]:
    low, high = np.quantile(samples, [0.025, 0.975], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))
