"""The sequential verdict: what it promises, exactly and on simulated timings of a bad machine. No clock is read."""

import itertools
import math

import numpy as np
import pytest

from hyperllama.bench.sequential import ALARM, MARGIN, WORTH, Bet, Trial, round_ratio

ROUNDS, TURNS = 40, 5  # what a gate of some minutes has for a case that is hard to decide


def test_a_bet_on_fair_coins_gains_nothing_and_seldom_looks_as_if_it_did() -> None:
    capitals, most = [], []
    for coins in itertools.product((True, False), repeat=13):  # all of them: no sampling error
        bet = Bet()
        for won in coins:
            bet.add(won)
        capitals.append(sum(bet.capital))
        most.append(bet.most)
    assert np.mean(capitals) == pytest.approx(1.0, rel=1e-12)
    for level in (5, 20, 100, 400):
        assert np.mean(np.array(most) >= level) <= 1 / level
    assert max(most) > 400  # so that every level above says something


def test_false_alarms_over_all_cases_stay_below_the_promise_at_the_margin_itself() -> None:
    """The worst case that is not an alarm: every case slower by the margin, noise symmetric, looked at after every round."""
    gates, cases, random = 400, 10, np.random.default_rng(0)
    alarms = 0
    for _ in range(gates):
        trials = [Trial(cases) for _ in range(cases)]
        for trial in trials:
            for noise in random.standard_cauchy(40):
                trial.add(math.log1p(MARGIN) + float(noise))
        alarms += any(trial.verdict == "slower" for trial in trials)
    assert alarms <= 2 * ALARM * gates  # the promise is 8 of 400 on average; 16 are three deviations above


def simulated(random: np.random.Generator, slowdown: float) -> list[float]:
    """Ratios of ROUNDS rounds on a bad machine: drift, neighbours that come and go, heavy tails, processes that differ."""
    samples = ROUNDS * TURNS * 4
    drift = np.cumsum(
        random.normal(0, 0.01, samples)
    )  # a random walk of clocks and heat: a quarter per hundred samples
    neighbour = np.repeat(random.random(samples // 10) < 0.2, 10) * random.uniform(0.05, 0.5)
    spikes = (random.random(samples) < 0.15) * random.pareto(1.5, samples).clip(max=50) * 0.2
    jitter = random.normal(0, 0.02, samples)
    seconds = np.exp(drift + np.maximum(neighbour, 0) + spikes + jitter).reshape(ROUNDS, TURNS, 4)
    process = random.normal(0, 0.006, (ROUNDS, 2))  # of every pair of children
    build = random.normal(0, 0.003)  # of the two installations, for the whole run
    ratios = []
    for i, turns in enumerate(seconds):
        base, head = math.exp(process[i, 0]), math.exp(process[i, 1] + build) * (1 + slowdown)
        took = in_turns(turns)
        ratios.append(round_ratio([base * x for x in took[0]], [head * x for x in took[1]]))
    return ratios


def in_turns(turns: np.ndarray) -> tuple[list[float], list[float]]:
    """What the two versions get of the moments (TURNS, 4): base head head base, and the other way round."""
    took: tuple[list[float], list[float]] = ([], [])
    for j, (a, b, c, d) in enumerate(turns.tolist()):
        took[j % 2].extend((a, d))
        took[1 - j % 2].extend((b, c))
    return took


def verdicts(slowdown: float, runs: int, cases: int, seed: int) -> list[Trial]:
    random, trials = np.random.default_rng(seed), []
    for _ in range(runs):
        trials.append(Trial(cases))
        for ratio in simulated(random, slowdown):
            trials[-1].add(ratio)
    return trials


def test_equal_versions_on_a_bad_machine_are_hardly_ever_slower() -> None:
    cases = 20
    trials = verdicts(0.0, 1500, cases, 1)
    alarms = sum(trial.verdict == "slower" for trial in trials)
    # one alarm in 1500 cases is one in 75 gates of twenty: 1.3 %
    assert alarms <= 1
    assert sum(trial.verdict == "not slower" for trial in trials) > 0.9 * len(trials)


def test_a_slowdown_of_five_per_cent_on_a_bad_machine_is_caught() -> None:
    trials = verdicts(WORTH, 400, 20, 2)
    assert sum(trial.verdict == "slower" for trial in trials) >= 0.95 * len(trials)
    assert sum(trial.verdict == "not slower" for trial in trials) <= 0.01 * len(trials) + 2


def test_a_round_hardly_knows_drift_nor_what_disturbs_half_of_the_calls() -> None:
    steady = np.full((6, 4), 1.0)
    drift = 1.002 ** np.arange(24).reshape(6, 4)  # every sample slower than the one before: 4.7 % over the round
    assert abs(round_ratio(*in_turns(drift))) < 0.002
    random, told = np.random.default_rng(3), []
    for _ in range(200):
        disturbed = steady * np.where(random.random((6, 4)) < 0.35, random.uniform(1.2, 3.0, (6, 4)), 1.0)
        told.append(round_ratio(*in_turns(disturbed)))
    assert sum(ratio == 0 for ratio in told) > 190
    assert round_ratio([1.0] * 3 + [9.0], [1.1] * 3 + [2.0]) == pytest.approx(math.log(1.1))


def test_what_is_decided_stays_decided() -> None:
    trial = Trial(1)
    while trial.verdict == "undecided":
        trial.add(0.1)
    assert trial.verdict == "slower" and len(trial.ratios) == 8
    for _ in range(100):
        trial.add(-0.1)
    assert trial.verdict == "slower" and len(trial.ratios) == 8
