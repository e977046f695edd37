"""Growth of one tensor: tile it, divide it, and optionally break the symmetry of the copies without changing the function.

    out[i R + r, j C + c] = W[r, c] / q              i < p row copies, j < q column copies of W (R, C)

With noise, neighbouring column copies 2a and 2a + 1 share S = 2 W / q unevenly, with u uniform in [0, sqrt(3) s):

    larger = round(S (1 + u) / 2),  smaller = S - larger,  and a coin decides which copy gets which.

Both copies read equal inputs, so the sum S is all that the function sees; larger lies in [S/2, S], where the subtraction is
exact in every binary format (Sterbenz): the pair sums to S to the last bit. s = 10^(-dB/20) is the noise's share of W/q, so the
signal-to-noise ratio of the tensor is `noise_db`. An odd last copy gets no noise. u and the coin are functions of
(seed, name, element): see counter.py. Vectors have C = 1 and only row copies. Reference only.
"""

import torch
from torch import Tensor

from hyperllama.errors import HyperLlamaError
from hyperllama.kernels.backend import define
from hyperllama.kernels.counter import key_of, signed, uniform

MIN_NOISE_DB = 4.78  # sqrt(3) * 10^(-dB/20) <= 1 keeps the larger share at most S


def grow_reference(source: Tensor, row_copies: int, col_copies: int, noise_db: float | None, key: int) -> Tensor:
    """Tiles, quotient and paired noise in plain torch."""
    if source.dim() == 1:
        return source.repeat(row_copies)
    out = source.repeat(row_copies, col_copies) / col_copies
    if noise_db is None or col_copies < 2:
        return out
    rows, cols = out.shape[0], source.shape[1]
    scale = 3**0.5 * 10 ** (-noise_db / 20)
    shared = (source / (col_copies / 2)).repeat(row_copies, 1)
    wide = shared.to(torch.promote_types(shared.dtype, torch.float32))
    for pair in range(col_copies // 2):
        first = pair * 2 * cols
        counter = torch.arange(rows, device=out.device)[:, None] * (2 * out.shape[1]) + torch.arange(
            2 * first, 2 * (first + cols), 2, device=out.device
        )
        share = 0.5 + 0.5 * scale * uniform(key, counter)
        larger = (wide * share.to(wide.dtype)).to(out.dtype)
        smaller = shared - larger
        coin = uniform(key, counter + 1) < 0.5
        out[:, first : first + cols] = torch.where(coin, larger, smaller)
        out[:, first + cols : first + 2 * cols] = torch.where(coin, smaller, larger)
    return out


_grow = define(
    "grow(Tensor source, int row_copies, int col_copies, float? noise_db, int key) -> Tensor",
    grow_reference,
    lambda source, row_copies, col_copies, noise_db, key: source.new_empty(
        [size * copies for size, copies in zip(source.shape, (row_copies, col_copies), strict=False)]
    ),
)


def grow(source: Tensor, row_copies: int, col_copies: int, *, noise_db: float | None = None, key: int = 0) -> Tensor:
    """Tile a matrix (R, C) or vector (R,) to (p R, q C) and divide by q = `col_copies`; the dtype is kept.

    `noise_db` adds paired noise (at least 4.78 dB), drawn from the 64-bit `key`.
    Raises HyperLlamaError when the noise would be too loud to keep the pairs' sums exact.
    """
    check_noise(noise_db)
    return _grow(source, row_copies, col_copies, noise_db, signed(key))


def check_noise(noise_db: float | None) -> None:
    """Raise HyperLlamaError when the noise is no number or too loud to keep the pairs' sums exact."""
    if noise_db is not None and not noise_db >= MIN_NOISE_DB:
        raise HyperLlamaError(
            f"noise of {noise_db} dB is too loud: at least {MIN_NOISE_DB} dB keeps the function exact"
        )


def noise_key(seed: int, name: str) -> int:
    """The key of a tensor's noise."""
    return key_of("grow", seed, name)
