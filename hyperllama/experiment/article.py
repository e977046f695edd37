"""What a study over seeds says, as Markdown written from its results: differences, their intervals, and the paper's claims.

Every comparison is between models whose total FLOPs are the same integer, inside one seed; what a merge that reads text spends more
is told beside it. Figures and intervals: questions.py.
"""

from math import sqrt
from statistics import mean
from typing import Any

from hyperllama.config import ModelSettings
from hyperllama.experiment.findings import language_name, listed, signed, words
from hyperllama.experiment.questions import (
    Answers,
    Arms,
    Closing,
    closing,
    growing,
    interval,
    keeping,
    merging,
    pairs,
    verdict,
)
from hyperllama.experiment.recipe import SCRATCH
from hyperllama.flops import window_flops

PAPERS = 180_078_912, 197_300_060_160  # the small model: parameters, tokens before adaptation
TITLES = {"single": "One rate for all arms", "tuned": "Rates chosen by the sweep"}


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


def _told(values: list[float], digits: int = 1, unit: str = " %", difference: bool = True) -> str:
    """A mean with its interval; a difference has its sign."""

    def told(value: float) -> str:
        return signed(value, digits) if difference or value < 0 else f"{value:.{digits}f}"

    middle, half = interval(values)
    if half is None:
        return f"{told(middle)}{unit}"
    return f"{told(middle)}{unit} [{told(middle - half)}, {told(middle + half)}]"


def _closing(arms: list[Arms]) -> str:
    """The section on merges that know of languages; "" where there is none."""
    found = closing(arms)
    if not found:
        return ""
    lines = [
        "### Do merges that know of languages close the gap?\n",
        "Against the best of the paper's merges in each seed, which is chosen on the very text that is measured; of the way from "
        "there to joint training. What reads text spends FLOPs that no joint run got: they are told as a share of its total, and "
        "the merge is not at equal FLOPs by that much.\n",
        "| merge | against the best of the paper's | | of the gap closed | own FLOPs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in found:
        spent = f"{one.spent:.1f} %" if one.spent else "0"
        lines.append(
            f"| {one.family}: {words(one.method)} | {_told(one.difference)} | {verdict(one.difference)} "
            f"| {_gap(one)} | {spent} |"
        )
    return "\n".join(lines)


def _gap(one: Closing) -> str:
    """The share of the gap that was closed."""
    return _told(one.closed, 0, difference=False) if one.closed else "no gap"


def _by_family(found: list[Closing]) -> list[list[Closing]]:
    return [[one for one in found if one.family == family] for family in dict.fromkeys(one.family for one in found)]


def _pairs(arms: list[Arms]) -> str:
    """The section on minimal pairs; "" where none were measured."""
    found = pairs(arms)
    if not found:
        return ""
    first = arms[0]
    counts = [next(iter(first.rows.values()))["eval"][tag]["pairs"] for tag in (first.base, *first.targets)]
    told = f"{counts[0]} pairs each" if len(set(counts)) == 1 else f"{listed(list(map(str, counts)))} pairs"
    error = 50 / sqrt(sum(counts[1:]))
    lines = [
        "### Minimal pairs\n",
        f"Per cent right, chance 50, differences in points; {told} of "
        f"{listed([first.base, *first.targets])}. The interval is over seeds, on the same pairs; other pairs would move a mean of "
        f"added languages by up to {error:.1f} points (one standard error), {language_name(first.base)} by "
        f"{50 / sqrt(counts[0]):.1f}.\n",
        f"| | added languages | {language_name(first.base)} |",
        "| --- | --- | --- |",
    ]
    for (family, what), both in found.items():
        added, base = (_told(values, unit="", difference="against" in family) for values in both)
        lines.append(f"| {family}, {what} | {added} | {base} |")
    return "\n".join(lines)


def _answers(arms: list[Arms]) -> str:
    sections = []
    base = language_name(arms[0].base)
    for title, found in (
        ("Does growing pay at equal FLOPs?", growing(arms)),
        (f"Does it keep {base}?", keeping(arms)),
        ("Do grown merges of the paper's kinds beat small ones?", merging(arms)),
    ):
        lines = [f"### {title}\n", "| comparison | difference | |", "| --- | --- | --- |"]
        for what, values in found.items():
            bits = what.endswith("bits")
            told = _told(values, 3, "") if bits else _told(values)
            lines.append(f"| {what} | {told} | {'' if bits else verdict(values)} |")
        sections.append("\n".join(lines))
    return "\n\n".join(filter(None, [*sections, _closing(arms), _pairs(arms)]))


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

    def ours(found: Answers, keys: list[str]) -> str:
        return "; ".join(f"{key}: {_told(found[key])}, {verdict(found[key])}" for key in keys if key in found)

    def judged(found: Answers, keys: list[str], agree: str) -> str:
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
    if best := [min(rows, key=lambda one: mean(one.difference)) for rows in _by_family(closing(arms))]:
        told = [
            f"{one.family}: {words(one.method)} {_told(one.difference)} against the best of the paper's, "
            f"{_gap(one)} of the gap closed"
            for one in best
        ]
        lines.append(f"5. Not in the paper: merges that know of languages; the best of each family. {'; '.join(told)}.")
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
    settings = first.seed["settings"]
    tokens, shape = (
        settings["english_tokens"],
        ModelSettings(**settings["model"]).resolve(settings["vocab"], settings["seq_len"]),
    )
    costs = [window_flops(config, settings["seq_len"]) for config in (shape, shape.grown(settings["factor"]))]
    steps = [-(-first.seed["budgets"]["adapt"] // (cost * settings["global_batch"])) for cost in costs]
    few = "Intervals are not corrected for the number of comparisons."
    if fewest < 5:
        few = "With so few seeds an interval is wide, and one that excludes zero may do so by chance. " + few
    return f"""## What this does not show

The paper's small model has {PAPERS[0] / small:,.0f} times as many parameters, and before adaptation it saw \
{PAPERS[1] / tokens:,.0f} times as much text: \
in a budget as small as this a wider model takes few steps (an adaptation is {steps[0]:,} at 1x, {steps[1]:,} of a grown model), \
and where it loses, it may lose for that reason alone. \
Seeds share tokenizer and text. {few} \
Bits per byte of different languages are not the same amount of text."""
