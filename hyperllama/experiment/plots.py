"""The pictures of a study. Each comes wide (for a screen or paper) and narrow (for a phone), as PNG bytes.

A family has one colour and one marker everywhere (Okabe and Ito's palette, safe for colour-blind readers; markers also
tell families apart without colour). The bytes are a pure function of the results and the matplotlib version.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from hyperllama.experiment.findings import View, average, bits, language_name, signed, words

INK, SOFT, RULE = "#1d2329", "#667079", "#e3e7ea"
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 8.5, "text.color": INK, "axes.labelcolor": SOFT,
    "axes.edgecolor": "#b5bcc2", "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.formatter.useoffset": False,
    "xtick.color": "#b5bcc2", "xtick.labelcolor": SOFT, "xtick.labelsize": 8,
    "ytick.color": "#b5bcc2", "ytick.labelcolor": SOFT, "ytick.labelsize": 8,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": RULE, "grid.linewidth": 0.7, "legend.frameon": False,
    "figure.constrained_layout.use": True,
}  # fmt: skip
LOOKS = {"1x": ("#0072B2", "o"), "1x-cloned": ("#D55E00", "s"), "2x": ("#009E73", "D"), "2x-scratch": ("#7A7F85", "^")}
HEAT = LinearSegmentedColormap.from_list("heat", ["#ffffff", "#dcebf3", "#9cc5dd", "#4d94bd", "#14527d"])
COLOURS = 160
WIDE, NARROW = 8.6, 3.9  # inches; the page shows them at about 860 and 350 CSS pixels


@dataclass(frozen=True)
class Picture:
    """One plot: file stem, the table with its numbers, what it shows in words, and its two renderings."""

    name: str
    table: str
    title: str
    alt: str
    caption: str
    wide: bytes
    narrow: bytes


def look(family: str) -> tuple[str, str]:
    """Colour and marker of a family."""
    return LOOKS.get(family, ("#CC79A7", "v"))


def pictures(view: View) -> list[Picture]:
    """All plots for which the results hold numbers."""
    base = language_name(view.base)
    plots: list[tuple[str, str, str, str, str, Callable[[View, bool], Figure | None]]] = [
        ("loss", "loss", "Training loss against total FLOPs", "Line plots, one panel per language, one line per family.",
         "Each run's loss on its own training mixture, against everything spent on the model so far, ancestors too. "
         "Marked ends of a panel are the same integer of FLOPs. A dotted line: the small model was grown here. "
         "The first tenth of a run may leave the top of its panel; the y-axes differ.", loss),
        ("bits", "bits", "Bits per byte at equal FLOPs", "Dot plot: languages by families, and the difference from 1x.",
         "Development text of each language, measured on that language's own models. Lower is better. "
         "Bytes are not the same amount of text in every script, so compare families, not languages.", bits_per_byte),
        ("scaling", "scaling", "Bits per byte against total FLOPs", "Two line plots: the base language, and the added ones.",
         f"{base} and the mean of added languages at exact total FLOPs. A line follows a family from before adaptation over "
         "one model a language (each measured on its own, English on all) to joint training; hollow marks: merges, "
         "those that read text with what that cost.", scaling),
        ("forgetting", "forgetting", f"What adaptation did to {base}", f"Dumbbell plot of {base} bits per byte before and after.",
         f"{base} bits per byte before (hollow) and after (filled) adaptation. To the right: forgotten.", forgetting),
        ("merges", "comparison", "Merging against its alternatives", "Heat-map of bits per byte: models by languages.",
         "Bits per byte; a darker cell needs more, relative to the best of its column; a frame marks the best merge of "
         "a column. Own-language model: each column is another model. Last column: mean of added languages.", merges),
        ("subsets", "subsets", "Merges of every set of languages", "Heat-map of bits per byte: sets by family and method.",
         "Mean bits per byte of a merge over the languages that were merged; a darker cell needs more, relative to the best "
         "of its row, whose cell is framed.", subsets),
    ]  # fmt: skip
    drawn = []
    with matplotlib.style.context(["default", STYLE]):
        for name, table, title, alt, caption, draw in plots:
            wide, narrow = draw(view, False), draw(view, True)
            if wide is not None and narrow is not None:
                drawn.append(Picture(name, table, title, alt, caption, _png(wide, 160), _png(narrow, 200)))
    return drawn


def _png(figure: Figure, dpi: int) -> bytes:
    """PNG of a palette: a third of the bytes, and no eye tells."""
    raw, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    with Image.open(raw) as picture:
        small = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    small.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _legend(
    figure: Figure, families: list[str], line: Literal["-", "none"] = "none", extra: tuple[Line2D, ...] = ()
) -> None:
    keys = [
        Line2D(
            [],
            [],
            color=look(family)[0],
            marker=look(family)[1],
            markersize=5,
            linestyle=line,
            linewidth=1.6,
            label=family,
        )
        for family in families
    ]
    figure.legend(
        handles=[*keys, *extra], loc="outside upper left", ncols=len(keys) + len(extra),
        handletextpad=0.5, columnspacing=1.6, fontsize=8.5, borderaxespad=0.1,
    )  # fmt: skip


def loss(view: View, narrow: bool) -> Figure | None:
    """A panel per language and one for joint runs: training loss (nats per token) against exact total FLOPs."""
    panels: dict[str, list[str]] = {}
    for row in view.rows:
        if view.results.get("curves", {}).get(row["id"]):
            key = "All languages jointly" if row["kind"] == "joint" else language_name(row["language"] or view.base)
            panels.setdefault(key, []).append(row["id"])
    if not panels:
        return None
    columns = min(len(panels), 2 if narrow else 4)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(NARROW if narrow else WIDE, (1.55 if narrow else 2.0) * lines + 0.6))
    exponent = 3 * int(math.log10(max(row["total"] for row in view.rows)) // 3)
    for place, (title, ids) in enumerate(panels.items()):
        axes = figure.add_subplot(lines, columns, place + 1)
        top, bottom, end = -math.inf, math.inf, max(view.by_id[name]["total"] for name in ids)
        for name in ids:
            points = np.array([point for point in view.results["curves"][name] if math.isfinite(point[1])], dtype=float)
            if not len(points):
                continue
            colour, marker = look(view.by_id[name]["family"])
            axes.plot(points[:, 0] / 10**exponent, points[:, 1], color=colour, linewidth=1.4, solid_capstyle="round")
            if view.by_id[name]["total"] == end:
                axes.plot(
                    points[-1, 0] / 10**exponent,
                    points[-1, 1],
                    color=colour,
                    marker=marker,
                    markersize=4,
                    clip_on=False,
                )
            parent = view.by_id.get(next(iter(view.by_id[name]["parents"]), ""))
            if parent and parent["kind"] == "clone" and parent["language"] == view.by_id[name]["language"]:
                axes.axvline(parent["total"] / 10**exponent, color=colour, linewidth=1, linestyle=":")
            settled = points[len(points) // 10 :, 1]
            top, bottom = max(top, settled.max()), min(bottom, settled.min())
        if math.isfinite(top):
            margin = 0.06 * (top - bottom) + 1e-3
            axes.set_ylim(bottom - margin, top + margin)
        axes.set_title(title)
        axes.xaxis.set_major_locator(MaxNLocator(3 if narrow else 4, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    figure.supxlabel(f"total FLOPs, dense ($\\times10^{{{exponent}}}$)", fontsize=8.5, color=SOFT)
    figure.supylabel("training loss (nats per token)", fontsize=8.5, color=SOFT)
    _legend(figure, view.families, "-")
    return figure


def scaling(view: View, narrow: bool) -> Figure | None:
    """Two panels: bits per byte of the base language, and the mean of added ones, against exact total FLOPs."""
    points = view.scaling()
    if len({flops for _, _, flops, *_ in points}) < 2:
        return None
    figure = Figure(figsize=(NARROW, 5.2) if narrow else (WIDE, 3.3))
    panels = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    exponent = 3 * int(math.log10(max(flops for _, _, flops, *_ in points)) // 3)
    for column, (axes, title) in enumerate(
        zip(panels, (language_name(view.base), "Added languages, mean"), strict=True)
    ):
        for family in view.families:
            colour, marker = look(family)
            line: list[tuple[float, float]] = []
            for _, what, flops, *values in (point for point in points if point[0] == family):
                value = values[column]
                if value is None:
                    continue
                x = flops / 10**exponent
                if what.startswith("merge"):
                    axes.plot(x, value, marker=marker, color=colour, markerfacecolor="white", markersize=4.5)
                else:
                    line.append((x, value))
            if line:
                axes.plot(*zip(*line, strict=True), color=colour, marker=marker, markersize=4.5, linewidth=1.4)
        axes.set_title(title)
        axes.margins(x=0.06, y=0.1)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    figure.supxlabel(f"total FLOPs, dense ($\\times10^{{{exponent}}}$)", fontsize=8.5, color=SOFT)
    figure.supylabel("bits per byte", fontsize=8.5, color=SOFT)
    _legend(figure, view.families, "-")
    return figure


def bits_per_byte(view: View, narrow: bool) -> Figure | None:
    """Dots: bits per byte of every language's own models; beside them the difference from 1x in per cent."""
    languages = [tag for tag in view.languages if any(bits(row, tag) is not None for row in view.arms(tag)[1].values())]
    if not languages:
        return None
    families = [family for family in view.families if any(family in view.arms(tag)[1] for tag in languages)]
    height = 0.17 * len(families) * len(languages) + 0.16 * len(languages)
    figure = Figure(figsize=(NARROW, 2 * height + 1.3) if narrow else (WIDE, height + 0.9))
    left, right = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    stride = len(families) + 1
    for place, tag in enumerate(languages):
        rows = view.arms(tag)[1]
        small = bits(rows["1x"], tag) if "1x" in rows else None
        order = [family for family in families if family in rows]
        for slot, family in enumerate(order):
            y, value = place * stride + slot + (len(families) - len(order)) / 2, bits(rows[family], tag)
            if value is None:
                continue
            colour, marker = look(family)
            left.plot(value, y, marker=marker, color=colour, markersize=5)
            _beside(left, value, y, f"{value:.3f}", 1)
            if small is not None:
                change = 100 * (value / small - 1)
                right.hlines(y, 0, change, color=colour, linewidth=1.6)
                right.plot(change, y, marker=marker, color=colour, markersize=5)
                if family != "1x":
                    _beside(right, change, y, signed(change, 1), -1 if change < 0 else 1)
    right.axvline(0, color="#9aa2a9", linewidth=0.9, zorder=1)
    for axes, title, label in (
        (left, "Level", "bits per byte (lower is better)"),
        (right, "Against 1x", "difference from 1x (%)"),
    ):
        _language_rows(axes, [language_name(tag) for tag in languages], stride, len(families))
        axes.set_title(title)
        axes.set_xlabel(label)
        axes.margins(x=0.16)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if not narrow:
        right.tick_params(axis="y", labelleft=False)
    _legend(figure, families)
    return figure


def _beside(axes: Axes, x: float, y: float, text: str, side: int) -> None:
    """A small label left (-1) or right (1) of a mark."""
    axes.annotate(
        text, (x, y), (6 * side, 0), textcoords="offset points", va="center", ha="left" if side > 0 else "right",
        fontsize=7, color=SOFT,
    )  # fmt: skip


def _language_rows(axes: Axes, names: list[str], stride: int, slots: int) -> None:
    """Rows from top to bottom, a group per name, thin rules between groups."""
    axes.set_yticks([place * stride + (slots - 1) / 2 for place in range(len(names))], names)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(names) * stride - 0.9, -1.1)
    axes.grid(axis="y", visible=False)
    for place in range(1, len(names)):
        axes.axhline(place * stride - 1, color=RULE, linewidth=0.7)
    axes.spines["left"].set_visible(False)


def forgetting(view: View, narrow: bool) -> Figure | None:
    """Dumbbells: base-language bits per byte before and after every adaptation."""
    changes = view.forgetting()
    if not changes:
        return None
    groups: dict[str, list[tuple[str, float, float]]] = {}
    for row, before, after in changes:
        name = language_name(row["language"]) if row["kind"] == "language" else "All, jointly"
        groups.setdefault(name, []).append((row["family"], before, after))
    families = [family for family in view.families if any(row["family"] == family for row, *_ in changes)]
    order = [name for name in [*map(language_name, view.targets), "All, jointly"] if name in groups]
    height = (0.17 * len(families) + 0.16) * len(order) + 0.9
    figure = Figure(figsize=(NARROW if narrow else WIDE, height))
    axes = figure.add_subplot()
    stride = len(families) + 1
    for place, name in enumerate(order):
        for family, before, after in groups[name]:
            y, (colour, marker) = place * stride + families.index(family), look(family)
            axes.plot([before, after], [y, y], color=colour, linewidth=1.8, alpha=0.55, solid_capstyle="butt")
            axes.plot(before, y, marker=marker, markersize=5, color=colour, markerfacecolor="white")
            axes.plot(after, y, marker=marker, markersize=5, color=colour)
            _beside(axes, after, y, signed(after - before), 1 if after >= before else -1)
    _language_rows(axes, order, stride, len(families))
    axes.margins(x=0.1)
    axes.set_xlabel(f"{language_name(view.base)} bits per byte (label: change)")
    dots = (
        Line2D([], [], color=SOFT, marker="o", markersize=5, linestyle="none", markerfacecolor="white", label="before"),
        Line2D([], [], color=SOFT, marker="o", markersize=5, linestyle="none", label="after"),
    )
    _legend(figure, families, extra=() if narrow else dots)
    return figure


def merges(view: View, narrow: bool) -> Figure | None:
    """Heat-map: merge methods, single-language models and joint training, by language, in bits per byte."""
    table = view.comparison()
    if not any(what.startswith(("merge", "joint")) for _, what, _ in table):
        return None
    values = np.array(
        [[*map(cells.get, view.languages), average([*map(cells.get, view.targets)])] for *_, cells in table], float
    )
    merged = np.array([what.startswith("merge") for _, what, _ in table])
    excess = values / _least(values) - 1
    winners = np.round(values, 3) == np.round(_least(values[merged]), 3)
    finite = excess[np.isfinite(excess)]
    limit = max(
        float(np.quantile(finite, 0.95)) if len(finite) else 0.0, 1e-6
    )  # one hopeless model must not bleach the rest
    heads = np.cumsum([i == 0 or table[i][0] != table[i - 1][0] for i in range(len(table))])
    y = np.arange(len(table)) + heads * 1.0
    x = np.arange(values.shape[1]) + np.where(np.arange(values.shape[1]) == len(view.languages), 0.18, 0.0)
    figure = Figure(figsize=(NARROW if narrow else WIDE, (0.245 if narrow else 0.265) * (y[-1] + 1) + 0.35))
    axes = figure.add_subplot()
    size = 6.4 if narrow else 8.5
    for row, (family, _, _) in enumerate(table):
        colour = look(family)[0]
        if row == 0 or table[row - 1][0] != family:
            axes.text(-0.48, y[row] - 0.95, family, va="center", fontsize=size + 0.5, fontweight="bold", color=colour)
        axes.fill_between([-0.66, -0.58], y[row] - 0.5, y[row] + 0.5, color=colour, linewidth=0)
        for column, value in enumerate(values[row]):
            shade = min(excess[row, column] / limit, 1.0) if math.isfinite(value) else 0.0
            framed = bool(winners[row, column] and merged[row])
            box = (x[column] - 0.48, y[row] - 0.46)
            axes.add_patch(Rectangle(box, 0.96, 0.92, facecolor=HEAT(shade), linewidth=0))
            if framed:
                axes.add_patch(
                    Rectangle((box[0] + 0.03, box[1] + 0.04), 0.9, 0.84, fill=False, edgecolor=INK, linewidth=1.2)
                )
            axes.text(
                x[column], y[row] + 0.03, f"{value:.3f}" if math.isfinite(value) else "\N{EN DASH}",
                ha="center", va="center", fontsize=size, color="white" if shade > 0.62 else INK,
                fontweight="bold" if framed else "normal",
            )  # fmt: skip
    short = (
        {"mean of single-language models": "mean of singles", "own-language model": "own language"} if narrow else {}
    )
    labels = [short.get(what, what.removeprefix("merge: ") if narrow else what) for _, what, _ in table]
    axes.set_yticks(y, labels, fontsize=size, color=INK)
    names = [*view.languages, "mean"] if narrow else [*map(language_name, view.languages), "mean of added"]
    axes.set_xticks(x, names, fontsize=size, color=INK)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlim(-0.68, x[-1] + 0.5)
    axes.set_ylim(y[-1] + 0.55, -0.4)
    return figure


def subsets(view: View, narrow: bool) -> Figure | None:
    """Heat-map: sets of merged languages by family and method, in mean bits per byte over the set."""
    columns, sets = view.subsets()
    if len(sets) < 2:
        return None
    values = np.array([[cells.get(column) for column in columns] for cells in sets.values()], float)
    excess = values / _least(values.T)[:, None] - 1
    finite = excess[np.isfinite(excess)]
    limit = max(float(np.quantile(finite, 0.95)) if len(finite) else 0.0, 1e-6)
    size = 4.4 if narrow else 7.5
    figure = Figure(figsize=(NARROW if narrow else WIDE, (0.16 if narrow else 0.23) * len(sets) + 1.2))
    axes = figure.add_subplot()
    for row in range(len(sets)):
        for column in range(len(columns)):
            value, known = values[row, column], math.isfinite(values[row, column])
            shade = min(excess[row, column] / limit, 1.0) if known else 0.0
            best = known and excess[row, column] == 0
            axes.add_patch(
                Rectangle(
                    (column - 0.48, row - 0.46), 0.96, 0.92, facecolor=HEAT(shade), edgecolor=INK, linewidth=1.2 * best
                )
            )
            axes.text(
                column, row + 0.03, f"{value:.2f}" if known else "\N{EN DASH}", ha="center", va="center", fontsize=size,
                color="white" if shade > 0.62 else INK,
            )  # fmt: skip
    names = [
        " ".join(tag[:3] for tag in members) if narrow else ", ".join(map(language_name, members)) for members in sets
    ]
    axes.set_yticks(range(len(sets)), names, fontsize=size, color=INK)
    axes.set_xticks(
        range(len(columns)), [words(method) for _, method in columns], fontsize=size, rotation=60, ha="left"
    )
    axes.xaxis.tick_top()
    for tick, (family, _) in zip(axes.get_xticklabels(), columns, strict=True):
        tick.set_color(look(family)[0])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlim(-0.55, len(columns) - 0.45)
    axes.set_ylim(len(sets) - 0.4, -0.6)
    _legend(figure, list(dict.fromkeys(family for family, _ in columns)))
    return figure


def _least(values: np.ndarray) -> np.ndarray:
    """The least finite value of each column; NaN where there is none."""
    filled = np.where(np.isfinite(values), values, np.inf).min(axis=0, initial=np.inf)
    return np.where(np.isfinite(filled), filled, np.nan)
