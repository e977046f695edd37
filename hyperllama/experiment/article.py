"""What a study over seeds says, as Markdown written from its results: differences, their intervals, and the paper's claims.

Every comparison is between models whose total FLOPs are the same integer, inside one seed; seeds give the interval:
mean +- t s / sqrt(n) of the paired differences, two-sided 95 %. Languages are averaged first, each weighing the same.
"""

from math import sqrt
from statistics import mean, stdev
from typing import Any

from hyperllama.errors import HyperLlamaError
from hyperllama.experiment.findings import language_name, listed, signed, words
from hyperllama.experiment.recipe import SCRATCH

Seed = dict[str, Any]
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 97.5 % quantiles of t, by n - 1
PAPERS = (
    180_078_912,
    197_300_060_160,
)  # the small model: parameters, tokens before adaptation
TITLES = {"single": "One rate for all arms", "tuned": "Rates chosen by the sweep"}


class Arms:
    """The models of one seed by id, and the averages that questions are asked of."""

    def __init__(self, seed: Seed):
        self.seed, self.rows = seed, {row["id"]: row for row in seed["models"]}
        settings = seed["settings"]
        self.base, self.targets = settings["base_language"], settings["targets"]
        self.methods = list(dict.fromkeys(row["method"] for row in seed["models"] if row["kind"] == "merge"))
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

    def forgot(self, family: str) -> float:
        """How much it rose above that of the model they started from."""
        return self.english(family) - self.bits(f"{self.base}-{family}", self.base)


def interval(values: list[float]) -> tuple[float, float | None]:
    """(mean, half the width of the 95 % interval); None where one value has none."""
    if len(values) < 2:
        return mean(values), None
    return mean(values), STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * stdev(values) / sqrt(len(values))


def article(found: dict[str, Any]) -> str:
    """The Markdown of `{"sweep": ..., "seeds": {"single": [...], "tuned": [...]}}` as seeds.py keeps them.

    Raises HyperLlamaError when a group of models said to be equal is not.
    """
    seeds = {variant: [Arms(seed) for seed in rows] for variant, rows in found["seeds"].items() if rows}
    if not seeds:
        return "# The study\n\nNo seed is finished.\n"
    first = next(iter(seeds.values()))[0]
    parts = [_head(found, seeds, first)]
    for variant, arms in seeds.items():
        parts.append(f"## {TITLES[variant]}\n\n{_answers(arms)}\n\n{_table(arms)}")
    parts += [_paper(seeds), _sweep(found["sweep"], first), _limits(seeds, first)]
    return "\n\n".join(parts) + "\n"


def _head(found: dict[str, Any], seeds: dict[str, list[Arms]], first: Arms) -> str:
    s, budgets, made = first.seed["settings"], first.seed["budgets"], first.seed["made"]
    sizes = {row["family"]: row["parameters"] for row in first.seed["models"] if row["kind"] == "language"}
    counts = listed([f"{len(arms)} at {TITLES[variant].lower()}" for variant, arms in seeds.items()])
    total = budgets["english"] + len(first.targets) * budgets["adapt"]
    trained = sum(row["spent"] for arms in seeds.values() for one in arms for row in one.seed["models"])
    dates = sorted({one.seed["made"]["date"] for arms in seeds.values() for one in arms})
    return f"""# Does growing pay at equal FLOPs?

Written by `hyperllama experiment` from the results of its seeds; change those, not this page.

{language_name(first.base)} and {len(first.targets)} added languages, {listed([language_name(tag) for tag in first.targets])} \
({first.seed["corpus"]}). Models of {sizes["1x"]:,} parameters and grown ones of {sizes.get("2x", sizes["1x"]):,}; \
windows of {s["seq_len"]} tokens, {s["global_batch"]} a step; vocabulary {s["vocab"]:,}; {s["precision"]}; \
growth noise {"none" if s["noise_db"] is None else f"{s['noise_db']:g} dB"}. Seeds finished: {counts}.

FLOPs, exact: {language_name(first.base)} {budgets["english"]:,}; an adaptation {budgets["adapt"]:,}, with {s["replay"]:.0%} of \
{language_name(first.base)} text; a merge of all languages or a joint run {total:,} in total. The grids of all seeds hold \
{trained:,} FLOPs (what two of them share was trained once), \
the sweep {found["sweep"]["flops"]:,} more, which is in no arm's ledger. \
torch {made["torch"]}, {made["machine"]} CPU, {" to ".join(dict.fromkeys((dates[0], dates[-1])))}.

A difference is that of bits per byte, in per cent where nothing else is said, of models at the same integer of FLOPs; below zero \
the first needs fewer. In brackets: the 95 % interval over seeds (t, paired), or nothing where there is one seed."""


def _percent(ours: float, theirs: float) -> float:
    return 100 * (ours / theirs - 1)


def _told(values: list[float], digits: int = 1, unit: str = " %") -> str:
    """A mean with its interval."""
    middle, half = interval(values)
    if half is None:
        return f"{signed(middle, digits)}{unit}"
    return f"{signed(middle, digits)}{unit} [{signed(middle - half, digits)}, {signed(middle + half, digits)}]"


def verdict(values: list[float]) -> str:
    """better, worse, or undecided when the interval holds zero; with one seed nothing is decided."""
    middle, half = interval(values)
    if half is None or abs(middle) <= half:
        return "undecided"
    return "better" if middle < 0 else "worse"


def growing(arms: list[Arms]) -> dict[str, list[float]]:
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


def keeping(arms: list[Arms]) -> dict[str, list[float]]:
    """Question 2: what -> differences in the base language's bits per byte after adaptation (per cent), or its rise (bits)."""
    base = language_name(arms[0].base)
    found = {f"{family}: rise by adaptation, bits": [one.forgot(family) for one in arms] for family in arms[0].families}
    for family in arms[0].families[1:]:
        values = [_percent(one.english(family), one.english("1x")) for one in arms]
        found[f"{family} against 1x, {base} after adaptation"] = values
    return found


def merging(arms: list[Arms]) -> dict[str, list[float]]:
    """Question 3: what -> differences of merges over the added languages."""
    found = {}
    for method in arms[0].methods:
        for family in arms[0].families[1:]:
            values = [_percent(one.added(f"merge-{method}-{family}"), one.added(f"merge-{method}-1x")) for one in arms]
            found[f"{words(method)}: {family} against 1x"] = values
    for family in arms[0].families:
        if f"joint-{family}" in arms[0].rows:
            best = [min(one.added(f"merge-{method}-{family}") for method in one.methods) for one in arms]
            joint = [one.added(f"joint-{family}") for one in arms]
            found[f"{family}: best merge against joint training"] = list(map(_percent, best, joint))
    return found


def _answers(arms: list[Arms]) -> str:
    sections = []
    base = language_name(arms[0].base)
    for title, found in (
        ("Does growing pay at equal FLOPs?", growing(arms)),
        (f"Does it keep {base}?", keeping(arms)),
        ("Do grown merges beat small ones?", merging(arms)),
    ):
        lines = [f"### {title}\n", "| comparison | difference | |", "| --- | --- | --- |"]
        for what, values in found.items():
            bits = what.endswith("bits")
            told = _told(values, 3, "") if bits else _told(values)
            lines.append(f"| {what} | {told} | {'' if bits else verdict(values)} |")
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def _table(arms: list[Arms]) -> str:
    first = arms[0]
    names = [f"{first.base}-{family}" for family in (*first.families, SCRATCH)]
    lines = [
        "### Bits per byte, means over seeds\n",
        f"| model | {' | '.join((first.base, *first.targets))} | mean of added |",
        f"| --- |{' --- |' * (len(first.targets) + 2)}",
    ]

    def row(what: str, cells: list[list[float]]) -> str:
        return f"| {what} | {' | '.join(f'{mean(cell):.3f}' for cell in cells)} |"

    def model(name: str) -> list[list[float]]:
        return [[one.bits(name, tag) for one in arms] for tag in (first.base, *first.targets)] + [
            [one.added(name) for one in arms]
        ]

    lines += [row(f"{name}, before adaptation", model(name)) for name in names if name in first.rows]
    for family in first.families:
        own = [[one.bits(f"{tag}-{family}", tag) for one in arms] for tag in first.targets]
        lines.append(
            row(
                f"{family}, a model a language",
                [[one.english(family) for one in arms], *own, [one.own(family) for one in arms]],
            )
        )
    for name, kept in first.rows.items():
        if kept["kind"] in ("joint", "merge"):
            what = "joint training" if kept["kind"] == "joint" else f"merge: {words(kept['method'])}"
            lines.append(row(f"{kept['family']}, {what}", model(name)))
    return "\n".join(lines)


def _paper(seeds: dict[str, list[Arms]]) -> str:
    """The paper's claims beside ours, at the best rates there are."""
    variant = "tuned" if "tuned" in seeds else "single"
    arms = seeds[variant]
    lines = [
        "## Against the paper\n",
        f"Glocker et al. 2025 (arXiv 2512.10772), at 180M and 572M parameters with about equal compute. Ours: "
        f"{TITLES[variant].lower()}.\n",
    ]
    n = len(arms)
    grown = [family for family in ("1x-cloned", "2x") if family in arms[0].families]

    def ours(found: dict[str, list[float]], keys: list[str]) -> str:
        return "; ".join(f"{key}: {_told(found[key])}, {verdict(found[key])}" for key in keys if key in found)

    def judged(found: dict[str, list[float]], keys: list[str], agree: str) -> str:
        verdicts = [verdict(found[key]) for key in keys if key in found]
        if not verdicts:
            return "**Not compared**: the grid has no such arms."
        if set(verdicts) == {agree}:
            return "**Agrees.**"
        counts = listed([f"{verdicts.count(what)} {what}" for what in dict.fromkeys(verdicts)])
        if agree in verdicts:
            return f"**Partly** ({counts})."
        other = set(verdicts) - {"undecided"}
        return f"**Differs** ({counts})." if other else f"**Not decided** by {n} {'seed' if n == 1 else 'seeds'}."

    first, second, third = growing(arms), keeping(arms), merging(arms)
    keys = [f"{family} against 1x, a model a language" for family in grown]
    lines.append(
        "1. *Given enough text of the target language, grown models match or pass small ones.* "
        f"{judged(first, keys, 'better')} {ours(first, keys)}."
    )
    base = language_name(arms[0].base)
    keys = [f"{family} against 1x, {base} after adaptation" for family in grown]
    rises = listed(
        [f"{family} {signed(interval([one.forgot(family) for one in arms])[0])}" for family in arms[0].families]
    )
    lines.append(
        f"2. *Scale keeps {base}.* {judged(second, keys, 'better')} {ours(second, keys)}. Rise by adaptation, in bits: {rises}."
    )
    keys = [key for key in third if "against 1x" in key]
    lines.append(f"3. *Grown merges beat small ones.* {judged(third, keys, 'better')} {ours(third, keys)}.")
    keys = [key for key in third if "joint" in key]
    lines.append(f"4. *Merging stays behind joint training.* {judged(third, keys, 'worse')} {ours(third, keys)}.")
    return "\n".join(lines)


def _sweep(sweep: dict[str, Any], first: Arms) -> str:
    rates = sweep["settings"]["sweep"]["rates"]
    lines = [
        "## The sweep\n",
        f"{len(rates)} trials for each size and family, with a seed of their own and on development text that no figure above is "
        f"measured on; adaptations to {language_name(sweep['settings']['sweep']['language'])} alone, whose rate all of a family's "
        f"adaptations and its joint run take. FLOPs of all trials and of what they start from: {sweep['flops']:,}.\n",
        f"| group | {' | '.join(f'{rate:g}' for rate in rates)} | chosen | FLOPs a trial |",
        f"| --- |{' --- |' * (len(rates) + 2)}",
    ]
    for group, rate in sweep["chosen"].items():
        trials = {row["rate"]: row for row in sweep["trials"] if row["group"] == group}
        bits = " | ".join(f"{trials[tried]['bits_per_byte']:.3f}" for tried in rates)
        edge = ", at the edge" if rate in (min(rates), max(rates)) else ""
        lines.append(f"| {group} | {bits} | {rate:g}{edge} | {trials[rate]['flops']:,} |")
    return "\n".join(lines)


def _limits(seeds: dict[str, list[Arms]], first: Arms) -> str:
    fewest = min(len(arms) for arms in seeds.values())
    small = min(row["parameters"] for row in first.seed["models"])
    tokens = first.seed["settings"]["english_tokens"]
    few = "Intervals are not corrected for the number of comparisons."
    if fewest < 5:
        few = "With so few seeds an interval is wide, and one that excludes zero may do so by chance. " + few
    return f"""## What this does not show

The paper's small model has {PAPERS[0] / small:,.0f} times as many parameters, and before adaptation it saw \
{PAPERS[1] / tokens:,.0f} times as much text: \
in a budget as small as this a wider model takes few steps, and where it loses, it may lose for that reason alone. \
Seeds share tokenizer and text. {few} \
Bits per byte of different languages are not the same amount of text."""
