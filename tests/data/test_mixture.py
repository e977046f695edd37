import math
import random
import subprocess
import sys
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from hyperllama.data.mixture import Mixture, Source, permute, splitmix64
from hyperllama.data.weights import unimax
from hyperllama.errors import HyperLlamaError

T = 7


def text_of(windows: int) -> list[tuple[str, str]]:
    """One document of exactly `windows` windows of T + 1 byte tokens (and half a window more)."""
    return [("fao", "x" * (windows * (T + 1) + T // 2))]


@pytest.fixture
def mix(make_shards):
    """mix([(windows, weight), ...], seed, seq_len) -> Mixture of sources a, b, c, ..."""
    shards = {}

    def make(sizes, seed: int = 0, **options) -> Mixture:
        sources = []
        for name, (windows, weight) in zip("abcdefgh", sizes, strict=False):
            if windows not in shards:
                shards[windows] = make_shards(f"w{windows}", text_of(windows))
            sources.append(Source(name, shards[windows], weight, **options))
        return Mixture(sources, T, seed)

    return make


SIZES = (
    [(50, 1)],
    [(1, 1)],
    [(50, 0.5), (30, 0.5)],
    [(50, 0.7), (3, 0.2), (1, 0.1)],
    [(2000, 90), (11, 1), (200, 9)],
    [(100, 1.0), (100, 1e-4)],
)


def test_permute_is_a_bijection_for_every_size_and_key() -> None:
    for n in [*range(1, 70), 255, 256, 257, 1000, 4097, 10_007]:
        for key in (0, 1, 2**64 - 1):
            image = permute(np.arange(n), n, key)
            assert image.dtype == np.int64
            assert np.array_equal(np.sort(image), np.arange(n))


def test_permute_works_element_by_element() -> None:
    n, key = np.array([5, 100, 1, 2**40]), np.array([3, 4, 5, 6], dtype=np.uint64)
    index = np.array([4, 17, 0, 2**39])
    together = permute(index, n, key)
    assert together.tolist() == [int(permute(*one)) for one in zip(index, n, key, strict=True)]
    assert permute(index.reshape(2, 2), n.reshape(2, 2), key.reshape(2, 2)).tolist() == together.reshape(2, 2).tolist()
    assert ((together >= 0) & (together < n)).all()
    assert permute(np.arange(0), 5, 1).shape == (0,)


def test_permute_refuses_an_index_outside() -> None:
    for index in (7, -1):
        for given in (index, np.array([0, index])):
            with pytest.raises(IndexError):
                permute(given, 7, 0)


def test_permute_has_no_favourite_places() -> None:
    n, keys = 20, splitmix64(np.arange(4000, dtype=np.uint64))
    image = permute(np.tile(np.arange(n), (len(keys), 1)), n, keys[:, None])
    counts = np.stack([np.bincount(image[:, place], minlength=n) for place in range(n)])
    chi_square = ((counts - len(keys) / n) ** 2 / (len(keys) / n)).sum()
    freedom = (n - 1) ** 2
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)
    pairs = np.bincount(image[:, 0] * n + image[:, 1], minlength=n * n).reshape(n, n)
    expected = len(keys) / (n * (n - 1))
    chi_square = ((pairs - expected) ** 2 / expected)[~np.eye(n, dtype=bool)].sum()
    freedom = n * (n - 1) - 1
    assert np.trace(pairs) == 0 and abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def test_splitmix64_matches_its_published_sequence() -> None:
    state = np.array([1234567 + i * 0x9E3779B97F4A7C15 & (2**64 - 1) for i in range(3)], dtype=np.uint64)
    assert splitmix64(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("sizes", SIZES)
def test_every_epoch_of_every_source_sees_each_window_exactly_once(mix, sizes) -> None:
    for seed in (0, 1):
        mixture = mix(sizes, seed)
        source, window = mixture.locate(np.arange(5000))
        for s, (windows, _) in enumerate(sizes):
            drawn = window[source == s]
            for start in range(0, len(drawn), windows):
                epoch = drawn[start : start + windows]
                assert len(set(epoch.tolist())) == len(epoch) and epoch.min() >= 0 and epoch.max() < windows


def test_epochs_have_different_orders_and_so_have_seeds_and_sources(mix) -> None:
    sizes = [(50, 0.5), (50, 0.5)]
    orders = set()
    for seed in (0, 1):
        source, window = mix(sizes, seed).locate(np.arange(400))
        orders |= {tuple(window[source == s][e : e + 50]) for s, e in product((0, 1), range(0, 150, 50))}
    assert len(orders) == 2 * 2 * 3


@pytest.mark.parametrize("sizes", SIZES)
def test_weights_are_kept_at_every_window(mix, sizes) -> None:
    mixture = mix(sizes)
    total = 6000
    source, _ = mixture.locate(np.arange(total))
    weights = np.array([weight for _, weight in sizes])
    taken = np.cumsum(source[:, None] == np.arange(len(sizes)), axis=0)
    wanted = np.arange(1, total + 1)[:, None] * weights / weights.sum()
    assert np.abs(taken - wanted).max() <= 3 + len(sizes)
    borders = np.arange(mixture._round, total + 1, mixture._round)
    assert len(borders) == 0 or np.abs(taken - wanted)[borders - 1].max() < 1


def test_many_small_weights_never_give_a_negative_quota(mix) -> None:
    paradox = [1, 1, 1, 0.0003, 1, 0.0005]  # the fourth would lose a window in the 20th round of 1024
    generator = random.Random(0)
    for weights in (paradox, *([generator.choice([1, 0.3, 0.01, 0.0002]) for _ in range(8)] for _ in range(10))):
        mixture = mix([(20, weight) for weight in weights])
        quotas = np.diff([mixture._quotas(r * mixture._round) for r in range(50)], axis=0)
        assert quotas.min() >= 0 and (quotas.sum(1) == mixture._round).all()


def test_sources_alternate_without_a_pattern(mix) -> None:
    source, _ = mix([(2000, 0.5), (2000, 0.5)]).locate(np.arange(4000))
    repeats = (source[1:] == source[:-1]).mean()  # 0 would be strict alternation, 1/2 coin tossing
    assert 0.2 < repeats < 0.5
    assert abs(np.corrcoef(source[:-1024], source[1024:])[0, 1]) < 0.1  # rounds differ


@pytest.mark.parametrize("sizes", SIZES)
def test_order_does_not_depend_on_how_it_is_asked_for(mix, sizes) -> None:
    mixture, again = mix(sizes), mix(sizes)
    index = np.random.default_rng(0).integers(0, 10_000, 300)
    whole = np.stack(mixture.locate(np.arange(10_000)))
    assert np.array_equal(np.stack(again.locate(index)), whole[:, index])
    assert all(np.stack(again.locate(np.array([i])))[:, 0].tolist() == whole[:, i].tolist() for i in index[:20])
    shorter = np.stack(mix(sizes).locate(np.arange(700)))
    assert np.array_equal(shorter, whole[:, :700])  # a longer run extends a shorter one


def test_order_is_the_same_in_a_fresh_process(mix, tmp_path) -> None:
    sizes = SIZES[3]
    mixture = mix(sizes, 5)
    code = f"""
import numpy as np
from hyperllama.data.mixture import Mixture, Source
from hyperllama.data.shards import Shards
sizes = {sizes}
sources = [Source(n, Shards.open(f"{tmp_path}/w{{w}}"), weight) for n, (w, weight) in zip("abc", sizes)]
mixture = Mixture(sources, {T}, 5)
print(mixture.fingerprint, np.stack(mixture.locate(np.arange(100, 3000))).tolist())
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == f"{mixture.fingerprint} {np.stack(mixture.locate(np.arange(100, 3000))).tolist()}"


def test_describe_counts_what_locate_gives(mix) -> None:
    for sizes in SIZES:
        mixture = mix(sizes)
        for total in (0, 1, 999, 1024, 5000):
            source, _ = mixture.locate(np.arange(total))
            rows = list(mixture.describe(total).values())
            assert [row["windows"] for row in rows] == np.bincount(source, minlength=len(sizes)).tolist()
            assert [row["tokens"] for row in rows] == [row["windows"] * T for row in rows]
            assert [row["epochs"] for row in rows] == [
                row["windows"] / windows for row, (windows, _) in zip(rows, sizes, strict=True)
            ]


def test_check_refuses_a_run_that_repeats_a_source_too_often(mix) -> None:
    mixture = mix([(100, 1)], max_epochs=2.5)
    mixture.check(250)
    with pytest.raises(HyperLlamaError, match=r"source 'a' has 100 windows .* read 2.5 times, but the run needs 251"):
        mixture.check(251)
    mix([(1, 1)]).check(10**12)


def test_counts_far_into_a_run_are_exact(mix) -> None:
    mixture = mix([(50, 0.7), (3, 0.2), (1, 0.1)])
    total = 10**13
    counts = mixture.counts(total)
    assert counts.sum() == total
    for count, weight in zip(counts.tolist(), ("0.7", "0.2", "0.1"), strict=True):
        assert abs(count - total * Fraction(weight)) < 8


def test_fingerprint_changes_with_all_that_decides_the_tokens(mix, make_shards) -> None:
    same = {mix([(50, 1), (30, 2)]).fingerprint, mix([(50, 0.5), (30, 1)]).fingerprint}
    a, b = make_shards("a", text_of(50)), make_shards("b", text_of(51))
    others = [
        mix([(50, 1), (30, 2)], 1),
        mix([(50, 1), (30, 3)]),
        mix([(30, 2), (50, 1)]),
        Mixture([Source("a", a, 1)], T, 0),
        Mixture([Source("a", a, 1)], T + 1, 0),
        Mixture([Source("x", a, 1)], T, 0),
        Mixture([Source("a", b, 1)], T, 0),
    ]
    assert len(same) == 1 and len(same | {other.fingerprint for other in others}) == 1 + len(others)


def test_what_cannot_be_mixed_is_refused(make_shards, byte_tokenizer) -> None:
    good, short = make_shards("good", text_of(9)), make_shards("short", [("fao", "xyz")])
    byte_tokenizer.fingerprint = "0" * 64
    foreign = make_shards("foreign", text_of(9), byte_tokenizer)
    for sources, message in (
        ([], "at least one source"),
        ([Source("a", good, 0)], "'a' has weight 0"),
        ([Source("a", good, 1), Source("b", good, -1)], "'b' has weight -1"),
        ([Source("a", good, math.nan)], "'a' has weight nan"),
        ([Source("a", good, 1), Source("a", good, 2)], "two sources are named 'a'"),
        ([Source("a", good, 1), Source("b", good, 1e-9)], "'b' has less than"),
        ([Source("s", short, 1)], rf"'s' \({short.path}\) has 4 tokens, fewer than one window of {T + 1}"),
        ([Source("a", good, 1), Source("f", foreign, 1)], "different tokenizers"),
    ):
        with pytest.raises(HyperLlamaError, match=message):
            Mixture(sources, T, 0)


def test_tokens_by_language_add_up(make_shards) -> None:
    two = make_shards("two", [("fao", "x" * 40), ("isl", "y" * 25)] * 5)
    one = make_shards("one", [("swe", "z" * 100)])
    mixture = Mixture([Source("two", two, 3), Source("one", one, 1)], T, 0)
    assert mixture.languages == ("fao", "isl", "swe")
    total = mixture.tokens_by_language(100, 700)
    assert sum(total.values()) == 700 * T
    parts = [mixture.tokens_by_language(first, 100) for first in range(100, 800, 100)]
    assert total == {tag: sum(part.get(tag, 0) for part in parts) for tag in total}
    assert mixture.tokens_by_language(5, 0) == {}


def test_unimax_is_even_up_to_the_repetition_limit() -> None:
    sizes = {"eng": 1000, "fao": 10, "isl": 100}
    assert unimax(sizes, 300, 4) == {"eng": 130, "fao": 40, "isl": 130}
    assert unimax(sizes, 30, 4) == {"eng": 10, "fao": 10, "isl": 10}
    assert unimax(sizes, 10**6, 4) == {"eng": 4000, "fao": 40, "isl": 400}
    assert unimax({}, 10, 1) == {}


def test_unimax_spends_the_budget_and_is_fair() -> None:
    for seed in range(200):
        generator = random.Random(seed)
        sizes = {f"l{i}": generator.randint(1, 10 ** generator.randint(1, 6)) for i in range(generator.randint(1, 9))}
        epochs, budget = generator.choice([0.5, 1, 4, 6.5]), generator.randint(0, 10**6)
        limits = {tag: math.floor(size * epochs) for tag, size in sizes.items()}
        shares = unimax(sizes, budget, epochs)
        assert list(shares) == list(sizes) and sum(shares.values()) == min(budget, sum(limits.values()))
        free = [share for tag, share in shares.items() if share < limits[tag]]
        assert all(share <= limits[tag] for tag, share in shares.items())
        assert not free or (max(free) - min(free) <= 1 and max(shares.values()) - min(free) <= 1)
