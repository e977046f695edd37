"""Text in: files and folders become documents, one at a time.

.jsonl   one object a line: {"text": ..., "lang": ...}; "lang" is optional, other keys are ignored
.txt     one document a file, or several with a form feed (\\f) between them
Either may end in .gz. Documents without anything but white space are left out. A byte-order mark is not text.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from hyperllama.errors import HyperLlamaError

LANGUAGES = ("eng", "est", "fao", "fas", "isl", "swe")  # ISO 639-3
SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")

Progress = Callable[[int, int], None]  # progress(done, total), bytes
_PROGRESS_STEP = 1 << 20  # bytes between two calls of `progress`


class Document(NamedTuple):
    """One document: its text, its language tag if the file states one, its length in bytes of UTF-8, its file."""

    text: str
    lang: str | None
    num_bytes: int
    path: Path


def language_of(document: Document, language: str | None = None) -> str:
    """The document's own tag, else `language`, else the name of its folder if that is a known tag, else "und"."""
    folder = document.path.absolute().parent.name
    return document.lang or language or (folder if folder in LANGUAGES else "und")


def text_files(paths: Iterable[str | Path]) -> list[Path]:
    """The text files that `paths` (files and folders) stand for; folders are walked in sorted order.

    Raises HyperLlamaError for a missing path, an unknown suffix, a folder without text files, a file named twice.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file()]
            found = sorted(file for file in inside if not file.name.startswith("."))
            if not found:
                raise HyperLlamaError(f"{path} holds no text files ({', '.join(SUFFIXES)})")
            files += found
        elif not path.exists():
            raise HyperLlamaError(f"{path} does not exist")
        elif path.name.endswith(SUFFIXES):
            files.append(path)
        else:
            raise HyperLlamaError(f"{path} is not a text file: its name must end in one of {', '.join(SUFFIXES)}")
    if not files:
        raise HyperLlamaError("no text files were given")
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise HyperLlamaError(f"{file} is named twice: its documents would count double")
        seen.add(file.resolve())
    return files


def iter_documents(paths: str | Path | Iterable[str | Path], *, progress: Progress | None = None) -> Iterator[Document]:
    """Yield the documents of a file, a folder, or several of them, in order; memory holds one document at a time.

    Raises HyperLlamaError naming file and line for invalid UTF-8, a bad JSON line, a missing or non-string "text",
    a non-string "lang"; naming the file when it is missing, unreadable, damaged (gzip) or without any text.
    """
    files = text_files([paths] if isinstance(paths, str | Path) else paths)
    sizes = [file.stat().st_size for file in files]
    total, before = sum(sizes), 0
    for file, size in zip(files, sizes, strict=True):

        def report(done: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        lines = _lines(file, report)
        is_txt = file.name.removesuffix(".gz").endswith(".txt")
        documents = _txt_documents(file, lines) if is_txt else _jsonl_documents(file, lines)
        empty = True
        for document in documents:
            if document.text.strip():
                empty = False
                yield document
        if empty:
            raise HyperLlamaError(f"{file} holds no text")
        before += size
        report(0, before)


def _lines(path: Path, report: Callable[[int], None]) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line with its end); report the bytes read from disk so far."""
    reported = 0
    try:
        with open(path, "rb") as raw, gzip.open(raw) if path.suffix == ".gz" else nullcontext(raw) as file:
            for number, line in enumerate(file, 1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    message = f"{path} line {number} is not UTF-8: {error.reason} at byte {error.start} of the line"
                    raise HyperLlamaError(message) from None
                if raw.tell() - reported >= _PROGRESS_STEP:
                    reported = raw.tell()
                    report(reported)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise HyperLlamaError(f"{path} is not a whole gzip file: {error}") from None
    except OSError as error:
        raise HyperLlamaError(f"{path} cannot be read: {error.strerror or error}") from None


def _txt_documents(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[Document]:
    parts: list[str] = []
    for _, line in lines:
        *ends, rest = line.split("\f")
        for end in ends:
            yield _document("".join([*parts, end]), None, path)
            parts = []
        parts.append(rest)
    yield _document("".join(parts), None, path)


def _jsonl_documents(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[Document]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise HyperLlamaError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise HyperLlamaError(f'{path} line {number} is not an object: expected {{"text": ..., "lang": ...}}')
        text, lang = value.get("text"), value.get("lang")
        if not isinstance(text, str):
            raise HyperLlamaError(f'{path} line {number} has no string under the key "text"')
        if not (lang is None or isinstance(lang, str)):
            raise HyperLlamaError(f'{path} line {number}: "lang" must be a string, for example "fao"')
        try:
            yield _document(text, lang, path)
        except UnicodeEncodeError as error:
            raise HyperLlamaError(f'{path} line {number}: "text" is not Unicode: {error.reason}') from None


def _document(text: str, lang: str | None, path: Path) -> Document:
    return Document(text, lang, len(text.encode()), path)
