"""What a study over seeds is asked, as numbers: paired differences of models at the same integer of FLOPs, one a seed.

An interval is mean +- t s / sqrt(n) of the differences, two-sided 95 %. Languages are averaged first, each weighing the same.
"""

from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev
from typing import Any

from hyperllama.errors import HyperLlamaError
from hyperllama.experiment.findings import language_name, words
from hyperllama.experiment.merges import AWARE, PAPERS
from hyperllama.experiment.recipe import SCRATCH

Seed = dict[str, Any]
Answers = dict[str, list[float]]  # what is compared -> a value for every seed
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 97.5 % quantiles of t, by n - 1


class Arms:
    """The models of one seed by id, and the averages that questions are asked of."""

    def __init__(self, seed: Seed):
        self.seed, self.rows = seed, {row["id"]: row for row in seed["models"]}
        settings = seed["settings"]
        self.base, self.targets = settings["base_language"], settings["targets"]
        self.methods = list(dict.fromkeys(row["method"] for row in seed["models"] if row["kind"] == "merge"))
        self.papers = [method for method in self.methods if method in PAPERS]
        self.aware = [method for method in self.methods if method in AWARE]
        self.families = [f for f in ("1x", "1x-cloned", "2x") if f"{self.targets[0]}-{f}" in self.rows]
        for group in seed["equal"]:
            for name in group["ids"]:
                if self.rows[name][group["by"]] != group["flops"]:
                    raise HyperLlamaError(
                        f"seed {seed['seed']}: {name} is not at the {group['flops']} FLOPs of its group"
                    )

    def bits(self, name: str, language: str) -> float:
        """Bits per byte of a model on a language."""
        return self.rows[name]["eval"][language]["bits_per_byte"]

    def added(self, name: str) -> float:
        """Mean bits per byte of a model over the added languages."""
        return mean(self.bits(name, tag) for tag in self.targets)

    def own(self, family: str) -> float:
        """Mean over the added languages, each by its own model."""
        return mean(self.bits(f"{tag}-{family}", tag) for tag in self.targets)

    def english(self, family: str) -> float:
        """Mean bits per byte on the base language of the family's language models."""
        return mean(self.bits(f"{tag}-{family}", self.base) for tag in self.targets)

    def best(self, family: str, methods: list[str]) -> float:
        """The least mean over the added languages of these merges; chosen on what is measured, which favours it."""
        return min(self.added(f"merge-{method}-{family}") for method in methods)

    def accuracy(self, name: str, languages: list[str]) -> float:
        """Per cent of minimal pairs that a model gets right, mean over languages."""
        return 100 * mean(self.rows[name]["eval"][tag]["accuracy"] for tag in languages)

    def forgot(self, family: str) -> float:
        """How much it rose above that of the model they started from."""
        return self.english(family) - self.bits(f"{self.base}-{family}", self.base)


def interval(values: list[float]) -> tuple[float, float | None]:
    """(mean, half the width of the 95 % interval); None where one value has none."""
    if len(values) < 2:
        return mean(values), None
    return mean(values), STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * stdev(values) / sqrt(len(values))


def _percent(ours: float, theirs: float) -> float:
    return 100 * (ours / theirs - 1)


def verdict(values: list[float]) -> str:
    """better, worse, or undecided when the interval holds zero; with one seed nothing is decided."""
    middle, half = interval(values)
    if half is None or abs(middle) <= half:
        return "undecided"
    return "better" if middle < 0 else "worse"


def growing(arms: list[Arms]) -> Answers:
    """Question 1: what -> differences of grown models from 1x ones, or as said."""
    base, known = arms[0].base, arms[0].rows.keys()
    found = {}
    for family in arms[0].families[1:]:
        values = [_percent(one.own(family), one.own("1x")) for one in arms]
        found[f"{family} against 1x, a model a language"] = values
    for family in [*arms[0].families[1:], SCRATCH]:
        if f"joint-{family}" in known:
            values = [_percent(one.added(f"joint-{family}"), one.added("joint-1x")) for one in arms]
            found[f"{family} against 1x, joint training"] = values
    for ours, theirs in (("2x", "1x"), (SCRATCH, "1x"), ("2x", SCRATCH)):
        if {f"{base}-{ours}", f"{base}-{theirs}"} <= known:
            values = [_percent(one.bits(f"{base}-{ours}", base), one.bits(f"{base}-{theirs}", base)) for one in arms]
            found[f"{ours} against {theirs}, {language_name(base)} alone"] = values
    return found


def keeping(arms: list[Arms]) -> Answers:
    """Question 2: what -> differences in the base language's bits per byte after adaptation (per cent), or its rise (bits)."""
    base = language_name(arms[0].base)
    found = {f"{family}: rise by adaptation, bits": [one.forgot(family) for one in arms] for family in arms[0].families}
    for family in arms[0].families[1:]:
        values = [_percent(one.english(family), one.english("1x")) for one in arms]
        found[f"{family} against 1x, {base} after adaptation"] = values
    return found


def merging(arms: list[Arms]) -> Answers:
    """Question 3: what -> differences of the paper's merges over the added languages."""
    found = {}
    for method in arms[0].papers:
        for family in arms[0].families[1:]:
            values = [_percent(one.added(f"merge-{method}-{family}"), one.added(f"merge-{method}-1x")) for one in arms]
            found[f"{words(method)}: {family} against 1x"] = values
    for family in arms[0].families:
        if f"joint-{family}" in arms[0].rows and arms[0].papers:
            values = [_percent(one.best(family, one.papers), one.added(f"joint-{family}")) for one in arms]
            found[f"{family}: best merge against joint training"] = values
    return found


@dataclass(frozen=True)
class Closing:
    """A merge that knows of languages, against the best of the paper's and joint training; of each seed, in per cent.

    `closed`: the share of the way from the best of the paper's to joint training; empty where it is not behind in every seed.
    `spent`: the merge's own FLOPs, of joint training's total.
    """

    family: str
    method: str
    difference: list[float]
    closed: list[float]
    spent: float


def closing(arms: list[Arms]) -> list[Closing]:
    """Question 4, by family: merges that know of languages over the added languages."""
    found: list[Closing] = []
    for family in arms[0].families if arms[0].papers else []:
        joint = f"joint-{family}"
        for method in arms[0].aware if joint in arms[0].rows else []:
            name = f"merge-{method}-{family}"
            best = [one.best(family, one.papers) for one in arms]
            ours, together = [one.added(name) for one in arms], [one.added(joint) for one in arms]
            gaps = [b - t for b, t in zip(best, together, strict=True)]
            closed = [100 * (b - o) / gap for b, o, gap in zip(best, ours, gaps, strict=True)] if min(gaps) > 0 else []
            spent = 100 * mean(one.rows[name]["spent"] / one.rows[joint]["total"] for one in arms)
            found.append(Closing(family, method, list(map(_percent, ours, best)), closed, spent))
    return found


def pairs(arms: list[Arms]) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """Question 5: (family, what) -> accuracy on minimal pairs of the added languages, of the base language; none measured: empty.

    Or what against what -> differences in points.

    Of merges that of fewest bits per byte over the seeds, among the paper's and among those that know of languages.
    """
    first = arms[0]
    if not all("accuracy" in cell for row in first.rows.values() for cell in row["eval"].values()):
        return {}
    found = {}
    for family in first.families:
        models = {"before adaptation": f"{first.base}-{family}", "joint training": f"joint-{family}"}
        for methods in (first.papers, first.aware):
            if methods:
                least = min(methods, key=lambda method: mean(one.added(f"merge-{method}-{family}") for one in arms))
                models[f"merge: {words(least)}"] = f"merge-{least}-{family}"
        own = [mean(one.accuracy(f"{tag}-{family}", [tag]) for tag in one.targets) for one in arms]
        kept = [mean(one.accuracy(f"{tag}-{family}", [one.base]) for tag in one.targets) for one in arms]
        found[family, "a model a language"] = own, kept
        for what, name in models.items():
            if name in first.rows:
                both = [(one.accuracy(name, one.targets), one.accuracy(name, [one.base])) for one in arms]
                found[family, what] = [added for added, _ in both], [base for _, base in both]
    small = found[first.families[0], "a model a language"]
    for family in first.families[1:]:
        values = zip(found[family, "a model a language"], small, strict=True)
        added, base = ([ours - theirs for ours, theirs in zip(*both, strict=True)] for both in values)
        found[f"{family} against {first.families[0]}", "a model a language"] = added, base
    return found
