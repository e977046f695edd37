"""Files of one JSON object a line: the texts under some keys. Other keys, blank lines and a byte-order mark are ignored."""

import json
from collections.abc import Sequence
from pathlib import Path

from hyperllama.errors import HyperLlamaError


def read_rows(path: str | Path, keys: Sequence[str]) -> list[tuple[str, list[str]]]:
    """("FILE line N", the texts under `keys`) of every object.

    Raises HyperLlamaError naming the file when it can't be read or is empty, and the line when it is not such an object.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise HyperLlamaError(f"{path} cannot be read: {error.strerror or error}") from None
    rows = [(f"{path} line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise HyperLlamaError(f"{path} is empty")
    return [(where, _texts(line, where, keys)) for where, line in rows]


def _texts(line: bytes, where: str, keys: Sequence[str]) -> list[str]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise HyperLlamaError(f"{where} is not UTF-8: {error.reason} at byte {error.start} of the line") from None
    except (ValueError, RecursionError) as error:
        raise HyperLlamaError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        expected = ", ".join(f'"{key}": ...' for key in keys)
        raise HyperLlamaError(f"{where} is not an object: expected {{{expected}}}")
    for key in keys:
        text = value.get(key)
        if not isinstance(text, str) or not text.strip():
            raise HyperLlamaError(f'{where} has no text under the key "{key}"')
        try:
            text.encode()
        except UnicodeEncodeError:
            raise HyperLlamaError(f'{where}: "{key}" holds half a surrogate pair, which is no Unicode text') from None
    return [value[key] for key in keys]
