"""A verdict on a slowdown while the measuring goes on: bets on signs, whose capital says how sure one may be.

Round i of a case gives x_i, the logarithm of head's time over base's in the same moments. Somebody starts with a capital of 1 and
bets every round that head is more than MARGIN slower. Where it is not, whatever the distribution of the noise, x_i is above the
margin with a probability of at most one half given all that came before. Then no bet at even odds has an expected gain, and the
capital ever reaches c with a probability of at most 1/c (Ville 1939; Shafer 2021, "Testing by betting"; the inverse is a
confidence sequence of the median). So one may look after every round and stop when one likes, at no price:

    capital >= cases / alarm    this case is slower: a regression. Over all cases a false alarm has probability alarm (Bonferroni)
    the same bet that head is less than WORTH slower, capital >= 1 / miss    it is not slower by that much: done with it
    neither, when time is up    undecided

Signs alone decide, so one round in which the machine did something else has no more weight than any other. MARGIN is for what
rounds do not average out: two builds of equal source lie at other addresses. Bets of several sizes are spread over one capital,
because the best size depends on the noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Literal

MARGIN = 0.015  # slowdowns up to this are none
WORTH = 0.05  # the slowdown that is not to be missed
ALARM = 0.02  # probability of a false alarm, over all cases
MISS = 0.01  # probability, per case, that one of WORTH is taken for none
STAKES = (0.3, 0.6, 0.9)  # shares of the capital that are put on a round

Verdict = Literal["slower", "not slower", "undecided"]


def round_ratio(base: Sequence[float], head: Sequence[float]) -> float:
    """log(head / base) of a round, from the seconds of both versions' calls: the ratio of lower quartiles.

    What disturbs a call makes it longer, on a shared machine often by half and for a third of the calls; a quarter of them is
    left alone nearly always, where a median would not be.
    """
    return math.log(quantiles(head, n=4, method="inclusive")[0] / quantiles(base, n=4, method="inclusive")[0])


@dataclass
class Bet:
    """A capital of 1 put on coins that are said to be fair, or worse."""

    capital: list[float] = field(default_factory=lambda: [1 / len(STAKES)] * len(STAKES))
    most: float = 1.0  # that it ever was

    def add(self, won: bool) -> None:
        """One more coin."""
        self.capital = [c * (1 + stake if won else 1 - stake) for c, stake in zip(self.capital, STAKES, strict=True)]
        self.most = max(self.most, sum(self.capital))


@dataclass
class Trial:
    """One case's rounds and what may be said of them; `cases` are all that are judged together."""

    cases: int
    ratios: list[float] = field(default_factory=list)
    slower: Bet = field(default_factory=Bet)
    bounded: Bet = field(default_factory=Bet)

    def add(self, ratio: float) -> None:
        """A round's log(head / base); what has been decided stays decided."""
        if self.verdict == "undecided":
            self.ratios.append(ratio)
            self.slower.add(ratio > math.log1p(MARGIN))
            self.bounded.add(ratio < math.log1p(WORTH))

    @property
    def verdict(self) -> Verdict:
        """What the rounds so far say."""
        if self.slower.most >= self.cases / ALARM:
            return "slower"
        return "not slower" if self.bounded.most >= 1 / MISS else "undecided"
