"""The text of a study: files of a corpus by language and part, and how some of their lines are taken."""

import gzip
import itertools
import zlib
from collections.abc import Iterable
from pathlib import Path

from hyperllama.errors import HyperLlamaError


def part_file(source: Path, language: str, part: str) -> Path:
    """text/<language>/<part>.jsonl, plain or gzipped."""
    for suffix in (".jsonl", ".jsonl.gz"):
        file = source / "text" / language / f"{part}{suffix}"
        if file.is_file():
            return file
    raise HyperLlamaError(f"{source / 'text' / language} has no {part}.jsonl or {part}.jsonl.gz")


def _lines(file: Path) -> Iterable[str]:
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            yield from lines
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise HyperLlamaError(f"{file} cannot be read: {error}") from None


def head(source: Path, out: Path, limit: int, after: int = 0) -> int:
    """Write the documents of a JSONL file after `after` of them, up to `limit` bytes of lines but at least one; how many."""
    count = 0
    with out.open("w", encoding="utf-8") as file:
        for line in itertools.islice(_lines(source), after, None):
            if file.tell() and file.tell() + len(line.encode()) > limit:
                break
            file.write(line)
            count += 1
    return count


def spread(source: Path, out: Path, count: int) -> None:
    """`count` lines of a JSONL file, evenly spaced: files are often sorted by phenomenon. No file, no pairs."""
    if not source.is_file() or not count:
        return
    lines = list(_lines(source))
    keep = min(count, len(lines))
    out.write_text("".join(lines[i * len(lines) // keep] for i in range(keep)), encoding="utf-8")
