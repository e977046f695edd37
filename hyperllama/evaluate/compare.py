"""Several models side by side, on the same text and the same pairs: matrices with intervals and paired tests.

The first model is what the others are held against. On text of a language it was trained on, a positive change in bits per byte is
forgetting; on a language that another was adapted to, a negative one is what the adaptation (or transfer, or the merge) gained.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate.folder import Measured
from hyperllama.evaluate.statistics import bootstrap, mcnemar
from hyperllama.files import write_text


def text_matrix(models: Sequence[Measured], *, seed: int = 0) -> list[dict[str, Any]]:
    """A row for each model and text: {model, text, bits_per_byte, low, high, bits_per_character, change, change_low, change_high}.

    Intervals are 95 %, by bootstrap over documents; `change` is the difference to the first model's bits per byte, paired.
    Raises HyperLlamaError when the models did not read the same documents.
    """
    rows = []
    for text in models[0].texts:
        scores = [model.texts[text] for model in models]
        first = scores[0]
        if any(not np.array_equal(score.n_bytes, first.n_bytes) for score in scores):
            raise HyperLlamaError(f"{text} changed between two models: run it again")
        levels, changes = bootstrap([score.bits for score in scores], first.n_bytes, seed=seed)
        base = first.summary()["bits_per_byte"]
        for model, score, level, change in zip(models, scores, levels, changes, strict=True):
            summary = score.summary()
            rows.append(
                {
                    "model": model.name,
                    "text": text,
                    "bits_per_byte": summary["bits_per_byte"],
                    "low": level[0],
                    "high": level[1],
                    "bits_per_character": summary["bits_per_character"],
                    "change": summary["bits_per_byte"] - base,
                    "change_low": change[0],
                    "change_high": change[1],
                }
            )
    return rows


def pair_matrix(models: Sequence[Measured]) -> list[dict[str, Any]]:
    """A row for each model, file and phenomenon ("all" first): {model, pairs, phenomenon, n, accuracy, low, high, change, p}.

    low and high: Wilson's 95 % interval; change: to the first model's accuracy; p: McNemar's exact test of that change.
    """
    rows = []
    for file in models[0].pairs:
        first = models[0].pairs[file]
        if any(model.pairs[file].pairs != first.pairs for model in models):
            raise HyperLlamaError(f"{file} changed between two models: run it again")
        groups = {"all": list(range(len(first.points))), **first.by_phenomenon()}
        summaries = [model.pairs[file].summary() for model in models]
        for name, numbers in groups.items():
            before = first.points[numbers]
            for model, summary in zip(models, summaries, strict=True):
                points = model.pairs[file].points[numbers]
                found = summary if name == "all" else summary["by_phenomenon"][name]
                rows.append(
                    {
                        "model": model.name,
                        "pairs": file,
                        "phenomenon": name,
                        "n": len(points),
                        "accuracy": found["accuracy"],
                        "low": found["interval"][0],
                        "high": found["interval"][1],
                        "change": float(points.mean() - before.mean()),
                        "p": mcnemar(int((before > points).sum()), int((points > before).sum())),
                    }
                )
    return rows


def differences(models: Sequence[Measured]) -> list[dict[str, Any]]:
    """McNemar's exact test of every two models on every file of pairs: {pairs, first, second, first_only, second_only, p}."""
    rows = []
    for file in models[0].pairs:
        for i, first in enumerate(models):
            for second in models[i + 1 :]:
                a, b = first.pairs[file].points, second.pairs[file].points
                only = int((a > b).sum()), int((b > a).sum())
                rows.append(
                    {
                        "pairs": file,
                        "first": first.name,
                        "second": second.name,
                        "first_only": only[0],
                        "second_only": only[1],
                        "p": mcnemar(*only),
                    }
                )
    return rows


@dataclass(frozen=True)
class Comparison:
    """The long tables of several models; each is empty where nothing of its kind was measured."""

    text: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    tests: list[dict[str, Any]]

    @classmethod
    def of(cls, models: Sequence[Measured]) -> "Comparison":
        """Compare models that were measured on the same files. Raises HyperLlamaError for one named twice, or changed files."""
        names = [model.name for model in models]
        if len(set(names)) < len(names):
            raise HyperLlamaError(f"{max(names, key=names.count)} is named twice")
        return cls(text_matrix(models), pair_matrix(models), differences(models))

    def write_csv(self, path: str | Path) -> list[Path]:
        """Write the table of text to `path`, that of pairs to NAME-pairs.csv beside it (to `path` where there is no text)."""
        path = Path(path)
        files = {path: self.text} if self.text else {}
        if self.pairs:
            files[path.with_name(f"{path.stem}-pairs{path.suffix}") if self.text else path] = self.pairs
        for file, rows in files.items():
            write_text(file, to_csv(rows))
        return list(files)

    def grids(self) -> dict[str, list[dict[str, Any]]]:
        """Matrices for people, by title: a row a model, a column a text; a row a phenomenon, a column a model."""
        found = {}
        if self.text:
            found["bits per byte [95 % interval over documents]"] = _grid(self.text, "bits_per_byte", "low", "high")
            found["change to the first model [95 %, paired]"] = _grid(self.text, "change", "change_low", "change_high")
        for file in dict.fromkeys(row["pairs"] for row in self.pairs):
            table: dict[str, dict[str, Any]] = {}
            for row in self.pairs:
                if row["pairs"] == file:
                    line = table.setdefault(row["phenomenon"], {"name": row["phenomenon"], "pairs": row["n"]})
                    cell = f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
                    line[row["model"]] = cell if row["model"] == self.pairs[0]["model"] else f"{cell} p={row['p']:.2g}"
            found[f"{file}: accuracy [95 %], p of the change to the first model"] = list(table.values())
        return found


def _grid(rows: Sequence[dict[str, Any]], value: str, low: str, high: str) -> list[dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        cell = f"{row[value]:.4f} [{row[low]:.4f}, {row[high]:.4f}]"
        table.setdefault(row["model"], {"name": row["model"]})[row["text"]] = cell
    return list(table.values())


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """A long table as CSV text with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
