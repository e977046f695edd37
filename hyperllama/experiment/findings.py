"""What a study's numbers say: the comparisons it holds, and sentences computed from them.

A comparison is made only inside a group of `results["equal"]`, whose ledgers are the same integer. Bits per byte are
compared as printed, to three decimals: arms that agree to three decimals are called equal.
"""

import math
from statistics import mean
from typing import Any

from hyperllama.errors import HyperLlamaError
from hyperllama.experiment.merges import PAPERS, TITLES

Row = dict[str, Any]
Finding = tuple[str, str]  # topic, sentence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of equal groups
FAMILIES = ("1x", "1x-cloned", "2x", "2x-scratch")
LANGUAGE_NAMES = {
    "eng": "English", "est": "Estonian", "fao": "Faroese", "fas": "Persian", "isl": "Icelandic", "swe": "Swedish",
}  # fmt: skip


def language_name(tag: str) -> str:
    """A language's English name; the tag itself when it is another language."""
    return LANGUAGE_NAMES.get(tag, tag)


def bits(row: Row, language: str) -> float | None:
    """Bits per byte of a model on a language; None when it was not measured or is not finite."""
    value = row["eval"].get(language, {}).get("bits_per_byte")
    return value if value is not None and math.isfinite(value) else None


def average_bits(row: Row, languages: list[str]) -> float | None:
    """Mean bits per byte over languages, each weighing the same; None when one is missing."""
    return average([bits(row, language) for language in languages])


def average(values: list[float | None]) -> float | None:
    """Mean; None when there is no value or one is None."""
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None


class View:
    """The models of `results`, found by what they are.

    Raises HyperLlamaError when a ledger does not add up, or a model of an equal group has another than the group.
    """

    def __init__(self, results: dict[str, Any]):
        self.results = results
        self.rows: list[Row] = results["models"]
        self.by_id = {row["id"]: row for row in self.rows}
        self.languages: list[str] = results["languages"]
        self.base: str = results["base_language"]
        self.targets: list[str] = results["targets"]
        present = {row["family"] for row in self.rows}
        self.families = [family for family in FAMILIES if family in present]
        self.families += sorted(present - set(FAMILIES))
        self._check()

    def _check(self) -> None:
        for row in self.rows:
            if row["spent"] + row["inherited"] != row["total"]:
                raise HyperLlamaError(
                    f"{row['id']}: spent {row['spent']} and inherited {row['inherited']} FLOPs do not add up to "
                    f"{row['total']}"
                )
        for group in self.results.get("equal", []):
            for name in group["ids"]:
                if name not in self.by_id:
                    raise HyperLlamaError(
                        f"equal group '{group['what']}' names {name}, which is no model of the results"
                    )
                if self.by_id[name][group["by"]] != group["flops"]:
                    raise HyperLlamaError(
                        f"equal group '{group['what']}': {name} has {self.by_id[name][group['by']]} FLOPs "
                        f"({group['by']}), the group {group['flops']}"
                    )

    def of_kind(self, kind: str) -> list[Row]:
        """Rows of a kind, by family; of merges those of all languages."""
        rows = [row for row in self.rows if row["kind"] == kind]
        if kind == "merge":
            rows = [row for row in rows if len(row["parents"]) == len(self.targets)]
        return sorted(rows, key=lambda row: self.families.index(row["family"]))

    def letters(self) -> dict[str, str]:
        """id -> letters of the equal groups it is in."""
        found: dict[str, str] = {}
        for letter, group in zip(LETTERS, self.results.get("equal", []), strict=False):
            for name in group["ids"]:
                found[name] = found.get(name, "") + letter
        return found

    def arms(self, language: str) -> tuple[int, dict[str, Row]]:
        """The models of one language with equal ledgers: (their FLOPs, family -> row); (0, {}) when there are none.

        A clone, which spends nothing, stands in its group when it inherits the group's total.
        """
        for group in self.results.get("equal", []):
            rows = [self.by_id[name] for name in group["ids"]]
            members = {row["family"]: row for row in rows if row["language"] == language}
            if members:
                clones = [row for row in self.of_kind("clone") if row["language"] == language]
                extra = {row["family"]: row for row in clones if row[group["by"]] == group["flops"]}
                members = extra | members
                return group["flops"], {family: members[family] for family in self.families if family in members}
        return 0, {}

    def language_models(self, family: str) -> dict[str, Row]:
        """target language -> the family's model of that language."""
        found = {row["language"]: row for row in self.of_kind("language") if row["family"] == family}
        return {tag: found[tag] for tag in self.targets if tag in found}

    def base_model(self, family: str) -> Row | None:
        """The base-language model that the family's language models start from."""
        for row in [*self.language_models(family).values(), *self.of_kind("joint")]:
            if row["family"] == family and row["parents"]:
                return self.by_id.get(row["parents"][0])
        return None

    def methods(self) -> list[str]:
        """Merge methods, in the order of the results."""
        return list(dict.fromkeys(row["method"] for row in self.rows if row["kind"] == "merge"))

    def comparison(self) -> list[tuple[str, str, dict[str, float | None]]]:
        """The merge table: (family, what, language -> bits per byte), what is measured and what it is held against."""
        table: list[tuple[str, str, dict[str, float | None]]] = []
        for family in self.families:
            base, singles = self.base_model(family), self.language_models(family)
            if base is not None:
                table.append((family, "before adaptation", {tag: bits(base, tag) for tag in self.languages}))
            if singles:
                own = {tag: bits(row, tag) for tag, row in singles.items()} | (
                    {self.base: bits(base, self.base)} if base else {}
                )
                table.append((family, "own-language model", own))
                means = {tag: average([bits(row, tag) for row in singles.values()]) for tag in self.languages}
                table.append((family, "mean of single-language models", means))
            for row in [*self.of_kind("merge"), *self.of_kind("joint")]:
                if row["family"] == family:
                    what = f"merge: {words(row['method'])}" if row["kind"] == "merge" else "joint training"
                    table.append((family, what, {tag: bits(row, tag) for tag in self.languages}))
        return table

    def subsets(self) -> tuple[list[tuple[str, str]], dict[tuple[str, ...], dict[tuple[str, str], float | None]]]:
        """Merges of sets of languages: ((family, method) in order, set -> (family, method) -> mean bits per byte over the set)."""
        language = {row["id"]: row["language"] for row in self.rows}
        found: dict[tuple[str, ...], dict[tuple[str, str], float | None]] = {}
        merges = [row for row in self.rows if row["kind"] == "merge"]
        for row in merges:
            members = tuple(language[parent] for parent in row["parents"] if language.get(parent))
            found.setdefault(members, {})[row["family"], row["method"]] = average_bits(row, list(members))
        columns = [(family, method) for family in self.families for method in self.methods()]
        order = sorted(found, key=lambda members: (len(members), [self.languages.index(tag) for tag in members]))
        return [column for column in columns if any(column in cells for cells in found.values())], {
            members: found[members] for members in order
        }

    def scaling(self) -> list[tuple[str, str, int, float | None, float | None]]:
        """(family, moment, total FLOPs, bits per byte of the base language, mean of the added ones), by family and FLOPs.

        The added languages after adaptation to one: each by its own model, and the base language the mean of those models.
        """
        found = []
        for family in self.families:
            points: list[tuple[str, int, float | None, float | None]] = []
            for row in [*self.of_kind("base"), *self.of_kind("joint")]:
                if row["family"] == family:
                    what = "joint training" if row["kind"] == "joint" else "before adaptation"
                    points.append((what, row["total"], bits(row, self.base), average_bits(row, self.targets)))
            singles = self.language_models(family)
            if len({row["total"] for row in singles.values()}) == 1:
                kept = average([bits(row, self.base) for row in singles.values()])
                own = average([bits(row, tag) for tag, row in singles.items()])
                points.append(("a model a language", next(iter(singles.values()))["total"], kept, own))
            for row in self.of_kind("merge"):
                if row["family"] == family:
                    means = bits(row, self.base), average_bits(row, self.targets)
                    points.append((f"merge: {words(row['method'])}", row["total"], *means))
            found += [(family, *point) for point in sorted(points, key=lambda point: point[1])]
        return found

    def forgetting(self) -> list[tuple[Row, float, float]]:
        """(model, base-language bits per byte before its adaptation, and after) for every adapted model."""
        changes = []
        for row in [*self.of_kind("language"), *self.of_kind("joint")]:
            parent = self.by_id.get(row["parents"][0]) if row["parents"] else None
            before, after = bits(parent, self.base) if parent else None, bits(row, self.base)
            if before is not None and after is not None:
                changes.append((row, before, after))
        return changes


def words(name: str) -> str:
    """task_arithmetic -> task arithmetic; adam_v -> Adam's v."""
    return TITLES.get(name, name.replace("_", " "))


def listed(items: list[str]) -> str:
    """a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def signed(value: float, digits: int = 3) -> str:
    """A signed decimal with a true minus; a value that rounds to zero has no sign."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def lowest(values: dict[str, float]) -> list[str]:
    """The names of the lowest value; several when they agree to three decimals."""
    least = round(min(values.values()), 3)
    return [name for name, value in values.items() if round(value, 3) == least]


def findings(view: View) -> list[Finding]:
    """What the numbers say, and no more."""
    return [
        *_base(view), *_languages(view), *_growing(view), *_forgetting(view), *_merging(view), *_pairs(view),
    ]  # fmt: skip


def _measured(rows: dict[str, Row], language: str) -> dict[str, float]:
    values = {family: bits(row, language) for family, row in rows.items()}
    return {family: value for family, value in values.items() if value is not None}


def _base(view: View) -> list[Finding]:
    flops, rows = view.arms(view.base)
    values = _measured({family: row for family, row in rows.items() if row["kind"] == "base"}, view.base)
    if len(values) < 2:
        return []
    best = lowest(values)
    figures = listed([f"{family} {value:.3f}" for family, value in sorted(values.items(), key=lambda item: item[1])])
    base = language_name(view.base)
    return [
        (
            f"{base} alone",
            f"Of {len(values)} models of {flops:,} FLOPs each, {listed(best)} {'needs' if len(best) == 1 else 'need'} "
            f"the fewest bits per byte ({figures}).",
        )
    ]


def _languages(view: View) -> list[Finding]:
    wins: dict[str, list[str]] = {}
    ties, margins, budget = [], [], set()
    for tag in view.targets:
        flops, rows = view.arms(tag)
        values = _measured(rows, tag)
        if len(values) < 2:
            continue
        budget.add(flops)
        best = lowest(values)
        if len(best) > 1:
            ties.append(f"{listed(best)} are equal for {language_name(tag)} ({values[best[0]]:.3f})")
            continue
        second = sorted(values.values())[1]
        margins.append(100 * (second / values[best[0]] - 1))
        wins.setdefault(best[0], []).append(f"{language_name(tag)} ({values[best[0]]:.3f})")
    if not budget:
        return []
    parts = [
        f"{family} needs the fewest bits per byte for {listed(wins[family])}"
        for family in view.families
        if family in wins
    ]
    cost = f"At {budget.pop():,} FLOPs each" if len(budget) == 1 else "At FLOPs equal within each language"
    sentence = f"{cost}, {'; '.join(parts + ties)}."
    if margins:
        sentence += f" The next family needs {_span(margins)} % more."
    return [("One model per language", sentence)]


def _span(values: list[float], digits: int = 1) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def _growing(view: View) -> list[Finding]:
    sentences = []
    for family in view.families:
        changes = []
        for tag in view.targets:
            values = _measured(view.arms(tag)[1], tag)
            if "1x" in values and family in values and family != "1x":
                changes.append(100 * (values[family] / values["1x"] - 1))
        if changes:
            fewer = sum(signed(change, 1).startswith("\N{MINUS SIGN}") for change in changes)
            low, high = signed(min(changes), 1), signed(max(changes), 1)
            spread = f", from {low} to {high} %" if low != high else ""
            sentence = (
                f"Against 1x at equal FLOPs, both after adaptation: {signed(mean(changes), 1)} % bits per byte on "
                f"average{spread}; fewer in {fewer} of {len(changes)} languages."
            )
            sentences.append((f"What {family} changed", sentence))
    clone, small = view.by_id.get(f"{view.base}-1x-cloned"), view.by_id.get(f"{view.base}-1x")
    if clone and small:
        grown, before = bits(clone, view.base), bits(small, view.base)
        if grown is not None and before is not None:
            noise = view.results.get("noise_db")
            how = "without noise" if noise is None else f"with noise at {noise:g} dB"
            same = f"left {language_name(view.base)} at {before:.3f} bits per byte"
            moved = f"moved {language_name(view.base)} from {before:.3f} to {grown:.3f} bits per byte"
            moved = same if f"{before:.3f}" == f"{grown:.3f}" else moved
            sentences.append(("Growing alone", f"Growing the finished 1x model, {how} and without training, {moved}."))
    return sentences


def _forgetting(view: View) -> list[Finding]:
    changes = [(row, after - before) for row, before, after in view.forgetting() if row["kind"] == "language"]
    if not changes:
        return []
    rose = sum(round(change, 3) > 0 for _, change in changes)
    per_family = [
        f"{family} {signed(mean(change for row, change in changes if row['family'] == family))}"
        for family in view.families
        if any(row["family"] == family for row, _ in changes)
    ]
    row, worst = max(changes, key=lambda item: item[1])
    base = language_name(view.base)
    sentence = (
        f"After adaptation to one other language, {base} bits per byte rose in {rose} of {len(changes)} models "
        f"(mean change: {listed(per_family)}). The largest change is {row['id']}'s, {signed(worst)}."
    )
    return [(f"Forgetting {base}", sentence)]


def _merging(view: View) -> list[Finding]:
    merges = {
        row["id"]: value for row in view.of_kind("merge") if (value := average_bits(row, view.targets)) is not None
    }
    if not merges:
        return []
    names = lowest(merges)
    best = view.by_id[names[0]]
    singles = view.language_models(best["family"])
    own = average([bits(row, tag) for tag, row in singles.items()])
    anywhere = average([average_bits(row, view.targets) for row in singles.values()])
    before = best["inherited"]  # total, but for what the merge itself spent
    joint = [row for row in view.of_kind("joint") if row["family"] == best["family"] and row["total"] == before]
    together = average_bits(joint[0], view.targets) if joint else None
    held = []
    if anywhere is not None:
        held.append(f"the single-language models it was made from, each on all of these languages, {anywhere:.3f}")
    if own is not None:
        held.append(f"the same models, each on its own language, {own:.3f}")
    if together is not None:
        more = f"{best['spent']:,} FLOPs fewer" if best["spent"] else "the same total FLOPs"
        held.append(f"joint training with {more}, {together:.3f}")
    papers = {name: value for name, value in merges.items() if view.by_id[name]["method"] in PAPERS}
    if papers and best["method"] not in PAPERS:
        least = lowest(papers)
        held.append(f"the best of the paper's merges, {listed(least)}, {papers[least[0]]:.3f}")
    sentence = (
        f"Mean bits per byte over the {len(view.targets)} added languages: of {len(merges)} merges, {listed(names)} "
        f"{'needs' if len(names) == 1 else 'need'} the fewest, {merges[names[0]]:.3f}."
    )
    return [("Merging", sentence + (f" For comparison: {'; '.join(held)}." if held else ""))]


def _pairs(view: View) -> list[Finding]:
    measured = [
        (cell["accuracy"], row["id"], tag, cell["pairs"])
        for row in view.rows
        for tag, cell in row["eval"].items()
        if cell.get("pairs")
    ]
    if not measured:
        return []
    low, high = min(measured), max(measured)
    error = 100 * math.sqrt(0.25 / min(pairs for *_, pairs in measured))
    sentence = (
        f"Accuracy lies between {100 * low[0]:.1f} % ({low[1]}, {language_name(low[2])}) and {100 * high[0]:.1f} % "
        f"({high[1]}, {language_name(high[2])}). Chance is 50 %, where the choice of pairs alone gives a standard "
        f"error of up to {error:.1f} points."
    )
    return [("Minimal pairs", sentence)]
