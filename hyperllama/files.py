"""Files that appear whole or not at all: atomic writes, hashes, JSON."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hyperllama.errors import HyperLlamaError


def sha256_file(path: str | Path, progress: Any = None) -> str:
    """Hex SHA-256 of a file's bytes, read in 4 MiB pieces; `progress(n_bytes)` is called after each."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or a folder entry to disk, so that a rename that follows survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_free(path: str | Path) -> None:
    """Raise HyperLlamaError when a folder can't be written at `path` because something is there."""
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise HyperLlamaError(f"{path} already exists: name a new folder, or remove this one first")


def _leftovers(path: Path) -> Iterator[tuple[Path, str]]:
    """What killed processes left beside `path`: (file or folder, "tmp" or "old").

    A process of another machine counts as dead: one output is written from one machine at a time.
    """
    for left in path.parent.iterdir() if path.parent.is_dir() else ():
        match = re.fullmatch(rf"\.{re.escape(path.name)}\.(\d+)\.(tmp|old)", left.name)
        if match is not None and not _is_running(int(match[1])):
            yield left, match[2]


def _sweep(path: Path, adopt: Path | None = None, resumes: Callable[[Path], bool] | None = None) -> None:
    """Remove what killed processes left; a folder that one had moved aside for its new one comes back.

    A temporary folder that `resumes` accepts becomes `adopt`.
    """
    for left, kind in _leftovers(path):
        if kind == "old" and not path.exists():
            os.replace(left, path)
        elif adopt is not None and resumes is not None and kind == "tmp" and not adopt.exists() and resumes(left):
            os.replace(left, adopt)
        elif left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def check_room(path: str | Path, n_bytes: int) -> None:
    """Raise HyperLlamaError when the disk of `path` has no room for `n_bytes`, what killed processes left there counted as free."""
    path = Path(path).absolute()
    existing = next(parent for parent in path.parents if parent.is_dir())
    left = sum(f.stat().st_blocks * 512 for folder, _ in _leftovers(path) for f in (folder, *folder.rglob("*")))
    free = shutil.disk_usage(existing).free + left
    if free < n_bytes:
        raise HyperLlamaError(f"{path} needs {n_bytes:,} bytes, the disk of {existing} has {free:,} left")


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place when the block ends without an error."""
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(
    path: str | Path,
    *,
    overwrite: bool = False,
    resumes: Callable[[Path], bool] | None = None,
    sync: bool = True,
) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it into place when the block ends without an error.

    resumes: says of a folder that a killed process left whether to go on with it; then that is what is yielded. sync: have the
    disk hold all of it before it appears; without, a power cut soon after can leave a folder with holes, a kill can't.
    Raises HyperLlamaError when `path` already exists and `overwrite` is false.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    _sweep(path, temporary, resumes)
    if not overwrite:
        try:
            check_free(path)
        except HyperLlamaError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    temporary.mkdir(exist_ok=True)
    try:
        yield temporary
        for file in temporary.rglob("*") if sync else ():
            if file.is_file():
                fsync(file)
        if path.exists():  # renaming onto a non-empty folder is refused by the system: move the old one aside first
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
        if sync:
            fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; integers stay integers."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """`value` as indented JSON, as files have it."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises HyperLlamaError naming the file when it is missing, not UTF-8, or not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HyperLlamaError(f"{path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise HyperLlamaError(f"{path} is not valid JSON: {error}") from None
