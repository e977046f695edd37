"""The report as one HTML page: no script, nothing loaded, plots and tables embedded; readable on a phone and in print."""

import base64
import math
from collections.abc import Iterable
from html import escape

from hyperllama.experiment.findings import LETTERS, Row, View, average, bits, findings, language_name, words
from hyperllama.experiment.plots import Picture, look

SCOPE = (
    "This page shows how these models, each trained once, compare on this text; budgets called equal are equal to the "
    "last FLOP. It does not show how the methods compare at other sizes, on other text, or with another seed."
)
CAUTION = (
    "One run per model with one seed: no intervals. Fewest, best and largest describe these numbers and predict "
    "nothing; small differences may be chance."
)
FLOPS = (
    "FLOPs are exact integers in the dense convention: 2 per multiply-add, matrix products only, all T² attended pairs "
    "of a window, backward twice forward. Inherited: the sum over distinct ancestors, each counted once."
)


def render(view: View, plots: list[Picture], tables: dict[str, str]) -> str:
    """The page as HTML; `tables` are CSV texts by name, each to be downloaded from it. All text from the results is escaped."""
    title = f"{view.results['name']}: scale, language and merging at equal FLOPs"
    sentences = findings(view)
    found = "".join(f"<li><b>{escape(topic)}</b>{escape(sentence)}</li>" for topic, sentence in sentences)
    summary = f'<h2>What the numbers say</h2>\n<ul class="findings">{found}</ul>' if sentences else ""
    sections = [
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="lead">Text: {escape(view.results["corpus"].rstrip("."))}. {SCOPE}</p>{_facts(view)}</header>',
        f"<section>{summary}\n<p class='caution'>{CAUTION}</p></section>",
        f"<section><h2>The families</h2>{_families(view)}</section>",
        *(_figure(plot, tables) for plot in plots),
        _ledger(view, tables),
        _evaluation(view, tables),
        _comparison(view, tables),
        _pairs(view, tables),
        f"<footer><p>{FLOPS}</p><p>The CSV files hold full precision.</p></footer>",
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


def _facts(view: View) -> str:
    trained = sum(row["spent"] for row in view.rows)
    facts = [
        ("models", f"{len(view.rows):,}"),
        ("languages", f"{len(view.languages):,}"),
        ("FLOPs spent, all models", f"{trained:,}"),
        ("shared FLOP quantum", f"{view.results['budgets']['quantum']:,}"),
        ("tokens in a window", f"{view.results['seq_len']:,}"),
        ("vocabulary", f"{view.results['tokenizer_vocab']:,}"),
    ]
    return (
        "<dl class='facts'>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts) + "</dl>"
    )


def _families(view: View) -> str:
    base, factor = language_name(view.base), view.results["factor"]
    grown = view.base_model("2x")
    share = ""
    if grown is not None and grown["total"]:
        share = f" after {100 * grown['inherited'] / grown['total']:.0f} % of the {base} FLOPs"
    meaning = {
        "1x": "The small model, trained from a random start.",
        "1x-cloned": f"The finished {base} 1x model grown {factor} times as wide; trained at that width only to adapt.",
        "2x": f"The small model grown {factor} times as wide{share}, then trained on at that width.",
        "2x-scratch": "The grown shape from a random start: the control.",
    }
    items = []
    for family in view.families:
        sizes = sorted({row["parameters"] for row in view.rows if row["family"] == family and row["kind"] != "clone"})
        size = " or ".join(f"{size:,}" for size in sizes)
        text = f"{meaning.get(family, '')} {size} parameters."
        items.append(f"<div><dt>{_mark(family)}{escape(family)}</dt><dd>{escape(text)}</dd></div>")
    return f"<dl class='families'>{''.join(items)}</dl>"


def _mark(family: str) -> str:
    """The family's colour and shape, as in the plots."""
    colour, marker = look(family)
    shapes = {
        "o": '<circle cx="6" cy="6" r="4.5"/>', "s": '<rect x="2" y="2" width="8" height="8"/>',
        "D": '<path d="M6 .8 11.2 6 6 11.2 .8 6z"/>', "^": '<path d="M6 1.2 11 10.6H1z"/>',
        "v": '<path d="M6 10.8 11 1.4H1z"/>',
    }  # fmt: skip
    return f'<svg class="mark" viewBox="0 0 12 12" fill="{colour}" aria-hidden="true">{shapes[marker]}</svg>'


def _download(tables: dict[str, str], name: str) -> str:
    """A link that saves a table, which lies in the page itself."""
    data = base64.b64encode(tables[name].encode()).decode()
    return f'<a class="csv" download="{name}.csv" href="data:text/csv;base64,{data}">{name}.csv</a>'


def _figure(plot: Picture, tables: dict[str, str]) -> str:
    wide, narrow = (f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in (plot.wide, plot.narrow))
    return (
        f'<section><h2>{escape(plot.title)}</h2><figure><picture><source media="(max-width: 600px)" srcset="{narrow}">'
        f'<img src="{wide}" alt="{escape(plot.alt)}"></picture>'
        f"<figcaption>{escape(plot.caption)} {_download(tables, plot.table)}</figcaption></figure></section>"
    )


def _table(head: Iterable[str], rows: Iterable[str], kind: str = "") -> str:
    """A table that scrolls sideways in a narrow window; cells come escaped."""
    header = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{header}</tr></thead>\n'
        f"<tbody>\n{''.join(rows)}</tbody></table></div>"
    )


def _named(row: Row, cells: Iterable[str], first: bool) -> str:
    """A table row that opens with a model's mark and id; `first` opens a block of another kind."""
    name = f'<th scope="row">{_mark(row["family"])}{escape(row["id"])}</th>'
    return f"<tr{' class=block' if first else ''}>{name}{''.join(cells)}</tr>\n"


def _opens(rows: list[Row], i: int) -> bool:
    return (
        i > 0
        and rows[i]["kind"] != rows[i - 1]["kind"]
        and not {rows[i]["kind"], rows[i - 1]["kind"]} <= {"base", "clone"}
    )


def _ledger(view: View, tables: dict[str, str]) -> str:
    letters = view.letters()
    lines = []
    for i, row in enumerate(view.rows):
        numbers = "".join(f"<td>{row[key]:,}</td>" for key in ("parameters", "spent", "inherited", "total"))
        group = "".join(f'<b class="group">{letter}</b>' for letter in letters.get(row["id"], ""))
        lines.append(_named(row, [f"<td>{group}</td>", numbers], _opens(view.rows, i)))
    key = "".join(
        f'<li><b class="group">{LETTERS[i]}</b> {escape(group["what"])}: {group["flops"]:,} FLOPs '
        f"{escape(group['by'])}, each of {len(group['ids'])} models</li>"
        for i, group in enumerate(view.results.get("equal", []))
    )
    head = ["model", "equal", "parameters", "spent FLOPs", "inherited FLOPs", "total FLOPs"]
    return f'<section><h2>Ledger</h2><ul class="key">{key}</ul>{_table(head, lines)}{_download(tables, "ledger")}</section>'


def _evaluation(view: View, tables: dict[str, str]) -> str:
    best = {
        tag: min((value for row in view.rows if (value := bits(row, tag)) is not None), default=None)
        for tag in view.languages
    }
    lines = [
        _named(row, (_bits(bits(row, tag), best[tag]) for tag in view.languages), _opens(view.rows, i))
        for i, row in enumerate(view.rows)
    ]
    head = ["model", *(escape(language_name(tag)) for tag in view.languages)]
    note = "<p>The least of each column is bold; rows differ in FLOPs.</p>"
    return f"<section><h2>Bits per byte</h2>{note}{_table(head, lines)}{_download(tables, 'evaluation')}</section>"


def _bits(value: float | None, best: float | None = None) -> str:
    """A cell with bits per byte, bold when it is the best to three decimals."""
    if value is None:
        return "<td>\N{EN DASH}</td>"
    text = f"{value:.3f}"
    return f"<td><b>{text}</b></td>" if best is not None and text == f"{best:.3f}" else f"<td>{text}</td>"


def _comparison(view: View, tables: dict[str, str]) -> str:
    table = view.comparison()
    if not table:
        return ""
    lines = []
    for i, (family, what, cells) in enumerate(table):
        values = [*map(cells.get, view.languages), average([*map(cells.get, view.targets)])]
        name = f'<th scope="row">{_mark(family)}{escape(f"{family}, {what}")}</th>'
        block = " class=block" if i and table[i - 1][0] != family else ""
        lines.append(f"<tr{block}>{name}{''.join(map(_bits, values))}</tr>\n")
    methods = f" Merge methods: {escape(', '.join(map(words, view.methods())))}." if view.methods() else ""
    head = ["family", *(escape(language_name(tag)) for tag in view.languages), "mean of added"]
    title = "Merges, single-language models, joint training"
    download = _download(tables, "comparison")
    return f"<section><h2>{title}</h2><p>Bits per byte.{methods}</p>{_table(head, lines)}{download}</section>"


def _pairs(view: View, tables: dict[str, str]) -> str:
    tags = [tag for tag in view.languages if any("accuracy" in row["eval"].get(tag, {}) for row in view.rows)]
    if not tags:
        return ""
    counts = {tag: max(row["eval"].get(tag, {}).get("pairs", 0) for row in view.rows) for tag in tags}
    lines = []
    for i, row in enumerate(view.rows):
        cells = []
        for tag in tags:
            value = row["eval"].get(tag, {}).get("accuracy")
            known = value is not None and math.isfinite(value)
            cells.append(
                f'<td class="bar" style="--w:{100 * value:.1f}%">{100 * value:.1f}</td>'
                if known
                else "<td>\N{EN DASH}</td>"
            )
        lines.append(_named(row, cells, _opens(view.rows, i)))
    head = ["model", *(f"{escape(language_name(tag))}<small>{counts[tag]:,} pairs</small>" for tag in tags)]
    return (
        "<section><h2>Minimal pairs</h2><p>Share of pairs (%) in which the model gives the acceptable sentence the "
        f"higher probability. The line in each cell is chance, 50 %.</p>{_table(head, lines)}{_download(tables, 'pairs')}</section>"
    )


CSS = """
:root { color-scheme: light; --ink: #1d2329; --soft: #5d666e; --rule: #e3e7ea; --wash: #f5f7f8; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 58rem; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
h1 {
  font-size: clamp(1.5rem, 4.5vw, 2.1rem); line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .8rem;
  text-wrap: balance; overflow-wrap: anywhere;
}
h2 { font-size: 1.2rem; line-height: 1.3; margin: 0 0 .7rem; }
section { margin-top: 2.8rem; }
p { margin: 0 0 .8rem; max-width: 44rem; }
.lead { font-size: 1.05rem; color: var(--soft); }
dl, dd { margin: 0; }
.facts {
  display: flex; flex-wrap: wrap; gap: .9rem 2rem; margin-top: 1.4rem; padding: 1rem 0;
  border: solid var(--rule); border-width: 1px 0;
}
.facts dt, small { font-size: .78rem; color: var(--soft); font-weight: 400; }
.facts dd { font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.findings { margin: 0 0 1.2rem; padding: 0; list-style: none; max-width: 46rem; }
.findings b { display: block; font-size: .87rem; }
.findings li {
  padding: .1rem 0 .1rem 1rem; border-left: 3px solid #9cc5dd; margin-bottom: 1rem; overflow-wrap: anywhere;
}
.caution { color: var(--soft); font-size: .9rem; }
.families { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: 1rem 1.5rem; }
.families dt { font-weight: 600; }
.families dd { color: var(--soft); font-size: .9rem; }
.mark { width: .72em; height: .72em; margin-right: .5em; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; }
figcaption { margin-top: .7rem; max-width: 44rem; color: var(--soft); font-size: .87rem; }
.csv { display: inline-block; margin-top: .3rem; color: #14527d; font-size: .87rem; white-space: nowrap; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; width: 100%; font-size: .84rem; font-variant-numeric: tabular-nums lining-nums; }
th, td { padding: .26rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
thead th { vertical-align: bottom; color: var(--soft); font-weight: 600; border-bottom: 2px solid #b5bcc2; }
thead small { display: block; font-size: .92em; }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff; padding-left: 0; }
tbody th { font-weight: 500; }
tr.block > * { border-top: 2px solid #b5bcc2; }
tbody tr:hover > * { background-color: var(--wash); }
.group {
  display: inline-block; min-width: 1.5em; padding: 0 .35em; border-radius: .3em; background: #dcebf3;
  color: #14527d; font-size: .78rem; text-align: center;
}
.key {
  list-style: none; margin: 0 0 1rem; padding: 0; font-size: .87rem; color: var(--soft);
  font-variant-numeric: tabular-nums;
}
.bar {

  background: linear-gradient(#8d979f, #8d979f) 50% 0 / 1px 100% no-repeat,
    linear-gradient(to right, #dcebf3 var(--w), transparent 0);
}
footer {
  margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--rule); color: var(--soft);
  font-size: .85rem;
}
@media screen and (min-width: 66rem) {
  .scroll { margin-right: calc((58rem - 100vw) / 2 + 1.25rem); }
  table { width: auto; min-width: 55.5rem; }
}
@media (max-width: 600px) {
  main { padding: 1.5rem 1rem 3rem; }
  section { margin-top: 2.2rem; }
  th, td { padding: .26rem .5rem; }
  table { font-size: .78rem; }
  th:first-child { white-space: normal; min-width: 8.5rem; max-width: 8.5rem; overflow-wrap: anywhere; }
}
@media print {
  @page { margin: 14mm; }
  body { font-size: 10.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  section { margin-top: 1.6rem; }
  figure, .findings li { break-inside: avoid; }
  figure img { width: 80%; }
  .families { grid-template-columns: repeat(4, 1fr); }
  h2 { break-after: avoid; }
  thead { display: table-header-group; }
  .scroll { overflow: visible; }
  table { font-size: 7.6pt; }
  th, td { padding: .15rem .35rem; }
  th:first-child { position: static; }
  .csv { display: none; }
}
"""
