"""README's figures, written from bench/results: what the page says is what was measured.

    python -m bench.readme            rewrite the block between the marks in README.md
    python -m bench.readme --check    exit 1 when it differs from what the results say

Every results file of the harness adds the tables of what it has, and a picture where it has training steps (plots.py);
merging.json adds the comparison of merge methods.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from hyperllama.files import sha256_file, write_text

from . import plots
from .targets import RESULTS

README = RESULTS.parent.parent / "README.md"
BEGIN, END = "<!-- figures: written by python -m bench.readme -->", "<!-- end of figures -->"
AGAINST = ("transformers", "transformers compiled", "matmul")
TOOLS = ("mergekit", "plain torch")
Row = list[str]


def table(head: Row, rows: list[Row]) -> str:
    """A table, numbers to the right."""
    rule = ["---", *(["---:"] * (len(head) - 1))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


def spread(values: list[float]) -> str:
    """A figure, or the least and the most of several."""
    texts = [f"{value:.2f}" for value in sorted(values)]
    return " - ".join(dict.fromkeys([texts[0], texts[-1]])) if texts else "-"


def steps(results: list[dict[str, Any]]) -> str:
    """Training steps: tokens a second, and how many times as fast as transformers' or as a share of the matrix products alone."""
    rows = []
    for result in results:
        params, ours = result["params"], result["providers"].get("csrc")
        if result["case"] != "step" or not ours or not ours["seconds"]:
            continue
        against = {target["against"]: target["measured"] for target in result["targets"] if target["measured"]}
        ratios = [f"{against[name]['median']:.2f}" if name in against else "-" for name in AGAINST]
        name = f"{params['model']}, T={params['T']}, {params['dtype']}"
        rows.append([name, f"{params['tokens'] / ours['seconds']['median']:,.0f}", *ratios])
    head = ["training step", "tokens/s", "x transformers", "x transformers + torch.compile", "of the products' rate"]
    return table(head, rows) if rows else ""


def ops(results: list[dict[str, Any]]) -> str:
    """Ops and what they are against: a copy of their least traffic, torch's attention, the bare products."""
    found: dict[str, dict[str, list[float]]] = {}
    for result in results:
        for target in result["targets"]:
            if result["case"] == "step" or target["provider"] != "csrc" or not target["measured"]:
                continue
            params = result["params"]
            heads = f", heads of {params['head_dim']}" if "head_dim" in params else ""
            documents = ", documents" if params.get("documents") else ""
            name = f"{result['case']}{heads}{documents} / {target['against']}"
            found.setdefault(name, {}).setdefault(params["dtype"], []).append(target["measured"]["median"])
    dtypes = ("float32", "bfloat16")
    rows = [[name, *(spread(by.get(dtype, [])) for dtype in dtypes)] for name, by in found.items()]
    return table(["C++ op / what its speed is compared with", *dtypes], rows) if rows else ""


def folders(results: list[dict[str, Any]]) -> str:
    """Merges and growth of folders: seconds, CPU seconds and memory of ours, and how many times as fast as the public tool."""
    rows = []
    for result in results:
        ours = result["providers"].get("ours")
        if result["case"] not in ("merge", "grow") or ours is None:  # an op of csrc has the same name
            continue
        ratios = [t["measured"]["median"] for t in result["targets"] if t["against"] in TOOLS and t["measured"]]
        if ours["seconds"]:
            name = f"{result['case']} {result['params']['method']}, {result['params']['size']}"
            gigabytes = f"{ours['figures']['peak_anonymous_bytes'] / 1e9:.3f}" if ours["figures"] else "-"
            rows.append([name, f"{ours['seconds']['median']:.2f}", gigabytes, f"{ratios[0]:.1f}" if ratios else "-"])
    head = ["folders, from the shell", "seconds", "GB of memory", "x the public tool"]
    return table(head, rows) if rows else ""


def tokenizing(results: list[dict[str, Any]]) -> str:
    """Text to tokens by ours and by datatrove: megabytes of text a CPU second, start-up included."""
    rows = [
        [f"{result['params']['bytes'] / 1e6:.0f} MB of {result['params']['text']} text, {name}",
         f"{result['params']['bytes'] / 1e6 / found['seconds']['median']:.1f}", f"{found['seconds']['median']:.1f}"]
        for result in results if result["case"] == "tokenize"
        for name, found in result["providers"].items() if found["seconds"]
    ]  # fmt: skip
    return table(["text to tokens", "MB a CPU second", "CPU seconds"], rows) if rows else ""


def methods(document: dict[str, Any]) -> Iterator[str]:
    """Merge methods by bits per byte over the languages, of every family of models."""
    for family, rows in document["summary"].items():
        lines = [
            [
                name, f"{row['mean']:.3f}", "-" if row["sd"] is None else f"{row['sd']:.3f}", str(len(row["seeds"])),
                f"{100 * mean(row['gap_closed']):z.0f} %",
            ]
            for name, row in rows.items()
        ]  # fmt: skip
        yield table([f"merged {family}", "bits per byte", "sd", "seeds", "of the gap to joint training"], lines)


def caption(document: dict[str, Any]) -> str:
    """Where and when, in one line."""
    about = document["environment"]
    commit = f", commit {about['git']['commit'][:7]}" if about.get("git") else ""
    where = f"{about['device']}, {about['threads']} threads, torch {about['torch']}{commit}"
    return f"{where}, {document['date']}, `{' '.join(document['command'])}`:"


def block(folder: Path = RESULTS) -> str:
    """Everything between the marks."""
    parts: list[str] = []
    for path in sorted(folder.rglob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        tables = [make(document.get("results", [])) for make in (steps, ops, folders, tokenizing)]
        if path.name == "merging.json":
            tables += methods(document)
        if tables := [text for text in tables if text]:
            picture = path.with_suffix(".png")
            shows = [f"![{picture.stem}]({picture.relative_to(folder.parent.parent)})"] if picture.is_file() else []
            parts += [caption(document), *shows, *tables]
    return "\n\n".join([BEGIN, *parts, END])


def pictures(folder: Path = RESULTS) -> Iterator[tuple[Path, Path]]:
    """(results file, picture) of what is drawn: runs of bench.cpu with training steps."""
    for path in sorted(folder.glob("*/*.json")):
        results = json.loads(path.read_text(encoding="utf-8")).get("results", [])
        if any(result["case"] == "step" for result in results):
            yield path, path.with_suffix(".png")


def stale(folder: Path = RESULTS) -> list[Path]:
    """Pictures that are missing or show other results."""
    return [
        picture
        for source, picture in pictures(folder)
        if not picture.is_file() or plots.shown(picture) != sha256_file(source)
    ]


def updated(page: str, figures: str) -> str:
    """The page with this block in place of its own. Raises ValueError without marks."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"README.md must have one line {BEGIN!r} and one {END!r}")
    before, rest = page.split(BEGIN)
    return before + figures + rest.split(END)[1]


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description="Write README's figures from bench/results.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when they differ")
    check = parser.parse_args().check
    old = stale()
    for source, picture in pictures() if not check else ():
        plots.draw(json.loads(source.read_text(encoding="utf-8")), sha256_file(source), picture)
    page = README.read_text(encoding="utf-8")
    new = updated(page, block())
    if check and (new != page or old):
        print("README.md has other figures than bench/results: run python -m bench.readme", file=sys.stderr)
        return 1
    if not check:
        write_text(README, new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
