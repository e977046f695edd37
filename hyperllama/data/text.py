"""Text in: files and folders become documents, one at a time.

.jsonl     one object a line: {"text": ..., "lang": ...}; "lang" is optional, other keys are ignored
.txt       one document a file, or several with a form feed (\\f) between them
           either may end in .gz or .zst
.parquet   one document a row, of the columns "text" and, where it is there, "lang"

Documents without anything but white space are left out. A byte-order mark is not text. A record (line, piece of a txt file,
row) that is no document is damaged: an error, or skipped and reported where the caller says so.
"""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from hyperllama.errors import HyperLlamaError

LANGUAGES = ("eng", "est", "fao", "fas", "isl", "swe")  # ISO 639-3
_COMPRESSED = ("", ".gz", ".zst")
SUFFIXES = (*(kind + end for kind in (".jsonl", ".txt") for end in _COMPRESSED), ".parquet")

Progress = Callable[[int, int], None]  # progress(done, total), bytes
Damaged = Callable[[str], None]  # told of each damaged record that is skipped
_PROGRESS_STEP = 1 << 20  # bytes between two calls of `progress`
_ROWS = 1024  # of a parquet file, held at once


class Keys(NamedTuple):
    """What the keys (columns) of a record are called; `id` None: ids are not read."""

    text: str = "text"
    lang: str | None = "lang"
    id: str | None = None


_KEYS = Keys()


class Document(NamedTuple):
    """One document: its text, its language tag if the file states one, its length in bytes of UTF-8, its file.

    `record` is its place in the file, from 1: the line, the row, of a txt file the piece between form feeds.
    """

    text: str
    lang: str | None
    num_bytes: int
    path: Path
    record: int = 1
    id: str | None = None


def language_of(document: Document, language: str | None = None) -> str:
    """The document's own tag, else `language`, else the name of its folder if that is a known tag, else "und"."""
    folder = document.path.absolute().parent.name
    return document.lang or language or (folder if folder in LANGUAGES else "und")


def text_files(paths: Iterable[str | Path]) -> list[Path]:
    """The text files that `paths` (files, folders and globs) stand for; folders are walked in sorted order.

    Raises HyperLlamaError for a missing path, an unknown suffix, a folder or glob without text files, a file named twice.
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
            named = glob.has_magic(str(path))
            matches = sorted(map(Path, glob.glob(str(path), recursive=True))) if named else []
            found = [match for match in matches if match.name.endswith(SUFFIXES) and match.is_file()]
            if not found:
                raise HyperLlamaError(f"{path} matches no text file" if named else f"{path} does not exist")
            files += found
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


def iter_documents(
    paths: str | Path | Iterable[str | Path],
    *,
    keys: Keys = _KEYS,
    progress: Progress | None = None,
    damaged: Damaged | None = None,
) -> Iterator[Document]:
    """Yield the documents of a file, a folder, or several of them, in order; memory holds one document (of a parquet file
    1024) at a time.

    Raises HyperLlamaError naming file and line for invalid UTF-8, a bad JSON line, a missing or non-string "text",
    a non-string "lang"; naming the file when it is missing, unreadable, damaged (gzip, zstd, parquet) or without any text.
    With `damaged`, that is called for a bad record, which is left out.
    """
    files = text_files([paths] if isinstance(paths, str | Path) else paths)
    sizes = [file.stat().st_size for file in files]
    total, before = sum(sizes), 0
    for file, size in zip(files, sizes, strict=True):

        def report(done: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        empty = True
        for document in file_documents(file, keys, report=report, damaged=damaged):
            empty = False
            yield document
        if empty:
            raise HyperLlamaError(f"{file} holds no text")
        before += size
        report(0, before)


def file_documents(
    path: Path,
    keys: Keys = _KEYS,
    *,
    first_record: int = 1,
    report: Callable[[int], None] = lambda done: None,
    damaged: Damaged | None = None,
) -> Iterator[Document]:
    """The documents of one file from `first_record` on; what is before is read past without being parsed.

    `report(done)` counts bytes of the file. Raises as iter_documents.
    """
    kind = next(suffix for suffix in SUFFIXES[::-1] if path.name.endswith(suffix)).split(".")[1]
    readers: dict[str, tuple[Any, Any]] = {
        "parquet": (_rows, _of_row),
        "jsonl": (_lines, _of_line),
        "txt": (_pieces, _of_piece),
    }
    records, parse = readers[kind]
    for number, record in records(path, keys, first_record, report):
        if number < first_record:
            continue
        try:
            document = parse(path, number, record, keys)
        except HyperLlamaError as error:
            if damaged is None:
                raise
            damaged(str(error))
            continue
        if document is not None and document.text.strip():
            yield document


def _lines(path: Path, keys: Keys, first: int, report: Callable[[int], None]) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line with its end); report the bytes read from disk so far."""
    reported = 0
    try:
        with ExitStack() as stack:
            raw = stack.enter_context(open(path, "rb"))
            for number, line in enumerate(stack.enter_context(_decompressed(path, raw)), 1):
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if raw.tell() - reported >= _PROGRESS_STEP:
                    reported = raw.tell()
                    report(reported)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise HyperLlamaError(f"{path} is not a whole gzip file: {error}") from None
    except OSError as error:
        if path.suffix == ".zst" and error.errno is None:  # pyarrow's own, about the frame
            raise HyperLlamaError(f"{path} is not a whole zstd file: {error}") from None
        raise HyperLlamaError(f"{path} cannot be read: {error.strerror or error}") from None


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(raw))
    if path.suffix == ".zst":
        return io.BufferedReader(_pyarrow(path).CompressedInputStream(raw, "zstd"), _PROGRESS_STEP)
    return raw


def _pieces(
    path: Path, keys: Keys, first: int, report: Callable[[int], None]
) -> Iterator[tuple[int, tuple[int, bytes]]]:
    """Yield (number of the document from 1, (number of the line it begins in, document)) of a txt file."""
    if keys.id is not None:
        raise HyperLlamaError(f"{path} is plain text and has no ids: keep_ids and drop_ids need JSONL or parquet")
    parts: list[bytes] = []
    piece = begins = 1
    for number, line in _lines(path, keys, first, report):
        *ends, rest = line.split(b"\f")
        for end in ends:
            yield piece, (begins, b"".join([*parts, end]))
            parts, piece, begins = [], piece + 1, number
        parts.append(rest)
    yield piece, (begins, b"".join(parts))


def _rows(path: Path, keys: Keys, first: int, report: Callable[[int], None]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number from 1, row); row groups before row `first` are not read."""
    pyarrow = _pyarrow(path)
    import pyarrow.parquet as parquet

    size = path.stat().st_size
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            there = set(file.schema_arrow.names)
            for key in (keys.text, keys.id):
                if key is not None and key not in there:
                    raise HyperLlamaError(f'{path} has no column "{key}"; it has {", ".join(sorted(there))}')
            columns = [key for key in keys if key in there]
            total, before = file.metadata.num_rows, 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if before + rows >= first:
                    number = before
                    for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns):
                        for row in batch.to_pylist():
                            number += 1
                            yield number, row
                        report(size * number // total)
                before += rows
    except (
        pyarrow.ArrowException,
        OSError,
        UnicodeDecodeError,
    ) as error:  # a string that is not UTF-8 can't be had alone
        raise HyperLlamaError(f"{path} is not a whole parquet file: {error}") from None


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise HyperLlamaError(f"{path} needs pyarrow to be read: pip install 'hyperllama[data]'") from None
    return pyarrow


def _decode(path: Path, number: int, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = number + data.count(b"\n", 0, error.start)
        place = error.start - (data.rfind(b"\n", 0, error.start) + 1)
        message = f"{path} line {line} is not UTF-8: {error.reason} at byte {place} of the line"
        raise HyperLlamaError(message) from None


def _of_piece(path: Path, number: int, piece: tuple[int, bytes], keys: Keys) -> Document:
    line, data = piece
    return Document(_decode(path, line, data), None, len(data), path, number)


def _of_line(path: Path, number: int, line: bytes, keys: Keys) -> Document | None:
    text = _decode(path, number, line)
    if not text.strip():
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HyperLlamaError(f"{path} line {number} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise HyperLlamaError(f'{path} line {number} is not an object: expected {{"{keys.text}": ...}}')
    return _of_record(path, f"line {number}", number, value, keys)


def _of_row(path: Path, number: int, row: dict[str, Any], keys: Keys) -> Document:
    return _of_record(path, f"row {number}", number, row, keys)


def _of_record(path: Path, where: str, number: int, value: dict[str, Any], keys: Keys) -> Document:
    text, lang = value.get(keys.text), value.get(keys.lang) if keys.lang else None
    if not isinstance(text, str):
        raise HyperLlamaError(f'{path} {where} has no string under the key "{keys.text}"')
    if not (lang is None or isinstance(lang, str)):
        raise HyperLlamaError(f'{path} {where}: "{keys.lang}" must be a string, for example "fao"')
    identity = None
    if keys.id is not None:
        identity = value.get(keys.id)
        if not isinstance(identity, str | int):
            raise HyperLlamaError(f'{path} {where} has no string or number under the key "{keys.id}"')
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise HyperLlamaError(f'{path} {where}: "{keys.text}" is not Unicode: {error.reason}') from None
    return Document(text, lang, size, path, number, None if identity is None else str(identity))


def inspect_text(
    paths: Iterable[str | Path],
    *,
    keys: Keys = _KEYS,
    language: str | None = None,
    samples: int = 3,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What is in text files: counts by language, document lengths, samples, damaged records.

    Keys: documents, bytes, characters; languages {tag: the same}; lengths {largest length in characters, a power of two:
    documents}; damaged (how many records), damages (the first 20, in words); samples [{language, characters, text}] (the first
    200 characters of documents 1, 2, 4, 8, ... of which the last `samples` are kept).
    """
    languages: dict[str, dict[str, int]] = {}
    lengths: dict[int, int] = {}
    damages: list[str] = []
    shown: list[dict[str, Any]] = []
    for number, document in enumerate(iter_documents(paths, keys=keys, progress=progress, damaged=damages.append), 1):
        tag, size = language_of(document, language), len(document.text)
        counts = languages.setdefault(tag, {"documents": 0, "bytes": 0, "characters": 0})
        for key, value in (("documents", 1), ("bytes", document.num_bytes), ("characters", size)):
            counts[key] += value
        power = 1 << (size - 1).bit_length()
        lengths[power] = lengths.get(power, 0) + 1
        if number & (number - 1) == 0:
            shown = [*shown, {"language": tag, "characters": size, "text": document.text[:200]}][-samples:]
    return {
        **{key: sum(counts[key] for counts in languages.values()) for key in ("documents", "bytes", "characters")},
        "languages": languages,
        "lengths": dict(sorted(lengths.items())),
        "damaged": len(damages),
        "damages": damages[:20],
        "samples": shown,
    }
