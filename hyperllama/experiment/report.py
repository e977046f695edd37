"""A study's report: one self-contained page, its plots as PNG, its tables as CSV. A pure function of the results.

report.html                              everything, plots embedded
loss.png bits.png forgetting.png merges.png
ledger.csv evaluation.csv comparison.csv forgetting.csv pairs.csv
"""

import csv
import io
from pathlib import Path
from typing import Any

from hyperllama.experiment.findings import View, average
from hyperllama.experiment.page import render
from hyperllama.experiment.plots import pictures
from hyperllama.files import atomic_file, write_text

Table = tuple[list[str], list[list[Any]]]  # header, rows


def write_report(results: dict[str, Any], out: Path) -> list[Path]:
    """Write the page, plots and tables of results.json's content into `out`; returns their paths, page first.

    Raises HyperLlamaError when a ledger does not add up or models said to be equal are not.
    """
    view, out = View(results), Path(out)
    plots, files = pictures(view), tables(view)
    written = [out / "report.html"]
    write_text(written[0], render(view, plots, [f"{name}.csv" for name in files]))
    for plot in plots:
        written.append(out / f"{plot.name}.png")
        with atomic_file(written[-1]) as temporary:
            temporary.write_bytes(plot.wide)
    for name, (header, rows) in files.items():
        written.append(out / f"{name}.csv")
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
        write_text(written[-1], buffer.getvalue())
    return written


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
    return {
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
