"""Minimal pairs (Warstadt et al. 2020, arXiv 1912.00582): is the good sentence more likely than the bad one?

A file has one object a line: {"good": ..., "bad": ..., "phenomenon": ...}; other keys are ignored. A sentence's
log-probability is the sum over all its tokens after the start token, without an end token: see score.py. The good
sentence's must be strictly greater; a tie counts one half.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from hyperllama.data.tokenizer import Tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate.score import BATCH_TOKENS, score, start_token, window_length
from hyperllama.model import Llama


class Pair(NamedTuple):
    """One line of a file of minimal pairs."""

    good: str
    bad: str
    phenomenon: str


def read_pairs(path: str | Path) -> list[Pair]:
    """Read a file of minimal pairs.

    Raises HyperLlamaError naming the file when it is missing or empty, and the line when it is not such an object or
    its sentences are the same.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise HyperLlamaError(f"{path} cannot be read: {error.strerror or error}") from None
    pairs = [_pair(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise HyperLlamaError(f"{path} holds no minimal pairs")
    return pairs


def _pair(line: bytes, where: str) -> Pair:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise HyperLlamaError(f"{where} is not UTF-8: {error.reason} at byte {error.start} of the line") from None
    except (ValueError, RecursionError) as error:
        raise HyperLlamaError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise HyperLlamaError(f'{where} is not an object: expected {{"good": ..., "bad": ..., "phenomenon": ...}}')
    for key in Pair._fields:
        text = value.get(key)
        if not isinstance(text, str) or not text.strip():
            raise HyperLlamaError(f'{where} has no text under the key "{key}"')
        try:
            text.encode()
        except UnicodeEncodeError:
            raise HyperLlamaError(f'{where}: "{key}" holds half a surrogate pair, which is no Unicode text') from None
    pair = Pair(value["good"], value["bad"], value["phenomenon"])
    if pair.good == pair.bad:
        raise HyperLlamaError(f"{where}: the good and the bad sentence are the same")
    return pair


def evaluate_pairs(
    model: Llama,
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    start: int | None = None,
    seq_len: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, Any]:
    """Score a file of minimal pairs: {pairs, accuracy, by_phenomenon: {name: {pairs, accuracy}}, flops}.

    Arguments as in evaluate_text. Raises HyperLlamaError for a bad file, a window the model can't take, and a loss that
    is not finite.
    """
    pairs = read_pairs(path)
    sequences = tokenizer.encode_batch([sentence for pair in pairs for sentence in (pair.good, pair.bad)])
    scored = score(
        model,
        sequences,
        start=start_token(tokenizer) if start is None else start,
        seq_len=window_length(model, seq_len),
        batch_tokens=batch_tokens,
    )
    points: dict[str, list[float]] = {}
    for pair, good, bad in zip(pairs, scored.nll[::2], scored.nll[1::2], strict=True):
        points.setdefault(pair.phenomenon, []).append(0.5 if good == bad else float(good < bad))
    return {
        **_summary([point for group in points.values() for point in group]),
        "by_phenomenon": {name: _summary(points[name]) for name in sorted(points)},
        "flops": scored.flops,
    }


def _summary(points: list[float]) -> dict[str, Any]:
    return {"pairs": len(points), "accuracy": sum(points) / len(points)}
