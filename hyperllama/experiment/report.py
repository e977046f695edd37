"""A study's report: one self-contained page, its plots as PNG, its tables as CSV. A pure function of the results.

report.html                              everything, plots embedded
loss.png bits.png scaling.png forgetting.png merges.png
loss.csv bits.csv scaling.csv forgetting.csv comparison.csv ledger.csv evaluation.csv pairs.csv
subsets.png subsets.csv                  where there are merges of more than one set of languages
"""

import csv
import io
from pathlib import Path
from typing import Any

from hyperllama.experiment.findings import View, average, bits
from hyperllama.experiment.page import render
from hyperllama.experiment.plots import pictures
from hyperllama.files import atomic_file, write_text

Table = tuple[list[str], list[list[Any]]]  # header, rows


def write_report(results: dict[str, Any], out: Path) -> list[Path]:
    """Write the page, plots and tables of results.json's content into `out`; returns their paths, page first.

    Raises HyperLlamaError when a ledger does not add up or models said to be equal are not.
    """
    view, out = View(results), Path(out)
    plots, files = pictures(view), {name: _csv(*table) for name, table in tables(view).items()}
    written = [out / "report.html"]
    write_text(written[0], render(view, plots, files))
    for plot in plots:
        written.append(out / f"{plot.name}.png")
        with atomic_file(written[-1]) as temporary:
            temporary.write_bytes(plot.wide)
    for name, text in files.items():
        written.append(out / f"{name}.csv")
        write_text(written[-1], text)
    return written


def _csv(header: list[str], rows: list[list[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    return buffer.getvalue()


def tables(view: View) -> dict[str, Table]:
    """The CSV files: stem -> (header, rows). Full precision; empty where nothing was measured."""
    groups = view.letters()
    measures = ["documents", "bytes", "tokens", "nll_nats", "bits_per_byte", "perplexity"]
    pairs = []
    for row in view.rows:
        for tag, cell in row["eval"].items():
            if "accuracy" in cell:
                pairs.append([row["id"], tag, "all", cell["pairs"], cell["accuracy"]])
                parts = cell.get("by_phenomenon", {}).items()
                pairs += [[row["id"], tag, name, part["pairs"], part["accuracy"]] for name, part in parts]
    curves = view.results.get("curves", {})
    columns, sets = view.subsets()
    own = [(tag, family, row) for tag in view.languages for family, row in view.arms(tag)[1].items()]
    return {
        "loss": (["id", "total_flops", "loss"], [[name, *point] for name, curve in curves.items() for point in curve]),
        "bits": (
            ["language", "family", "id", "total_flops", "bits_per_byte"],
            [[tag, family, row["id"], row["total"], bits(row, tag)] for tag, family, row in own],
        ),
        "scaling": (
            ["family", "what", "total_flops", f"bits_per_byte_{view.base}", "mean_of_targets"],
            [list(point) for point in view.scaling()],
        ),
        **(
            {
                "subsets": (
                    ["languages", *(f"{family} {method}" for family, method in columns)],
                    [["+".join(members), *map(cells.get, columns)] for members, cells in sets.items()],
                )
            }
            if len(sets) > 1
            else {}
        ),
        "ledger": (
            ["id", "family", "kind", "language", "method", "parameters", "spent", "inherited", "total", "equal_group"],
            [
                [
                    row[key]
                    for key in (
                        "id",
                        "family",
                        "kind",
                        "language",
                        "method",
                        "parameters",
                        "spent",
                        "inherited",
                        "total",
                    )
                ]
                + [groups.get(row["id"], "")]
                for row in view.rows
            ],
        ),
        "evaluation": (
            ["id", "language", *measures],
            [[row["id"], tag, *map(cell.get, measures)] for row in view.rows for tag, cell in row["eval"].items()],
        ),
        "comparison": (
            ["family", "what", *view.languages, "mean_of_targets"],
            [
                [family, what, *map(cells.get, view.languages), average([*map(cells.get, view.targets)])]
                for family, what, cells in view.comparison()
            ],
        ),
        "forgetting": (
            ["id", "before", "after", "change"],
            [[row["id"], before, after, after - before] for row, before, after in view.forgetting()],
        ),
        "pairs": (["id", "language", "phenomenon", "pairs", "accuracy"], pairs),
    }
